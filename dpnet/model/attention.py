"""Pyramidal attention: queries from the decoder, keys and values from three encoder layers.

The paper takes finer patches "directly from learned layers", so a pixel of the hole can draw from a
pyramid of layers. The definition is our choice: 3x3 patches, cosine logits, the log of the known
share as an additive term, and a sharpness that grows with the number of keys.
`plain_attention.py` shows it in its simplest form.

This module never cuts out a patch. The product of two patches is the sum of nine pixel products,

    S(y, x; v, u) = sum over a, b in {-1, 0, 1} of P(y + a, x + b; v + a, u + b),  P = q . k,

so the scores are 3x3 sums along the diagonals of the pixel products. This takes a ninth of the
multiplications. Pasting the weighted value patches back is the same sum over the weights, followed
by one product with the value pixels. Rows of queries are computed in blocks, and again in the
backward pass, so the whole score matrix never exists.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

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
# Scores in one block. On a CPU they should fit into its caches; a GPU needs many to be busy.
BLOCK = {"cpu": 1 << 22, "cuda": 1 << 26}

Grid = tuple[int, int]
R = TypeVar("R")


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
        # Only in training, where shapes stay the same: each new size would compile again.
        query.is_cuda and torch.is_grad_enabled(),
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
    fused: bool,
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
        fused: Compile the steps of a block.

    Returns:
        N H W E in the type of `v`.
    """
    forward = _fused(_forward_block) if fused else _forward_block
    q = F.pad(q, (0, 0, 0, 0, 1, 1))  # a row of zeros above and below
    out = full(v).new_zeros(*q.shape[:3], v.shape[2])
    for n, top, end in _blocks(row.shape, k.shape[1], q.device):
        here = slice(top, end + 2)
        out[n, here] += forward(q[n, here], k[n], v[n], row[n, top:end], column[n], bias[n], sides)
    return out[:, 1:-1].to(v.dtype, copy=True)


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
    fused: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of q, k, v, row and column. Blocks are computed again, one by one.

    `gradient` is N H W E; the other arguments are those of `_attend`.
    """
    backward = _fused(_backward_block) if fused else _backward_block
    kind = q.dtype
    q, gradient = (F.pad(x, (0, 0, 0, 0, 1, 1)) for x in (q, gradient.to(v.dtype)))
    d_q, d_k, d_v = (
        torch.zeros_like(full(x), memory_format=torch.contiguous_format) for x in (q, k, v)
    )
    d_row, d_column = torch.zeros_like(row), torch.zeros_like(column)
    for n, top, end in _blocks(row.shape, k.shape[1], q.device):
        here = slice(top, end + 2)
        of_q, of_k, of_v, of_row, of_column = backward(
            gradient[n, here], q[n, here], k[n], v[n], row[n, top:end], column[n], bias[n], sides
        )
        d_q[n, here] += of_q
        d_k[n] += of_k
        d_v[n] += of_v
        d_row[n, top:end] = of_row
        d_column[n] += of_column
    d_q = d_q[:, 1:-1].to(kind, copy=True)
    return d_q, d_k.to(k.dtype), d_v.to(v.dtype), d_row, d_column


@_attend_backward.register_fake
def _(gradient: Tensor, *inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    q, k, v, row, column = (x.new_empty(x.shape) for x in inputs[:5])
    return q, k, v, row, column


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.sides, ctx.fused = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    return (*_attend_backward(gradient, *ctx.saved_tensors, ctx.sides, ctx.fused), None, None, None)


_attend.register_autograd(_differentiate, setup_context=_save)


def _blocks(shape: torch.Size, keys: int, device: torch.device) -> Iterator[tuple[slice, int, int]]:
    """Yield the samples, first row and end row of each block."""
    samples, height, width = shape
    budget = BLOCK.get(device.type, BLOCK["cuda"]) // (width * keys)
    rows = min(max(budget - 2, 1), height)  # a block reads one more row above and below
    together = max(budget // (height + 2), 1)
    for first in range(0, samples, together):
        for top in range(0, height, rows):
            yield slice(first, min(first + together, samples)), top, min(top + rows, height)


@cache
def _fused(block: Callable[..., R]) -> Callable[..., R]:
    """Compile the steps of `block` into one: on a GPU, memory access limits their speed.

    If the compiler does not work, for example without a C compiler, `block` runs uncompiled.
    """
    from torch._dynamo.exc import BackendCompilerFailed  # seconds to import

    compiled = torch.compile(block, dynamic=False)

    def run(*inputs: Any) -> R:
        nonlocal compiled
        try:
            return compiled(*inputs)
        except BackendCompilerFailed as error:
            reason = str(error).strip().splitlines()[0]
            warnings.warn(f"attention runs uncompiled, which is slower: {reason}", stacklevel=2)
            compiled = block
            return block(*inputs)

    return run


def _forward_block(
    q: Tensor, k: Tensor, v: Tensor, row: Tensor, column: Tensor, bias: Tensor, sides: list[int]
) -> Tensor:
    """Return the sum that R rows of queries add to R + 2 rows of output; q holds R + 2 rows."""
    _, weights = _weights(q, k, row, column, bias, sides)
    pixels = _spread(weights.to(v.dtype), sides)
    return (pixels.flatten(1, 2) @ v).view(*q.shape[:3], -1)


def _backward_block(
    gradient: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    row: Tensor,
    column: Tensor,
    bias: Tensor,
    sides: list[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of q (R + 2 rows), k, v, row and column from R rows of queries."""
    scores, weights = _weights(q, k, row, column, bias, sides)
    gradient = gradient.flatten(1, 2)
    pixels = _spread(weights.to(v.dtype), sides).flatten(1, 2)
    d_v = pixels.transpose(1, 2) @ gradient
    products = (gradient @ v.transpose(1, 2)).view(*q.shape[:3], -1)
    d_weights = _collect(products, sides)
    d_logits = weights * (d_weights - (weights * d_weights).sum(3, keepdim=True))
    by_score = d_logits * scores
    d_row = (by_score @ column[:, None, :, None])[..., 0]
    d_column = (by_score * row[..., None]).sum((1, 2))
    d_scores = (d_logits * row[..., None] * column[:, None, None]).to(q.dtype)
    d_products = _spread(d_scores, sides).flatten(1, 2)
    d_q = (d_products @ k).view(q.shape)
    d_k = d_products.transpose(1, 2) @ q.flatten(1, 2)
    return d_q, d_k, d_v, d_row, d_column


