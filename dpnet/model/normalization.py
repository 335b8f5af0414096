"""Dynamic normalization and the forms it is compared with.

Statistics are per sample and channel, in fp32, weighted by the mask as the encoder has updated it:
known with weights m, hole with weights 1 - m. The paper names the idea (normalise with the updated
mask, layer by layer); the soft weights, the shrinkage and the modulation are our choice.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dpnet.model.config import Normalization

SHRINK = 16.0  # n0: a region of this many pixels counts half, the whole map the other half
VARIANCE_EPSILON = 1e-5


def region_scale_shift(x: Tensor, m: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Per region 1/sigma and -mu/sigma, each NC11 in fp32: (known, known, hole, hole).

    Each region's mean and variance are shrunk towards the whole map's by n / (n + 16), n being the
    region's sum of weights, so that a tiny or empty region neither erases the signal nor blows up
    noise.
    """
    x = x.float()
    m = m.float()
    pixels = x.shape[2] * x.shape[3]
    mean = x.mean(dim=(2, 3), keepdim=True)
    centred = x - mean
    squared = centred * centred
    variance = squared.mean(dim=(2, 3), keepdim=True)
    n_known = m.sum(dim=(2, 3), keepdim=True)
    n_hole = pixels - n_known
    sum_known = (centred * m).sum(dim=(2, 3), keepdim=True)
    square_known = (squared * m).sum(dim=(2, 3), keepdim=True)
    # The deviations from the whole mean sum to 0 over both regions.
    sums = (
        (n_known, sum_known, square_known),
        (n_hole, -sum_known, pixels * variance - square_known),
    )
    result = []
    for n, first, second in sums:
        n = n.clamp(min=0)
        region_mean = first / n.clamp(min=1e-6)
        region_variance = (second / n.clamp(min=1e-6) - region_mean**2).clamp(min=0)
        weight = n / (n + SHRINK)
        mu = mean + weight * region_mean
        scale = torch.rsqrt(weight * region_variance + (1 - weight) * variance + VARIANCE_EPSILON)
        result += [scale, -mu * scale]
    return result[0], result[1], result[2], result[3]


class EncoderNorm(nn.Module):
    """Normalization in the encoder, by the layer's current mask.

    `dynamic` and `region` have a scale and an offset per channel for each region; `region` uses
    hard regions (m > 0.5) as region normalization does. `instance` and `batch` ignore the mask.
    """

    def __init__(self, channels: int, kind: Normalization) -> None:
        super().__init__()
        self.kind = kind
        if kind in ("dynamic", "region"):
            self.gamma = nn.Parameter(torch.ones(2, channels))
            self.beta = nn.Parameter(torch.zeros(2, channels))
        else:
            self.plain = _plain(channels, kind, affine=True)

    def forward(self, x: Tensor, m: Tensor) -> Tensor:
        if self.kind not in ("dynamic", "region"):
            return self.plain(x)  # type: ignore[no-any-return]
        m = _regions(m, self.kind)
        scale_k, shift_k, scale_h, shift_h = region_scale_shift(x, m)
        gamma = self.gamma.float().view(2, 1, -1, 1, 1)
        beta = self.beta.float().view(2, 1, -1, 1, 1)
        scale_k, shift_k = scale_k * gamma[0], shift_k * gamma[0] + beta[0]
        scale_h, shift_h = scale_h * gamma[1], shift_h * gamma[1] + beta[1]
        return _apply(x, m, scale_k, shift_k, scale_h, shift_h)


class DecoderNorm(nn.Module):
    """Normalization in the decoder, by the mask M_l that the encoder had at this resolution.

    `dynamic`: x_hat * (1 + gamma) + beta, with gamma and beta from a 3x3 convolution on the mask
    and a projection of the encoder's feature at this resolution, initialised to 0. The other kinds
    have no such guide.
    """

    def __init__(self, channels: int, guide_channels: int, guide: int, kind: Normalization) -> None:
        super().__init__()
        self.kind = kind
        if kind == "dynamic":
            self.project = nn.Conv2d(guide_channels, guide, 1)
            self.modulate = nn.Conv2d(guide + 1, 2 * channels, 3, padding=1)
            nn.init.zeros_(self.modulate.weight)
            assert self.modulate.bias is not None
            nn.init.zeros_(self.modulate.bias)
        else:
            self.inner = EncoderNorm(channels, kind)

    def forward(self, x: Tensor, m: Tensor, feature: Tensor) -> Tensor:
        if self.kind != "dynamic":
            return self.inner(x, m)  # type: ignore[no-any-return]
        normalised = _apply(x, m, *region_scale_shift(x, m))
        guide = torch.cat([self.project(feature), m.to(feature.dtype)], dim=1)
        gamma, beta = self.modulate(guide).chunk(2, dim=1)
        return normalised * (1 + gamma) + beta  # type: ignore[no-any-return]


def _apply(
    x: Tensor, m: Tensor, scale_k: Tensor, shift_k: Tensor, scale_h: Tensor, shift_h: Tensor
) -> Tensor:
    """Mix of the two regions' affine maps of x by m: computed in fp32, returned in x's type."""
    x32 = x.float()
    known = torch.addcmul(shift_k, x32, scale_k)
    hole = torch.addcmul(shift_h, x32, scale_h)
    return torch.lerp(hole, known, m.float()).to(x.dtype)


def _regions(m: Tensor, kind: Normalization) -> Tensor:
    return (m > 0.5).float() if kind == "region" else m


def _plain(channels: int, kind: Normalization, *, affine: bool) -> nn.Module:
    if kind == "batch":
        return nn.BatchNorm2d(channels, affine=affine)
    return nn.InstanceNorm2d(channels, affine=affine)
