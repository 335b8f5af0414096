"""Pyramidal attention: patches of the decoder ask, patches of three encoder layers answer.

The paper takes finer patches "directly from learned layers", so that a pyramid of layers is what a
non-local pixel can draw from. The definition (patches of 3x3, cosine logits, log known share as an
additive term, sharpness that grows with the number of keys) is our choice; `plain_attention.py`
states it in the plainest form.

Here no patch is ever cut out. The product of two patches is the sum of nine products of pixels,

    S(y, x; v, u) = sum over a, b in {-1, 0, 1} of P(y + a, x + b; v + a, u + b),  P = q . k,

so the scores are a 3x3 sum along the diagonals of the pixels' products, which takes a ninth of the
multiplications. Pasting weighted value patches back is the same sum over the weights, followed by
one product with the values' pixels. Rows of queries are worked on in blocks, again in the backward
pass, so that the whole score matrix never exists.
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

GRID_MAX = 128 * 128  # queries; larger maps are averaged down first, with all their keys
# Scores of one block. A CPU's should stay in its caches, a GPU wants to be filled.
BLOCK = {"cpu": 1 << 22, "cuda": 1 << 26}

Grid = tuple[int, int]
R = TypeVar("R")


def attend(
    query: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], shares: Sequence[Tensor]
) -> Tensor:
    """What `plain_attend` gives of the same arguments, worked out as this module's head says."""
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
        # Images of all sizes would compile again and again; in training shapes stay as they are.
        query.is_cuda and torch.is_grad_enabled(),
    )
    out = out.permute(0, 3, 1, 2) / overlaps((height, width), out)
    return torch.where(some.view(n, 1, 1, 1), out, 0.0)


