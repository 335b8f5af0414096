"""Weights of the right shapes and random values, for tests that need no real network."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any


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


def random_inception(file: Path, seed: int = 0, **changes: Any) -> Path:
    """Write random weights of the FID Inception network, under its names, to a .safetensors file.

    The legacy generator of NumPy never changes its numbers, so those of a reference stay valid.

    Args:
        file: the file.
        seed: of the numbers.
        changes: tensors to write in place of the right ones; None leaves one out.
    """
    from safetensors.torch import save_file

    state = inception_state(seed) | changes
    save_file({name: tensor for name, tensor in state.items() if tensor is not None}, file)
    return file


def inception_state(seed: int = 0) -> dict[str, Any]:
    """Return random weights of the FID Inception network by name."""
    import numpy as np
    import torch

    from dpnet.evaluation.inception import FEATURES, Inception

    made = np.random.RandomState(seed)
    state = {}
    for name, tensor in Inception().state_dict().items():
        shape = tuple(tensor.shape)
        if name.endswith("num_batches_tracked"):
            continue
        if name.endswith("conv.weight"):
            values = made.standard_normal(shape) * (2 / np.prod(shape[1:])) ** 0.5
        elif name.endswith(("bn.weight", "running_var")):
            values = made.uniform(0.5, 1.5, shape)
        else:
            values = made.uniform(-0.3, 0.3, shape)
        state[name] = torch.from_numpy(values.astype(np.float32))
    state["fc.weight"] = torch.zeros(1008, FEATURES)
    state["fc.bias"] = torch.zeros(1008)
    return state


def shrink_inception(change: Callable[[Any, str, Any], None] = setattr) -> None:
    """Let Inception take images of its least side and give 64 features, so that tests are quick.

    Args:
        change: sets an attribute, such as that of pytest's monkeypatch.
    """
    from dpnet.evaluation import inception

    whole = inception.Inception.forward
    change(inception, "SIDE", 75)
    change(inception.Inception, "forward", lambda own, images: whole(own, images)[:, ::32])
