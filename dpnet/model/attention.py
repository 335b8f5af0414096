"""Pyramidal attention: queries from the decoder, keys and values from three encoder layers.

The paper takes finer patches "directly from learned layers", so a pixel of the hole can draw from a
pyramid of layers. The definition is our choice: 3x3 patches, cosine logits, the log of the known
share as an additive term, and a sharpness that grows with the number of keys.
`plain_attention.py` shows it in its simplest form.

This module never cuts out a patch. The product of two patches is the sum of nine pixel products,

    S(y, x; v, u) = sum over a, b in {-1, 0, 1} of P(y + a, x + b; v + a, u + b),  P = q . k,

so the scores are 3x3 sums along the diagonals of the pixel products. This takes a ninth of the
multiplications. Pasting the weighted value patches back is the same sum over the weights, followed
by one product with the value pixels. Queries are computed in blocks, and again in the backward
pass, so the whole score matrix never exists. `attention_blocks.py` does this by torch's own
operations. On a GPU `attention_triton.py` does it, after `attention_check.py` has compared the two.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dpnet.model import attention_blocks
from dpnet.model.attention_check import checked_kernels
from dpnet.model.config import Attention
from dpnet.model.dtype import full, is_traced
from dpnet.model.plain_attention import (
    KNOWN_MIN,
    NORM_MIN,
    PATCH,
    plain_attend,
    plain_shares,
    sharpness,
)

GRID_MAX = 128 * 128  # most queries; larger maps and their keys are averaged down first

Grid = tuple[int, int]


def attend(
    query: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], shares: Sequence[Tensor]
) -> Tensor:
    """Return the same as `plain_attend`, computed without cutting out patches.

    Args:
        query: N D H W.
        keys: Maps N D h w.
        values: Maps N E h w of the same sizes.
        shares: N 1 h w, the known share around each key, in [0, 1].

    Returns:
        N E H W.
    """
    n, _, height, width = query.shape
    column, bias, some = key_terms(keys, shares)
    out = _attend(
        query.permute(0, 2, 3, 1),
        _flat(keys),
        _flat(values),
        inverse_norms(query)[:, 0],
        column,
        bias,
        [side for k in keys for side in k.shape[2:]],
        query.is_cuda and not _blocks_only,
    )
    out = out.permute(0, 3, 1, 2) / overlaps((height, width), out)
    return torch.where(some.view(n, 1, 1, 1), out, 0.0)


def key_terms(keys: Sequence[Tensor], shares: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Return the factor and the offset of each key's logits, and whether a sample has any key.

    Args:
        keys: Maps N D h w.
        shares: N 1 h w, the known share around each key, in [0, 1].

    Returns:
        Factor N K, offset N K, and N booleans.
    """
    share = torch.cat([full(c).flatten(1) for c in shares], dim=1)
    usable = share >= KNOWN_MIN
    some = usable.any(dim=1)
    bias = torch.where(usable, share.clamp(min=KNOWN_MIN).log(), float("-inf"))
    # Without any key, softmax over -inf would give NaN, also in the gradient.
    bias = torch.where(some[:, None], bias, 0.0)
    column = torch.cat([inverse_norms(k).flatten(1) for k in keys], dim=1)
    return column * sharpness(column), bias, some