def key_terms(keys: Sequence[Tensor], shares: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """What a key's logits are multiplied with and what is added, N K each; N: has it any key?"""
    share = torch.cat([full(c).flatten(1) for c in shares], dim=1)
    usable = share >= KNOWN_MIN
    some = usable.any(dim=1)
    bias = torch.where(usable, share.clamp(min=KNOWN_MIN).log(), float("-inf"))
    # A sample without keys would be softmax over -inf, which is NaN, also in the gradient.
    bias = torch.where(some[:, None], bias, 0.0)
    column = torch.cat([inverse_norms(k).flatten(1) for k in keys], dim=1)
    return column * sharpness(column), bias, some


def inverse_norms(x: Tensor) -> Tensor:
    """1 / the norm of the 3x3 patch around each pixel of an NCHW map: N1HW in fp32."""
    squared = full(x).square().sum(dim=1, keepdim=True)
    total = PATCH**2 * F.avg_pool2d(squared, PATCH, 1, PATCH // 2, count_include_pad=True)
    return total.clamp(min=NORM_MIN**2).rsqrt()


def overlaps(size: Grid, like: Tensor) -> Tensor:
    """How many 3x3 patches of a map of `size` cover each pixel: 11HW."""
    ones = torch.ones((1, 1, *size), dtype=like.dtype, device=like.device)
    return PATCH**2 * F.avg_pool2d(ones, PATCH, 1, PATCH // 2, count_include_pad=True)


def known_share(valid: Tensor, size: Grid) -> Tensor:
    """Share of known input pixels under each 3x3 patch of a map of `size`: N1HW.

    `valid` is the input mask V0; its size is a multiple of `size`.
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
    """The weighted value patches, summed where they overlap: N H W E in v's type.

    q: N H W D; k: N K D; v: N K E; row: N H W, column and bias: N K, so that the logits are
    S row column + bias; `sides`: h, w of each level of keys in turn. An operator of its own, so
    that `torch.compile` keeps the loop over blocks out of its graph.
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
    """The gradients of q, k, v, row and column, worked out again block by block."""
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
    """Samples and rows (first, end) that are worked on at once."""
    samples, height, width = shape
    budget = BLOCK.get(device.type, BLOCK["cuda"]) // (width * keys)
    rows = min(max(budget - 2, 1), height)  # a block reads one row more above and below
    together = max(budget // (height + 2), 1)
    for first in range(0, samples, together):
        for top in range(0, height, rows):
            yield slice(first, min(first + together, samples)), top, min(top + rows, height)


@cache
def _fused(block: Callable[..., R]) -> Callable[..., R]:
    """`block` with its steps compiled into one another: on a GPU they are bound by memory.

    Where the compiler does not work (no C compiler, say) it is `block` itself.
    """
    from torch._dynamo.exc import BackendCompilerFailed  # seconds to import

    compiled = torch.compile(block, dynamic=False)

    def run(*inputs: Any) -> R:
        nonlocal compiled
        try:
            return compiled(*inputs)
        except BackendCompilerFailed as error:
            reason = str(error).strip().splitlines()[0]
            warnings.warn(f"attention is not fused, which is slower: {reason}", stacklevel=2)
            compiled = block
            return block(*inputs)

    return run


def _forward_block(
    q: Tensor, k: Tensor, v: Tensor, row: Tensor, column: Tensor, bias: Tensor, sides: list[int]
) -> Tensor:
    """What R rows of queries add to R + 2 rows of the output; q holds R + 2 rows."""
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
    """Gradients of q (R + 2 rows), k, v, row and column by R rows of queries."""
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
    """Scores S and softmax weights, N R W K in fp32, of the R rows between q's first and last."""
    products = (q.flatten(1, 2) @ k.transpose(1, 2)).view(*q.shape[:3], -1)
    scores = _collect(products, sides)
    logits = scores * row[..., None] * column[:, None, None] + bias[:, None, None]
    return scores, logits.softmax(dim=3)


def _collect(products: Tensor, sides: list[int]) -> Tensor:
    """3x3 sums along the diagonals: N R+2 W K of pixels -> N R W K of patches, in fp32."""
    rows = products.shape[1] - 2
    if torch.compiler.is_compiling():
        return _sum_of_shifts(full(products), rows, sides, 0)
    out = full(products[:, 1:-1]).clone(memory_format=torch.contiguous_format)
    for level, part in zip(_levels(products, sides), _levels(out, sides), strict=True):
        part[:, :, :, :-1] += level[:, 2:, :, 1:]
        part[:, :, :, 1:] += level[:, :-2, :, :-1]
    return _across(out, sides)


def _spread(patches: Tensor, sides: list[int]) -> Tensor:
    """The transpose of `_collect`: N R W K -> N R+2 W K, in the type that it is given."""
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
    """The sums' part within rows; it is its own transpose."""
    out = x.clone()
    for level, part in zip(_levels(x, sides), _levels(out, sides), strict=True):
        part[:, :, :-1, :, :-1] += level[:, :, 1:, :, 1:]
        part[:, :, 1:, :, 1:] += level[:, :, :-1, :, :-1]
    return out


def _sum_of_shifts(x: Tensor, rows: int, sides: list[int], above: int) -> Tensor:
    """The same sums as one expression, which a compiler makes one kernel of.

    `above`: rows of zeros that are put above and below first.
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
    """Views N R W h w of the keys' grids in N R W K."""
    grids = list(zip(sides[::2], sides[1::2], strict=True))
    parts = torch.split(x, [h * w for h, w in grids], dim=3)
    return [p.view(*x.shape[:3], *grid) for p, grid in zip(parts, grids, strict=True)]


def _flat(maps: Sequence[Tensor]) -> Tensor:
    """N C h w maps, one after the other, as N K C."""
    return torch.cat([x.flatten(2) for x in maps], dim=2).transpose(1, 2)


class PyramidAttention(nn.Module):
    """Residual attention at one decoder resolution.

    `forward` takes the decoder's feature NCHW, the encoder's layers (the first at the same
    resolution, the others coarser) and the input mask V0. Maps of more than 128 x 128 queries are
    averaged down by a whole factor before they attend, and what they get is interpolated: our
    choice, so that time and memory stay bounded on large images.
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
    """Within it, networks attend by the plain form: for comparison, and for exported graphs."""
    global _plain
    before, _plain = _plain, True
    try:
        yield
    finally:
        _plain = before


_plain = False


def averaged_by(size: Grid) -> int:
    """The whole factor that all maps are averaged down by where the queries' has this size."""
    return math.ceil(math.sqrt(size[0] * size[1] / GRID_MAX))


def _averaged(x: Tensor, factor: int) -> Tensor:
    return F.avg_pool2d(x, factor, ceil_mode=True, count_include_pad=False)


def key_layers(kind: Attention, layers: list[int]) -> list[int]:
    """Which of the encoder's layers (finest first) serve as keys."""
    return layers if kind == "pyramid" else layers[:1]
