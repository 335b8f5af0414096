"""Pull-push: a smooth fill of the hole from the known colours, coarse to fine.

The scheme is the Lumigraph's (Gortler et al., 1996, section 3.4): pull averages the known pixels
level by level, push fills from the coarsest level what a finer one does not know. At each level the
fill is relaxed a little towards the mean of its neighbours, which brings it near the harmonic fill.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from dpnet.model.dtype import full

LEVELS = 7
RELAXATIONS = 2
SATURATION = 4.0  # a coarse pixel counts as fully known once a quarter of its window is


def pull_push(image: Tensor, valid: Tensor, mean: Tensor) -> Tensor:
    """Fill the hole smoothly.

    Args:
        image: N C H W, 0 in the hole. valid: N 1 H W in {0, 1}. mean: N C 1 1, what a sample
            without any known pixel in reach is filled with.

    Returns:
        N C H W in fp32; known pixels keep their values.
    """
    colour, weight = full(image), full(valid)
    pulled = [(colour, weight)]
    for _ in range(LEVELS):
        channels = colour.shape[1]
        joined = _halve(torch.cat([colour, weight], dim=1))
        colour, weight = joined[:, :channels], joined[:, channels:]
        saturated = (weight * SATURATION).clamp(max=1)
        colour = colour * (saturated / weight.clamp(min=1e-8))
        weight = saturated
        pulled.append((colour, weight))
    filled = colour + (1 - weight) * mean
    for colour, weight in reversed(pulled[:-1]):
        # Twice as large and cut, as `_halve` rounds up: stretched to an odd size it would shift.
        above = F.interpolate(filled, scale_factor=2, mode="bilinear", align_corners=False)
        above = above[:, :, : colour.shape[2], : colour.shape[3]]
        filled = colour + (1 - weight) * above
        for _ in range(RELAXATIONS):
            filled = colour + (1 - weight) * _neighbours(filled)
    return filled


# Both are sums of shifted maps: autocast would put a convolution in half, and on a CPU they are
# faster than a convolution or a pooling.


def _halve(x: Tensor) -> Tensor:
    """Smooth with the binomial kernel 1 3 3 1 and keep every second pixel; sizes round up."""
    x = F.pad(x, (1, 2, 1, 2))
    x = x[:, :, :-3:2] + 3 * (x[:, :, 1:-2:2] + x[:, :, 2:-1:2]) + x[:, :, 3::2]
    x = x[..., :-3:2] + 3 * (x[..., 1:-2:2] + x[..., 2:-1:2]) + x[..., 3::2]
    return x / 64


def _neighbours(x: Tensor) -> Tensor:
    """Mean of each pixel's eight neighbours; beyond the border the nearest pixel is repeated."""
    around = F.pad(x, (1, 1, 1, 1), mode="replicate")
    rows = around[:, :, :-2] + around[:, :, 1:-1] + around[:, :, 2:]
    return (rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:] - x) / 8
