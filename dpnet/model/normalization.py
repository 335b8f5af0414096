"""Dynamic normalization and the kinds that it is compared with.

Statistics are per sample and channel, in fp32. The mask that the encoder has updated weights them:
m for the known region, 1 - m for the hole. The paper gives the idea (normalise with the updated
mask, layer by layer); soft weights, shrinkage and modulation are our choice.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dpnet.model.config import Normalization, Statistics
from dpnet.model.dtype import full, is_traced

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
    centre = _mean(x).detach()
    away = x - centre  # the square of a small number loses fewer digits
    regions = []
    for weights in (m, 1 - m):
        weighted = away * weights
        first, second = _sum(weighted), _sum(weighted * away)
        regions.append(_around(centre, _sum(weights), first, second))
    return regions[0], regions[1]


def known_and_whole(x: Tensor, m: Tensor) -> tuple[Moments, Moments]:
    """Return the moments of the known region (weights m) and of the whole map, in fp32.

    An empty region has the mean of the whole map and variance 0.
    """
    x, m = full(x), full(m)
    centre, first, second, variance = _call(_Sums, x, m)
    whole = Moments(_sum(torch.ones_like(m)), centre, variance)
    return _around(centre.detach(), _sum(m), first, second), whole


def _around(centre: Tensor, n: Tensor, first: Tensor, second: Tensor) -> Moments:
    """Return the moments of a region with sums of weights, distances from `centre` and squares.

    No moment of a region depends on the centre, so it needs no gradient. (The mean of an empty
    region does, but its weight is 0.)
    """
    count = torch.where(n > 0, n, 1.0)
    first, second = first / count, second / count
    return Moments(n, centre + first, (second - first * first).clamp(min=0))


def _sum(x: Tensor) -> Tensor:
    return x.sum(dim=(2, 3), keepdim=True)


def _mean(x: Tensor) -> Tensor:
    return x.mean(dim=(2, 3), keepdim=True)


class _Sums(torch.autograd.Function):
    """The mean of x, the sums of m a and m a^2, and the mean of a^2 (NC11 each).

    a is the distance from the mean, which counts there as a constant (see `_around`). Torch's own
    gradient makes twice as many passes over x.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, m: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        centre = _mean(x)
        away = x - centre
        weighted = away * m
        ctx.save_for_backward(x, m, centre)
        return centre, _sum(weighted), _sum(weighted * away), _mean(away * away)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None]:
        x, m, centre = ctx.saved_tensors
        of_centre, first, second, variance = grads
        pixels = x.shape[2] * x.shape[3]
        away = x - centre
        # m (first + 2 second a) + (2 variance a + of_centre) / pixels
        of_x = torch.addcmul(first, away, 2 * second).mul_(m)
        of_x.addcmul_(away, 2 * variance / pixels).add_(of_centre / pixels)
        of_m = None
        if ctx.needs_input_grad[1]:
            of_m = (torch.addcmul(first, away, second) * away).sum(dim=1, keepdim=True)
        return of_x, of_m


def merge(a: Moments, b: Moments) -> Moments:
    """Return the moments of both regions together (Chan, Golub and LeVeque, 1979)."""
    n = a.n + b.n
    share = b.n / torch.where(n > 0, n, 1.0)
    delta = b.mean - a.mean
    variance = torch.lerp(a.variance, b.variance, share) + share * (1 - share) * delta * delta
    return Moments(n, a.mean + share * delta, variance)


