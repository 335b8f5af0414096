"""Mask-aware pyramidal convolution.

Shape suffixes: N samples, C channels, H rows, W columns. A mask m is N1HW in [0, 1]: the confidence
that a feature rests on known pixels. The paper names a layer-wise pyramidal convolution; the
definition (levels, groups, normalisation by the mask, the soft update) is ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dpnet.model.config import MaskUpdate

RATIO_MAX = 8.0  # uncapped, activations on a hole's rim grow four- to eightfold in four layers
EPSILON = 1e-4  # a window with less known share than this gives 0


@dataclass(frozen=True)
class Level:
    """One convolution of a pyramid: kernel side, groups, output channels."""

    kernel: int
    groups: int
    channels: int


def pyramid_levels(channels_in: int, channels_out: int, *, pyramid: bool) -> list[Level]:
    """Four levels 3, 5, 7, 9 with groups 1, 4, 8, 16 and a quarter of the channels each.

    Narrow layers cannot have so many groups: each takes the greatest common divisor with its
    channels. Without `pyramid`, one plain 3x3.
    """
    if not pyramid:
        return [Level(3, 1, channels_out)]
    part = channels_out // 4
    return [Level(k, gcd(g, channels_in, part), part) for k, g in ((3, 1), (5, 4), (7, 8), (9, 16))]


class MaskAwareConv(nn.Module):
    """Parallel normalised convolutions, their outputs concatenated, and the mask's update.

    Level i: y_i = conv_i(F * m) * min(k_i^2 / sum m, 8) + b, and 0 where sum m / k_i^2 < 1e-4, the
    sum taken over the window (outside the image m is 0). Its confidence u_i is the mean of m over
    the part of the window inside the image; the new mask is the channel-weighted mean of the u_i.
    With a binary mask and one level this is partial convolution (Liu et al., 2018).

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
        m32 = m.float()
        ones = torch.ones_like(m32[:1])
        outputs, offsets = [], []
        new_mask = torch.zeros((), device=m.device)
        for conv, kernel, share in zip(self.convs, self.kernels, self.shares, strict=True):
            known = _window_mean(m32, kernel, self.stride)
            inside = _window_mean(ones, kernel, self.stride)
            alive = known >= EPSILON
            ratio = torch.where(alive, (1 / known.clamp(min=EPSILON)).clamp(max=RATIO_MAX), 0.0)
            y = conv(masked)
            outputs.append(y * ratio.to(y.dtype))
            offsets.append(alive)
            new_mask = new_mask + share * known / inside
        bias = torch.split(self.bias, self.channels)
        y = torch.cat(
            [
                y + b.to(y.dtype).view(1, -1, 1, 1) * alive
                for y, b, alive in zip(outputs, bias, offsets, strict=True)
            ],
            dim=1,
        )
        new_mask = new_mask.clamp(0, 1)
        if self.mask == "binary":
            new_mask = (new_mask > 0).float()
        return y, new_mask


def _window_mean(m: Tensor, kernel: int, stride: int) -> Tensor:
    """Mean over each k x k window, padding counted as 0."""
    return F.avg_pool2d(m, kernel, stride, kernel // 2, count_include_pad=True)
