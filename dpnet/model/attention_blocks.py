"""Attention in blocks of rows of queries, by torch's own operations.

This form runs everywhere. On a GPU `attention_triton.py` does the same with fewer passes through
memory, and its first use is checked against this form.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from dpnet.model.dtype import full

# Scores in one block. On a CPU they should fit into its caches; a GPU needs many to be busy.
BLOCK = {"cpu": 1 << 22, "cuda": 1 << 26}


def forward(
    q: Tensor, k: Tensor, v: Tensor, row: Tensor, column: Tensor, bias: Tensor, sides: list[int]
) -> Tensor:
    """Compute the weighted value patches and sum them where they overlap.

    Args:
        q: N H W D.
        k: N K D.
        v: N K E.
        row: N H W, the factor of a query; the logits are S row column + bias.
        column: N K, the factor of a key.
        bias: N K, the offset of a key.
        sides: h, w of each level of keys in turn.

    Returns:
        N H W E in the type of `v`.
    """
    q = F.pad(q, (0, 0, 0, 0, 1, 1))  # a row of zeros above and below
    out = full(v).new_zeros(*q.shape[:3], v.shape[2])
    for n, top, end in _blocks(row.shape, k.shape[1], q.device):
        here = slice(top, end + 2)
        block = q[n, here], k[n], v[n], row[n, top:end], column[n], bias[n]
        out[n, here] += _forward_block(*block, sides)
    return out[:, 1:-1].to(v.dtype, copy=True)


def backward(
    gradient: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    row: Tensor,
    column: Tensor,
    bias: Tensor,
    sides: list[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of q, k, v, row and column. Blocks are computed again, one by one.

    `gradient` is N H W E; the other arguments are those of `forward`.
    """
    kind = q.dtype
    q, gradient = (F.pad(x, (0, 0, 0, 0, 1, 1)) for x in (q, gradient.to(v.dtype)))
    d_q, d_k, d_v = (
        torch.zeros_like(full(x), memory_format=torch.contiguous_format) for x in (q, k, v)
    )
    d_row, d_column = torch.zeros_like(row), torch.zeros_like(column)
    for n, top, end in _blocks(row.shape, k.shape[1], q.device):
        here = slice(top, end + 2)
        block = q[n, here], k[n], v[n], row[n, top:end], column[n], bias[n]
        of_q, of_k, of_v, of_row, of_column = _backward_block(gradient[n, here], *block, sides)
        d_q[n, here] += of_q
        d_k[n] += of_k
        d_v[n] += of_v
        d_row[n, top:end] = of_row
        d_column[n] += of_column
    d_q = d_q[:, 1:-1].to(kind, copy=True)
    return d_q, d_k.to(k.dtype), d_v.to(v.dtype), d_row, d_column


def _blocks(shape: torch.Size, keys: int, device: torch.device) -> Iterator[tuple[slice, int, int]]:
    """Yield the samples, first row and end row of each block."""
    samples, height, width = shape
    budget = BLOCK.get(device.type, BLOCK["cuda"]) // (width * keys)
    rows = min(max(budget - 2, 1), height)  # a block reads one more row above and below
    together = max(budget // (height + 2), 1)
    for first in range(0, samples, together):
        for top in range(0, height, rows):
            yield slice(first, min(first + together, samples)), top, min(top + rows, height)


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
    out = full(products[:, 1:-1]).clone(memory_format=torch.contiguous_format)
    for level, part in zip(_levels(products, sides), _levels(out, sides), strict=True):
        part[:, :, :, :-1] += level[:, 2:, :, 1:]
        part[:, :, :, 1:] += level[:, :-2, :, :-1]
    return _across(out, sides)


def _spread(patches: Tensor, sides: list[int]) -> Tensor:
    """Apply the transpose of `_collect`: N R W K -> N R+2 W K, in the type of `patches`."""
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


def _levels(x: Tensor, sides: list[int]) -> list[Tensor]:
    """Return a view N R W h w of each level of keys in N R W K."""
    grids = list(zip(sides[::2], sides[1::2], strict=True))
    parts = torch.split(x, [h * w for h, w in grids], dim=3)
    return [p.view(*x.shape[:3], *grid) for p, grid in zip(parts, grids, strict=True)]
