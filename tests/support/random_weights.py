"""Weights of the right shapes and random values, for tests that need no real network."""

from __future__ import annotations

from pathlib import Path


def random_alexnet(file: Path, seed: int = 0) -> Path:
    """Write the convolutions of an AlexNet under torchvision's names to a .safetensors file."""
    import torch
    from safetensors.torch import save_file

    made = torch.Generator().manual_seed(seed)
    shapes = {
        0: (64, 3, 11),
        3: (192, 64, 5),
        6: (384, 192, 3),
        8: (256, 384, 3),
        10: (256, 256, 3),
    }
    weights = {}
    for number, (wide, narrow, kernel) in shapes.items():
        scale = (narrow * kernel * kernel) ** -0.5
        weights[f"features.{number}.weight"] = (
            torch.randn(wide, narrow, kernel, kernel, generator=made) * scale
        )
        weights[f"features.{number}.bias"] = torch.zeros(wide)
    save_file(weights, file)
    return file
