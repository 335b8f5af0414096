"""Pull-push: a smooth fill of the hole from the known colours, coarse to fine.

The scheme is that of the Lumigraph (Gortler et al., 1996, section 3.4). Pull averages the known
pixels level by level. Push fills the unknown pixels of each level from the next coarser one. At
each level the fill moves a little towards the mean of its neighbours, which brings it close to the
harmonic fill.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from dpnet.model.dtype import full

LEVELS = 7
RELAXATIONS = 2
SATURATION = 4.0  # a coarse pixel counts as fully known if a quarter of its window is known


def pull_push(image: Tensor, valid: Tensor, mean: Tensor) -> Tensor:
    """Fill the hole smoothly.

    Args:
        image: N C H W, 0 in the hole.
        valid: N 1 H W in {0, 1}; 1 is known.
        mean: N C 1 1, the fill of pixels without any known pixel in reach.

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
        # Doubled and cropped, because `_halve` rounds up: resizing to an odd size would shift it.
        above = F.interpolate(filled, scale_factor=2, mode="bilinear", align_corners=False)
        above = above[:, :, : colour.shape[2], : colour.shape[3]]
        filled = colour + (1 - weight) * above
        for _ in range(RELAXATIONS):
            filled = colour + (1 - weight) * _neighbours(filled)
    return filled


# Both functions below sum shifted maps. Autocast would compute a convolution in half precision, and
# on a CPU the sums are faster than a convolution or a pooling.


def _halve(x: Tensor) -> Tensor:
    """Smooth with the binomial kernel 1 3 3 1 and keep every second pixel; sizes round up."""
    x = F.pad(x, (1, 2, 1, 2))
    x = x[:, :, :-3:2] + 3 * (x[:, :, 1:-2:2] + x[:, :, 2:-1:2]) + x[:, :, 3::2]
    x = x[..., :-3:2] + 3 * (x[..., 1:-2:2] + x[..., 2:-1:2]) + x[..., 3::2]
    return x / 64


def _neighbours(x: Tensor) -> Tensor:
    """Return the mean of each pixel's eight neighbours. Beyond the border, the edge is repeated."""
    around = F.pad(x, (1, 1, 1, 1), mode="replicate")
    rows = around[:, :, :-2] + around[:, :, 1:-1] + around[:, :, 2:]
    return (rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:] - x) / 8
