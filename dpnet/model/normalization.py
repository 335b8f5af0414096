"""Dynamic normalization and the kinds that it is compared with.

Statistics are per sample and channel, in fp32. The mask that the encoder has updated weights them:
m for the known region, 1 - m for the hole. The paper gives the idea (normalise with the updated
mask, layer by layer); soft weights, shrinkage and modulation are our choice.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dpnet.model.config import Normalization, Statistics
from dpnet.model.dtype import full

SHRINK = 16.0  # n0: a region with 16 pixels counts half, the whole map the other half
VARIANCE_EPSILON = 1e-5


class Moments(NamedTuple):
    """The moments of a region: the sum of weights n (N111), mean and variance (NC11)."""

    n: Tensor
    mean: Tensor
    variance: Tensor


def region_moments(x: Tensor, m: Tensor) -> tuple[Moments, Moments]:
    """Return the moments of the known region (weights m) and of the hole (1 - m), in fp32.

    An empty region has the mean of the whole map and variance 0.
    """
    x, m = full(x), full(m)
    centre = x.mean(dim=(2, 3), keepdim=True)
    away = x - centre  # the square of a small number loses fewer digits
    regions = []
    for weights in (m, 1 - m):
        n = weights.sum(dim=(2, 3), keepdim=True)
        count = torch.where(n > 0, n, 1.0)
        weighted = away * weights
        first = weighted.sum(dim=(2, 3), keepdim=True) / count
        second = (weighted * away).sum(dim=(2, 3), keepdim=True) / count
        regions.append(Moments(n, centre + first, (second - first * first).clamp(min=0)))
    return regions[0], regions[1]


def merge(a: Moments, b: Moments) -> Moments:
    """Return the moments of both regions together (Chan, Golub and LeVeque, 1979)."""
    n = a.n + b.n
    share = b.n / torch.where(n > 0, n, 1.0)
    delta = b.mean - a.mean
    variance = torch.lerp(a.variance, b.variance, share) + share * (1 - share) * delta * delta
    return Moments(n, a.mean + share * delta, variance)


class SharedStatistics:
    """Moments of both regions in every layer, gathered over several forward passes.

    `shared_statistics` makes one. While `gathering`, each layer uses its own statistics and adds
    them, sample by sample. After `use()`, each layer uses the gathered statistics.
    """

    def __init__(self) -> None:
        self.gathering = True
        self._layers: dict[nn.Module, tuple[Moments, Moments]] = {}

    def use(self) -> None:
        """Use the gathered statistics from now on."""
        self.gathering = False

    def moments(self, layer: nn.Module, x: Tensor, m: Tensor) -> tuple[Moments, Moments]:
        """Return the moments to normalise `x` with. Raises ValueError if none were gathered."""
        if not self.gathering:
            if layer not in self._layers:
                raise ValueError("no statistics were gathered: run the network before `use()`.")
            dtype = torch.promote_types(x.dtype, torch.float32)
            known, hole = (Moments(*(t.to(dtype) for t in r)) for r in self._layers[layer])
            return known, hole
        own = region_moments(x, m)
        known, hole = (Moments(*(t.detach().double() for t in region)) for region in own)
        if layer in self._layers:
            known, hole = merge(self._layers[layer][0], known), merge(self._layers[layer][1], hole)
        self._layers[layer] = known, hole
        return own


@contextmanager
def shared_statistics(network: nn.Module) -> Iterator[SharedStatistics]:
    """Share the statistics of dynamic and region normalization over passes while in the block.

    For the tiles of one image: run all, call `use()`, and run all again. Then all tiles have the
    same brightness and contrast.
    """
    shared = SharedStatistics()
    with _with_statistics(network, shared):
        yield shared


@contextmanager
def own_statistics(network: nn.Module) -> Iterator[None]:
    """Let each pass use its own statistics while in the block, also in `shared_statistics`.

    So another image can run between the tiles of one image.
    """
    with _with_statistics(network, None):
        yield


@contextmanager
def _with_statistics(network: nn.Module, shared: SharedStatistics | None) -> Iterator[None]:
    layers = [layer for layer in network.modules() if isinstance(layer, RegionStatistics)]
    before = [layer.shared for layer in layers]
    for layer in layers:
        layer.shared = shared
    try:
        yield
    finally:
        for layer, old in zip(layers, before, strict=True):
            layer.shared = old


class RegionStatistics(nn.Module):
    """Scale and shift of each region.

    `forward(x_NCHW, m_N1HW)` returns (scale, shift), each 2NC11 in fp32: first the known region,
    then the hole. With the statistics `own`, x * scale + shift has mean 0 and variance 1 in each
    region. With `known`, the known region's scale and shift apply to both regions, and with `whole`
    those of the whole map. Then the hole keeps its difference from its surroundings, which is what
    the network is to paint.

    Mean and variance of a region are interpolated towards those of the whole map, with the weight
    n / (n + 16) for a region with sum of weights n. So a tiny or empty region neither erases the
    signal nor amplifies noise.
    """

    def __init__(self, whose: Statistics) -> None:
        super().__init__()
        self.whose = whose
        self.shared: SharedStatistics | None = None

    def forward(self, x: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
        if self.shared is None:
            known, hole = region_moments(x, m)
        else:
            known, hole = self.shared.moments(self, x, m)
        whole = merge(known, hole)
        regions = {"own": (known, hole), "known": (known, known), "whole": (whole, whole)}
        scales, shifts = [], []
        for region in regions[self.whose]:
            weight = region.n / (region.n + SHRINK)
            mu = torch.lerp(whole.mean, region.mean, weight)
            variance = torch.lerp(whole.variance, region.variance, weight)
            scales.append(torch.rsqrt(variance + VARIANCE_EPSILON))
            shifts.append(-mu * scales[-1])
        return torch.stack(scales), torch.stack(shifts)


class EncoderNorm(nn.Module):
    """Normalization in the encoder, with the layer's current mask.

    `dynamic` and `region` have a scale and an offset for each channel and region. `region` uses
    hard regions (m > 0.5) with their own statistics, like region normalization. `instance` and
    `batch` ignore the mask.
    """

    def __init__(self, channels: int, kind: Normalization, whose: Statistics = "known") -> None:
        super().__init__()
        self.kind = kind
        if kind in ("dynamic", "region"):
            self.statistics = RegionStatistics("own" if kind == "region" else whose)
            self.gamma = nn.Parameter(torch.ones(2, channels))
            self.beta = nn.Parameter(torch.zeros(2, channels))
        else:
            self.plain = _plain(channels, kind)

    def forward(self, x: Tensor, m: Tensor) -> Tensor:
        if self.kind not in ("dynamic", "region"):
            return self.plain(x)  # type: ignore[no-any-return]
        m = full(m)
        if self.kind == "region":
            m = (m > 0.5).to(m.dtype)
        scale, shift = self.statistics(x, m)
        gamma = full(self.gamma).view(2, 1, -1, 1, 1)
        beta = full(self.beta).view(2, 1, -1, 1, 1)
        return _apply(x, m, scale * gamma, shift * gamma + beta).to(x.dtype)


class DecoderNorm(nn.Module):
    """Normalization in the decoder, with the encoder's mask M_l at the same resolution.

    `dynamic` returns x_hat * (1 + gamma) + beta. A 3x3 convolution on the mask and a projection of
    the encoder's feature gives gamma and beta; it starts at 0. The other kinds have no such guide.
    """

    def __init__(
        self,
        channels: int,
        guide_channels: int,
        guide: int,
        kind: Normalization,
        whose: Statistics = "known",
    ) -> None:
        super().__init__()
        self.kind = kind
        if kind == "dynamic":
            self.statistics = RegionStatistics(whose)
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
        guide = torch.cat([self.project(feature), m.to(feature.dtype)], dim=1)
        gamma, beta = full(self.modulate(guide)).chunk(2, dim=1)
        normalised = _apply(x, m, *self.statistics(x, m))
        return torch.addcmul(beta, normalised, 1 + gamma).to(x.dtype)


def _apply(x: Tensor, m: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Apply both regions' scale and shift (2NC11 each) to x, and mix by m: NCHW in fp32."""
    x = full(x)
    known = torch.addcmul(shift[0], x, scale[0])
    hole = torch.addcmul(shift[1], x, scale[1])
    return torch.lerp(hole, known, full(m))


def _plain(channels: int, kind: Normalization) -> nn.Module:
    return nn.BatchNorm2d(channels) if kind == "batch" else nn.InstanceNorm2d(channels, affine=True)