class SharedStatistics:
    """The moments of every layer, gathered over several forward passes.

    `shared_statistics` makes one. While `gathering`, each layer uses its own statistics and adds
    them, sample by sample. After `use()`, each layer uses the gathered statistics.
    """

    def __init__(self) -> None:
        self.gathering = True
        self._layers: dict[RegionStatistics, tuple[Moments, Moments]] = {}

    def use(self) -> None:
        """Use the gathered statistics from now on."""
        self.gathering = False

    def moments(self, layer: RegionStatistics, x: Tensor, m: Tensor) -> tuple[Moments, Moments]:
        """Return what `layer.moments` does, for all passes after `use()`.

        Raises ValueError if none were gathered.
        """
        if not self.gathering:
            if layer not in self._layers:
                raise ValueError("no statistics were gathered: run the network before `use()`.")
            dtype = torch.promote_types(x.dtype, torch.float32)
            first, second = (Moments(*(t.to(dtype) for t in r)) for r in self._layers[layer])
            return first, second
        own = layer.moments(x, m)
        first, second = (Moments(*(t.detach().double() for t in region)) for region in own)
        if layer in self._layers:
            before = self._layers[layer]
            first, second = merge(before[0], first), merge(before[1], second)
        self._layers[layer] = first, second
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

    `forward(x_NCHW, m_N1HW)` returns (scale, shift) in fp32. With the statistics `own`, each is
    2NC11, first the known region, then the hole. x * scale + shift has mean 0 and variance 1 in
    each region. Otherwise each is 1NC11 for both regions: with `known` that of the known region,
    with `whole` that of the whole map. Then the hole keeps its difference from its surroundings,
    which is what the network is to paint.

    Mean and variance of a region are interpolated towards those of the whole map, with the weight
    n / (n + 16) for a region with sum of weights n. So a tiny or empty region neither erases the
    signal nor amplifies noise.
    """

    def __init__(self, whose: Statistics) -> None:
        super().__init__()
        self.whose = whose
        self.shared: SharedStatistics | None = None

    def forward(self, x: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
        moments = self.moments(x, m) if self.shared is None else self.shared.moments(self, x, m)
        known, other = moments
        whole = merge(known, other) if self.whose == "own" else other
        regions = {"own": [known, other], "known": [known], "whole": [whole]}[self.whose]
        scales, shifts = [], []
        for region in regions:
            weight = region.n / (region.n + SHRINK)
            mu = torch.lerp(whole.mean, region.mean, weight)
            variance = torch.lerp(whole.variance, region.variance, weight)
            scales.append(torch.rsqrt(variance + VARIANCE_EPSILON))
            shifts.append(-mu * scales[-1])
        return torch.stack(scales), torch.stack(shifts)

    def moments(self, x: Tensor, m: Tensor) -> tuple[Moments, Moments]:
        """Return the moments of the known region, and of the hole (`own`) or the whole map."""
        return region_moments(x, m) if self.whose == "own" else known_and_whole(x, m)


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
    """Apply scale and shift to x: NCHW in fp32. Those of two regions (2NC11) are mixed by m."""
    x = full(x)
    if scale.shape[0] == 1:
        return torch.addcmul(shift[0], x, scale[0])
    return _call(_Mixed, x, full(m), scale, shift)  # type: ignore[no-any-return]


class _Mixed(torch.autograd.Function):
    """Both regions' x * scale + shift, mixed by m. Torch's own gradient makes more passes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, m: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        known = torch.addcmul(shift[0], x, scale[0])
        hole = torch.addcmul(shift[1], x, scale[1])
        ctx.save_for_backward(x, m, scale, shift)
        return torch.lerp(hole, known, m)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        x, m, scale, shift = ctx.saved_tensors
        (grad,) = grads
        # The hole's sums are not the whole's minus the known region's: the difference of large sums
        # would be inexact where the hole is small.
        known, hole = grad * m, grad * (1 - m)
        of_scale = torch.stack([_sum(known * x), _sum(hole * x)])
        of_shift = torch.stack([_sum(known), _sum(hole)])
        of_m = None
        if ctx.needs_input_grad[1]:
            of_m = grad * torch.addcmul(shift[0] - shift[1], x, scale[0] - scale[1])
            of_m = of_m.sum(dim=1, keepdim=True)
        of_x = known.mul_(scale[0]).addcmul_(hole, scale[1])
        return of_x, of_m, of_scale, of_shift


def _call(function: type[torch.autograd.Function], *args: Tensor) -> Any:
    """Call a function with a gradient of its own. Graphs for export have none."""
    if torch.compiler.is_exporting() or is_traced():
        return function.forward(_NoContext(), *args)
    return function.apply(*args)  # type: ignore[no-untyped-call]


class _NoContext:
    def save_for_backward(self, *tensors: Tensor) -> None:
        """Save nothing."""


def _plain(channels: int, kind: Normalization) -> nn.Module:
    return nn.BatchNorm2d(channels) if kind == "batch" else nn.InstanceNorm2d(channels, affine=True)
