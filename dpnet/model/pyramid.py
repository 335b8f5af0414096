"""Mask-aware pyramidal convolution.

Shape suffixes: N samples, C channels, H rows, W columns. A mask m is N1HW in [0, 1]: the confidence
that a feature depends on known pixels. The paper names a layer-wise pyramidal convolution. Its
definition here (levels, groups, normalisation by the mask, soft update) is our choice.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import gcd
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dpnet.model.config import MaskUpdate
from dpnet.model.dtype import full
from dpnet.model.grouped_convolution import convolve_all

RATIO_MAX = 8.0  # without a limit, values at a hole's edge grow 4 to 8 times in four layers
EPSILON = 1e-4  # a window with a smaller known share gives 0


@dataclass(frozen=True)
class Level:
    """One convolution of a pyramid: kernel side, groups, output channels."""

    kernel: int
    groups: int
    channels: int


def pyramid_levels(channels_in: int, channels_out: int, *, pyramid: bool) -> list[Level]:
    """Return four levels 3, 5, 7, 9 with groups 1, 4, 8, 16 and a quarter of the channels each.

    Narrow layers have fewer groups: the greatest common divisor with their channels. Without
    `pyramid`, there is one level, a plain 3x3 convolution.
    """
    if not pyramid:
        return [Level(3, 1, channels_out)]
    part = channels_out // 4
    return [Level(k, gcd(g, channels_in, part), part) for k, g in ((3, 1), (5, 4), (7, 8), (9, 16))]


class MaskAwareConv(nn.Module):
    """Parallel normalised convolutions with concatenated outputs, and the update of the mask.

    Level i computes y_i = conv_i(F * m) * min(k_i^2 / sum m, 8) + b, or 0 if sum m / k_i^2 < 1e-4.
    The sum is over the window; outside the image m is 0. The confidence u_i is the mean of m over
    the part of the window inside the image. The new mask is the mean of the u_i, weighted by
    channels. With a binary mask and one level, this is partial convolution (Liu et al., 2018).

    `forward` maps (F_NCHW, m_N1HW) to (NC'H'W', N1H'W') with H' = ceil(H / stride).
    """

    def __init__(
        self,
        channels_in: int,
        levels: list[Level],
        *,
        stride: int = 1,
        mask: MaskUpdate = "soft",
    ) -> None:
        super().__init__()
        self.stride, self.mask = stride, mask
        self.kernels = [level.kernel for level in levels]
        self.channels = [level.channels for level in levels]
        total = sum(self.channels)
        self.shares = [channels / total for channels in self.channels]
        self.convs = nn.ModuleList(
            nn.Conv2d(
                channels_in,
                level.channels,
                level.kernel,
                stride=stride,
                padding=level.kernel // 2,
                groups=level.groups,
                bias=False,
            )
            for level in levels
        )
        self.bias = nn.Parameter(torch.zeros(total))
        for conv in self.convs:
            assert isinstance(conv, nn.Conv2d)
            nn.init.kaiming_normal_(conv.weight, a=0.2)

    def forward(self, x: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
        masked = x * m.to(x.dtype)
        m = full(m)
        ones = torch.ones_like(m[:1])
        outputs, confidences = [], []
        bias = torch.split(self.bias, self.channels)
        maps = convolve_all(masked, cast(Iterable[nn.Conv2d], self.convs))
        for y, kernel, share, b in zip(maps, self.kernels, self.shares, bias, strict=True):
            known = _window_mean(m, kernel, self.stride)
            ratio = known.clamp(min=1 / RATIO_MAX).reciprocal()
            b = b.to(y.dtype).view(1, -1, 1, 1)
            y = torch.addcmul(b, y, ratio.to(y.dtype))
            outputs.append(y * (known >= EPSILON).to(y.dtype))
            confidences.append(share * known / _window_mean(ones, kernel, self.stride))
        # Rounding must not raise a confidence above 1.
        new_mask = sum(confidences[1:], start=confidences[0]).clamp(max=1)
        if self.mask == "binary":
            new_mask = (new_mask > 0).to(m.dtype)
        return torch.cat(outputs, dim=1), new_mask


def _window_mean(m: Tensor, kernel: int, stride: int) -> Tensor:
    """Return the mean over each k x k window, with 0 as padding."""
    return F.avg_pool2d(m, kernel, stride, kernel // 2, count_include_pad=True)