def _weights(
    q: Tensor, k: Tensor, row: Tensor, column: Tensor, bias: Tensor, sides: list[int]
) -> tuple[Tensor, Tensor]:
    """Return scores S and softmax weights, N R W K in fp32, of all rows of q but the outer two."""
    products = (q.flatten(1, 2) @ k.transpose(1, 2)).view(*q.shape[:3], -1)
    scores = _collect(products, sides)
    logits = scores * row[..., None] * column[:, None, None] + bias[:, None, None]
    return scores, logits.softmax(dim=3)


def _collect(products: Tensor, sides: list[int]) -> Tensor:
    """Sum along the diagonals, 3x3: pixels N R+2 W K -> patches N R W K, in fp32."""
    rows = products.shape[1] - 2
    if torch.compiler.is_compiling():
        return _sum_of_shifts(full(products), rows, sides, 0)
    out = full(products[:, 1:-1]).clone(memory_format=torch.contiguous_format)
    for level, part in zip(_levels(products, sides), _levels(out, sides), strict=True):
        part[:, :, :, :-1] += level[:, 2:, :, 1:]
        part[:, :, :, 1:] += level[:, :-2, :, :-1]
    return _across(out, sides)


def _spread(patches: Tensor, sides: list[int]) -> Tensor:
    """Apply the transpose of `_collect`: N R W K -> N R+2 W K, in the type of `patches`."""
    if torch.compiler.is_compiling():
        rows = patches.shape[1] + 2
        return _sum_of_shifts(full(patches), rows, sides, 2).to(patches.dtype)
    across = _across(full(patches), sides)
    out = F.pad(across, (0, 0, 0, 0, 1, 1))
    for level, part in zip(_levels(across, sides), _levels(out, sides), strict=True):
        part[:, 2:, :, 1:] += level[:, :, :, :-1]
        part[:, :-2, :, :-1] += level[:, :, :, 1:]
    return out.to(patches.dtype)


def _across(x: Tensor, sides: list[int]) -> Tensor:
    """Sum within rows. This map is its own transpose."""
    out = x.clone()
    for level, part in zip(_levels(x, sides), _levels(out, sides), strict=True):
        part[:, :, :-1, :, :-1] += level[:, :, 1:, :, 1:]
        part[:, :, 1:, :, 1:] += level[:, :, :-1, :, :-1]
    return out


def _sum_of_shifts(x: Tensor, rows: int, sides: list[int], above: int) -> Tensor:
    """Compute the same sums as one expression, which the compiler makes into one kernel.

    Args:
        x: N R W K.
        rows: Number of rows of the result.
        sides: h, w of each level of keys in turn.
        above: Rows of zeros to add above and below first.
    """
    width, parts = x.shape[2], []
    for level in _levels(x, sides):
        h, w = level.shape[3:]
        level = F.pad(level, (1, 1, 1, 1, 1, 1, above, above))
        total = torch.zeros((), dtype=x.dtype, device=x.device)
        for a in range(PATCH):
            for b in range(PATCH):
                total = total + level[:, a : a + rows, b : b + width, a : a + h, b : b + w]
        parts.append(total.flatten(3))
    return torch.cat(parts, dim=3)


def _levels(x: Tensor, sides: list[int]) -> list[Tensor]:
    """Return a view N R W h w of each level of keys in N R W K."""
    grids = list(zip(sides[::2], sides[1::2], strict=True))
    parts = torch.split(x, [h * w for h, w in grids], dim=3)
    return [p.view(*x.shape[:3], *grid) for p, grid in zip(parts, grids, strict=True)]


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


_plain = False


def averaged_by(size: Grid) -> int:
    """Return the whole factor to average all maps down by, for a query map of this size."""
    return math.ceil(math.sqrt(size[0] * size[1] / GRID_MAX))


def _averaged(x: Tensor, factor: int) -> Tensor:
    return F.avg_pool2d(x, factor, ceil_mode=True, count_include_pad=False)


def key_layers(kind: Attention, layers: list[int]) -> list[int]:
    """Return the encoder layers (finest first) that serve as keys."""
    return layers if kind == "pyramid" else layers[:1]
