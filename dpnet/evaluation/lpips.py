"""LPIPS: the learned perceptual distance of two images (Zhang et al., CVPR 2018), with AlexNet.

Both images go through AlexNet. At each of five layers the features of a position are scaled to
length 1. The squared differences are weighted by learned heads and averaged over the positions.
LPIPS is the sum over the layers. torchmetrics ships the heads. Its own class needs torchvision and
downloads AlexNet's weights by itself, so the network is built here. A test compares both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from data_prep.core.errors import PipelineError
from dpnet.evaluation.exact import exact_convolutions
from dpnet.evaluation.tensor_file import read_tensors
from dpnet.evaluation.weights import WeightsFile

LEAST_SIDE = 31  # pixels; AlexNet's second pooling needs 3 x 3 features
EPSILON = 1e-8  # under the root of a length, as in torchmetrics
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of the LPIPS authors
# Of each convolution: its number in torchvision's `features`, (in, out), kernel, stride, padding,
# and whether 3 x 3 max pooling with stride 2 comes before it.
_LAYERS = (
    (0, (3, 64), 11, 4, 2, False),
    (3, (64, 192), 5, 1, 2, True),
    (6, (192, 384), 3, 1, 1, True),
    (8, (384, 256), 3, 1, 1, False),
    (10, (256, 256), 3, 1, 1, False),
)
_ADVICE = (
    "save torchvision's AlexNet weights again and name the file in evaluate.lpips_weights, or leave"
    " the option out."
)


class Lpips(nn.Module):
    """The distance network, in float32 and without gradients."""

    shift: Tensor
    scale: Tensor

    def __init__(self, weights: Mapping[str, Tensor], heads: Sequence[Tensor]) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList()
        for number, (width_in, width_out), kernel, stride, padding, _ in _LAYERS:
            layer = nn.Conv2d(width_in, width_out, kernel, stride, padding)
            own = {name: weights[f"features.{number}.{name}"] for name in ("weight", "bias")}
            layer.load_state_dict(own)
            self.convolutions.append(layer)
        self.heads = nn.ParameterList(head.reshape(1, -1, 1, 1) for head in heads)
        self.register_buffer("shift", torch.tensor(_SHIFT).reshape(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor(_SCALE).reshape(1, 3, 1, 1))
        self.requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        """Return the distances of the first image to the others.

        Args:
            images: float32 [1 + N, 3, H, W] in [0, 1], at least LEAST_SIDE pixels a side.

        Returns:
            float32 [N], 0 for an equal image.
        """
        x = (2 * images - 1 - self.shift) / self.scale
        total = torch.zeros(len(images) - 1, device=images.device)
        for layer, head, (*_, pooled) in zip(self.convolutions, self.heads, _LAYERS, strict=True):
            x = F.relu(layer(F.max_pool2d(x, 3, 2) if pooled else x))
            unit = x / torch.sqrt(EPSILON + x.square().sum(1, keepdim=True))
            difference = (unit[1:] - unit[:1]).square()
            total += (head * difference).sum(1).mean((1, 2))
        return total

    @torch.no_grad()
    def distances(
        self, truth: NDArray[np.uint8], others: Sequence[NDArray[np.uint8]]
    ) -> list[float]:
        """Return the distance of each of `others` to `truth`; all are uint8 [H, W, 3].

        One call holds all images of a pair, so the results do not depend on other pairs.
        """
        pixels = torch.from_numpy(np.stack([truth, *others])).to(self.shift.device)
        images = pixels.permute(0, 3, 1, 2).float() / 255
        with exact_convolutions(self.shift.device):
            found: list[float] = self(images).tolist()
        return found


def load_lpips(file: WeightsFile) -> Lpips:
    """Read AlexNet's weights from a .safetensors or .pth file, and the heads of torchmetrics.

    Raises:
        ConfigError: the file is cut short, or holds anything else.
        PipelineError: the file was changed.
    """
    found = read_tensors(file, "LPIPS", "torchvision's AlexNet", _ADVICE)
    weights = {}
    for number, (width_in, width_out), kernel, *_ in _LAYERS:
        shapes = {"weight": (width_out, width_in, kernel, kernel), "bias": (width_out,)}
        for name, shape in shapes.items():
            whole = f"features.{number}.{name}"
            weights[whole] = found.take(whole, shape)
    return Lpips(weights, _heads()).eval()


def _heads() -> list[Tensor]:
    """Return the five heads, of 64, 192, 384, 256 and 256 values, that torchmetrics ships."""
    package = find_spec("torchmetrics")  # not imported: that takes seconds
    places = package.submodule_search_locations if package else None
    if not places:
        raise PipelineError("LPIPS needs torchmetrics: `pip install torchmetrics`.")
    file = Path(places[0]) / "functional/image/lpips_models/alex.pth"
    state = torch.load(file, map_location="cpu", weights_only=True)
    return [state[f"lin{number}.model.1.weight"] for number in range(len(_LAYERS))]
