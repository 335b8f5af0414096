"""Losses of the generator and the discriminator.

The paper publishes neither losses nor weights. These are our choice among the losses of comparable
systems. `valid` is always N1HW; 1 is a known pixel.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dpnet.model.dtype import full, without_autocast

Adversarial = Literal["nsgan", "hinge"]


def l1_terms(prediction: Tensor, truth: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean absolute error over the hole, and over the known pixels.

    Each sample is divided by the size of its own region, so the result does not depend on the split
    of a batch over ranks. A sample without a hole (or without known pixels) adds 0 to that term.
    """
    error = (full(prediction) - full(truth)).abs().mean(dim=1, keepdim=True)
    valid = full(valid)
    hole = 1 - valid
    terms = [
        (error * region).sum(dim=(1, 2, 3)) / region.sum(dim=(1, 2, 3)).clamp(min=1)
        for region in (hole, valid)
    ]
    return terms[0].mean(), terms[1].mean()


def generator_adversarial(fake_logits: Tensor, kind: Adversarial) -> Tensor:
    """Return the generator's adversarial loss: -log sigma(D(fake)), or -D(fake) for hinge."""
    fake = full(fake_logits)
    return F.softplus(-fake).mean() if kind == "nsgan" else -fake.mean()


def discriminator_loss(real_logits: Tensor, fake_logits: Tensor, kind: Adversarial) -> Tensor:
    """Return binary cross-entropy or the hinge loss, averaged over real and fake images."""
    real, fake = full(real_logits), full(fake_logits)
    if kind == "nsgan":
        return (F.softplus(-real).mean() + F.softplus(fake).mean()) / 2
    return (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2


def total_variation(composite: Tensor, valid: Tensor) -> Tensor:
    """Return the mean absolute difference of neighbours, if at least one is in the hole."""
    hole, x = 1 - full(valid), full(composite)
    across = torch.maximum(hole[:, :, :, 1:], hole[:, :, :, :-1])
    down = torch.maximum(hole[:, :, 1:], hole[:, :, :-1])
    total = ((x[:, :, :, 1:] - x[:, :, :, :-1]).abs() * across).mean()
    return total + ((x[:, :, 1:] - x[:, :, :-1]).abs() * down).mean()


# Channels of VGG's convolutions up to relu4_1 and their indices in torchvision's `features`;
# "M" is a pooling.
_VGG: dict[str, list[int | str]] = {
    "vgg16": [64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512],
    "vgg19": [64, 64, "M", 128, 128, "M", 256, 256, 256, 256, "M", 512],
}
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class VGGFeatures(nn.Module):
    """The first activation of each stage of VGG, for images in [0, 1]. The weights are frozen.

    `state` holds torchvision's names (`features.0.weight` ...). It may end early, but must hold at
    least three stages.
    """

    def __init__(self, state: Mapping[str, Tensor], kind: Literal["vgg16", "vgg19"]) -> None:
        super().__init__()
        self.stages = nn.ModuleList()
        stage: list[nn.Module] = []
        index, channels, first = 0, 3, True
        for width in _VGG[kind]:
            if width == "M":
                stage.append(nn.MaxPool2d(2))
                index, first = index + 1, True
                continue
            if f"features.{index}.weight" not in state:
                break
            assert isinstance(width, int)
            conv = nn.Conv2d(channels, width, 3, padding=1)
            conv.load_state_dict(
                {name: state[f"features.{index}.{name}"] for name in ("weight", "bias")}
            )
            stage += [conv, nn.ReLU()]
            index, channels = index + 2, width
            if first:
                self.stages.append(nn.Sequential(*stage))
                stage, first = [], False
        if len(self.stages) < 3:
            raise ValueError(
                f"the weights hold {len(self.stages)} stages of {kind}, but three are needed: give"
                " a state dict with torchvision's names (features.0.weight and so on)."
            )
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(1, 3, 1, 1))
        self.requires_grad_(False)

    def forward(self, image: Tensor) -> list[Tensor]:
        """Return one feature map NCHW for each stage, finest first."""
        x = (image - self.mean) / self.std
        features = []
        for stage in self.stages:
            x = stage(x)
            features.append(x)
        return features


def perceptual(predicted: Iterable[Tensor], true: Iterable[Tensor]) -> Tensor:
    """Return the mean absolute difference of features, summed over layers."""
    return torch.stack(
        [(full(p) - full(t)).abs().mean() for p, t in zip(predicted, true, strict=True)]
    ).sum()


def style(predicted: Iterable[Tensor], true: Iterable[Tensor]) -> Tensor:
    """Return the mean absolute difference of Gram matrices, summed over layers."""
    return torch.stack(
        [(gram(p) - gram(t)).abs().mean() for p, t in zip(predicted, true, strict=True)]
    ).sum()


def gram(x: Tensor) -> Tensor:
    """Return the Gram matrix of NCHW divided by C H W, as N C C in fp32.

    Each factor is divided before the product, so that it neither overflows nor underflows.
    """
    n, c, h, w = x.shape
    flat = full(x).reshape(n, c, h * w) / (c * h * w) ** 0.5
    with without_autocast(x):
        product: Tensor = flat @ flat.transpose(1, 2)
    return product