def inverse_norms(x: Tensor) -> Tensor:
    """Return 1 / norm of the 3x3 patch around each pixel of an NCHW map, as N1HW in fp32."""
    squared = full(x).square().sum(dim=1, keepdim=True)
    total = PATCH**2 * F.avg_pool2d(squared, PATCH, 1, PATCH // 2, count_include_pad=True)
    return total.clamp(min=NORM_MIN**2).rsqrt()


def overlaps(size: Grid, like: Tensor) -> Tensor:
    """Return how many 3x3 patches of a map of `size` cover each pixel, as 11HW."""
    ones = torch.ones((1, 1, *size), dtype=like.dtype, device=like.device)
    return PATCH**2 * F.avg_pool2d(ones, PATCH, 1, PATCH // 2, count_include_pad=True)


def known_share(valid: Tensor, size: Grid) -> Tensor:
    """Return the share of known input pixels under each 3x3 patch of a map of `size`, as N1HW.

    Args:
        valid: The input mask V0, N1HW. Its height and width are multiples of `size`.
        size: Height and width of the map.
    """
    cells = F.adaptive_avg_pool2d(full(valid), size)
    return F.avg_pool2d(cells, PATCH, 1, PATCH // 2, count_include_pad=False)


@torch.library.custom_op("dpnet::attend", mutates_args=())
def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    row: Tensor,
    column: Tensor,
    bias: Tensor,
    sides: list[int],
    kernels: bool,
) -> Tensor:
    """Compute the weighted value patches and sum them where they overlap.

    It is a custom operator, so that `torch.compile` keeps the loop over blocks out of its graph.

    Args:
        q: N H W D.
        k: N K D.
        v: N K E.
        row: N H W, the factor of a query; the logits are S row column + bias.
        column: N K, the factor of a key.
        bias: N K, the offset of a key.
        sides: h, w of each level of keys in turn.
        kernels: Use the Triton kernels, if they work.

    Returns:
        N H W E in the type of `v`.
    """
    form = _form(q, k, v, kernels)
    return form.forward(q, k, v, row, column, bias, sides)  # type: ignore[no-any-return]


@_attend.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
    return v.new_empty(*q.shape[:3], v.shape[2])


@torch.library.custom_op("dpnet::attend_backward", mutates_args=())
def _attend_backward(
    gradient: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    row: Tensor,
    column: Tensor,
    bias: Tensor,
    sides: list[int],
    kernels: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of q, k, v, row and column.

    `gradient` is N H W E; the other arguments are those of `_attend`.
    """
    form = _form(q, k, v, kernels)
    return form.backward(gradient, q, k, v, row, column, bias, sides)  # type: ignore[no-any-return]


@_attend_backward.register_fake
def _(gradient: Tensor, *inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    q, k, v, row, column = (x.new_empty(x.shape) for x in inputs[:5])
    return q, k, v, row, column


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.sides, ctx.kernels = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    found = _attend_backward(gradient, *ctx.saved_tensors, ctx.sides, ctx.kernels)
    return (*found, None, None, None)


_attend.register_autograd(_differentiate, setup_context=_save)


def _form(q: Tensor, k: Tensor, v: Tensor, kernels: bool) -> Any:
    """Return the module that computes attention: `attention_triton` or `attention_blocks`."""
    same = q.dtype == k.dtype == v.dtype
    return (kernels and same and checked_kernels(q.device, q.dtype)) or attention_blocks


def _flat(maps: Sequence[Tensor]) -> Tensor:
    """Join N C h w maps to N K C."""
    return torch.cat([x.flatten(2) for x in maps], dim=2).transpose(1, 2)


class PyramidAttention(nn.Module):
    """Residual attention at one decoder resolution.

    `forward` takes the decoder's feature NCHW, the encoder's layers (the first at the same
    resolution, the others coarser) and the input mask V0. Maps of more than 128 x 128 queries are
    averaged down by a whole factor first, and the result is interpolated. This is our choice: it
    bounds time and memory on large images.
    """

    def __init__(self, channels: int, layers: list[int], dim: int) -> None:
        super().__init__()
        self.query = nn.Conv2d(channels, dim, 1)
        self.keys = nn.ModuleList(nn.Conv2d(c, dim, 1) for c in layers)
        self.values = nn.ModuleList(nn.Conv2d(c, dim, 1) for c in layers)
        self.out = nn.Conv2d(dim, channels, 1)

    def forward(self, x: Tensor, layers: list[Tensor], valid: Tensor) -> Tensor:
        query = self.query(x)
        keys = [key(f) for key, f in zip(self.keys, layers, strict=True)]
        values = [value(f) for value, f in zip(self.values, layers, strict=True)]
        if _plain or torch.compiler.is_exporting() or is_traced():
            shares = plain_shares(valid, len(layers))
            return x + self.out(plain_attend(query, keys, values, shares))  # type: ignore[no-any-return]
        size = (x.shape[2], x.shape[3])
        factor = averaged_by(size)
        if factor > 1:
            query, *rest = (_averaged(m, factor) for m in (query, *keys, *values))
            keys, values = rest[: len(keys)], rest[len(keys) :]
        shares = [known_share(valid, (k.shape[2], k.shape[3])) for k in keys]
        attended = attend(query, keys, values, shares)
        if factor > 1:
            attended = F.interpolate(attended, size=size, mode="bilinear", align_corners=False)
        return x + self.out(attended)  # type: ignore[no-any-return]


@contextmanager
def plain_attention() -> Iterator[None]:
    """Use the plain form of attention while in the block, to compare or to export."""
    global _plain
    before, _plain = _plain, True
    try:
        yield
    finally:
        _plain = before


@contextmanager
def attention_by_blocks() -> Iterator[None]:
    """Use torch's own operations on a GPU too while in the block, to compare."""
    global _blocks_only
    before, _blocks_only = _blocks_only, True
    try:
        yield
    finally:
        _blocks_only = before


_plain = False
_blocks_only = False


def averaged_by(size: Grid) -> int:
    """Return the whole factor to average all maps down by, for a query map of this size."""
    return math.ceil(math.sqrt(size[0] * size[1] / GRID_MAX))


def _averaged(x: Tensor, factor: int) -> Tensor:
    return F.avg_pool2d(x, factor, ceil_mode=True, count_include_pad=False)


def key_layers(kind: Attention, layers: list[int]) -> list[int]:
    """Return the encoder layers (finest first) that serve as keys."""
    return layers if kind == "pyramid" else layers[:1]
