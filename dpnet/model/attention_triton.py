"""Attention on a GPU: the steps of `attention_blocks.py` with a few kernels written by hand.

Queries are taken in blocks, whose scores fit into a workspace. A forward pass makes the products of
pixels, `weigh` turns them into exp(logit), `spread` into weights of pixels, and a product with the
values ends it. A backward pass makes both products, `weigh` sums up what the gradient of softmax
needs, `differentiate` gives weights and gradients of scores, and `spread` those of pixels.

What it costs in bf16 for d = d_v = 128 (an estimate, not measured on a GPU yet). `base` at 256 x
256 has 4,096 queries and 5,376 keys, 22 million scores an image:

* Products: 2 forward and 5 backward, each 5.6 GFLOP, 39 in all: 0.07 ms at 600 TFLOP/s.
* Memory: 12 bytes a score forward (three buffers of 2 bytes, written and read once each) and 30
  backward, 0.9 GB in all: 0.2 ms at 4.8 TB/s. The naive bf16 form moves about 80 bytes a score.
* The other candidate holds scores in registers, as FlashAttention does. There a score is nine
  products of pixels, and the output needs nine sums of d_v numbers a query, which do not fit into
  registers. Making the scores again instead takes more than 60 products: 0.6 ms.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dpnet.model.attention_kernels import differentiate, spread, weigh
from dpnet.model.dtype import full

# Bytes for the buffers of a block. A smaller block takes longer to launch than to compute. Maps
# with more than `LARGE` queries get less, because then the rest of the network needs the memory.
WORKSPACE, WORKSPACE_LARGE = 1 << 28, 1 << 26
LARGE = 64 * 64
# Tiles. Those of `spread` are narrow: a block's width is often a power of 2, and it has two more.
QUERIES, KEYS = 16, 32
WEIGH = {"QUERIES": QUERIES, "KEYS": KEYS, "num_warps": 4}
SPREAD = {"QUERIES": 8, "KEYS": KEYS, "num_warps": 2}
ALIGNED = 8  # padded keys are a multiple of this, as products of matrices like it

Where = tuple[slice, slice, slice]


def forward(
    q: Tensor, k: Tensor, v: Tensor, row: Tensor, column: Tensor, bias: Tensor, sides: list[int]
) -> Tensor:
    """Do what `attention_blocks.forward` does. q, k and v have one type."""
    size = 2 * q.element_size() * _padded_keys(sides) + row.element_size() * _slots(sides)
    blocks = _Blocks.of(row.shape, size)
    q, row = blocks.bordered(q), blocks.bordered(row[..., None])
    k, v, column, bias = _padded(k, sides), v.contiguous(), column.contiguous(), bias.contiguous()
    products = q.new_empty(blocks.together, blocks.pixels, k.shape[1])
    weights = torch.zeros_like(products)
    sums = row.new_zeros(1, blocks.together, _slots(sides), blocks.pixels)
    out = full(v).new_zeros(*q.shape[:3], v.shape[2])
    for n, here, used in blocks:
        p, w, s = (_first(x, n) for x in (products, weights, sums))
        torch.bmm(_flat(q[here]), k[n].transpose(1, 2), out=p)
        factors = _flat(row[here]), column[n], bias[n]
        blocks.run(weigh, sides, p, p, *factors, w, s, **used, GRADIENT=False)
        pixels = blocks.spread(w, s.sum(2), p, sides, shared=True)
        out[here] += (pixels @ v[n]).view(out[here].shape)
    return blocks.inside(out).to(v.dtype, copy=True)


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
    """Do what `attention_blocks.backward` does. q, k and v have one type."""
    size = 4 * q.element_size() * _padded_keys(sides)
    size += row.element_size() * (3 * _slots(sides) + k.shape[1] // QUERIES)
    blocks = _Blocks.of(row.shape, size)
    q, gradient, row = (blocks.bordered(x) for x in (q, gradient.to(v.dtype), row[..., None]))
    k, column, bias = k.contiguous(), column.contiguous(), bias.contiguous()
    k_padded, v_padded = _padded(k, sides), _padded(v, sides)
    products, of_weights = (
        q.new_empty(blocks.together, blocks.pixels, k_padded.shape[1]) for _ in range(2)
    )
    weights, of_scores = torch.zeros_like(products), torch.zeros_like(products)
    sums = row.new_zeros(2, blocks.together, _slots(sides), blocks.pixels)
    of_rows = torch.zeros_like(sums[:1])
    tiles = math.ceil(blocks.columns / QUERIES)
    of_columns = row.new_empty(blocks.together, blocks.rows * tiles, k.shape[1])
    d_q, d_row = (torch.zeros_like(full(x)) for x in (q, row))
    d_k, d_v = (torch.zeros_like(full(x), memory_format=torch.contiguous_format) for x in (k, v))
    d_column = torch.zeros_like(column)
    for n, here, used in blocks:
        p, g, w, d = (_first(x, n) for x in (products, of_weights, weights, of_scores))
        s, r, c = (_first(x, n) for x in (sums, of_rows, of_columns))
        q_here, g_here = _flat(q[here]), _flat(gradient[here])
        torch.bmm(q_here, k_padded[n].transpose(1, 2), out=p)
        torch.bmm(g_here, v_padded[n].transpose(1, 2), out=g)
        factors = _flat(row[here]), column[n], bias[n]
        blocks.run(weigh, sides, p, g, *factors, w, s, **used, GRADIENT=True)
        totals = s.sum(2)
        written = w, d, r, c
        blocks.run(differentiate, sides, p, g, *factors, totals, *written, across=tiles)
        pixels = blocks.spread(w, totals, p, sides, shared=False)
        d_v[n] += pixels.transpose(1, 2) @ g_here
        pixels = blocks.spread(d, totals, g, sides, shared=False)
        d_k[n] += pixels.transpose(1, 2) @ q_here
        d_q[here] += (pixels @ k[n]).view(d_q[here].shape)
        d_row[here] += r.sum((0, 2)).view(d_row[here].shape)
        d_column[n] += c.sum(1)
    d_q, d_row = blocks.inside(d_q).to(q.dtype, copy=True), blocks.inside(d_row)[..., 0].clone()
    return d_q, d_k.to(k.dtype), d_v.to(v.dtype), d_row, d_column


@dataclass(frozen=True)
class _Blocks:
    """The blocks of queries of a batch, all of one size, so that they can share their buffers.

    A border of one pixel is around each block. The last ones may be partly outside the map.

    Attributes:
        shape: N H W of the queries.
        rows, columns: Queries of a block.
        together: Samples of a block.
    """

    shape: tuple[int, int, int]
    rows: int
    columns: int
    together: int

    @classmethod
    def of(cls, shape: torch.Size, size: int) -> _Blocks:
        """Plan blocks that are as large, and as square, as `size` bytes a pixel allow."""
        samples, height, width = shape
        workspace = WORKSPACE_LARGE if height * width > LARGE else WORKSPACE
        pixels = workspace // size
        columns = _even(width, math.isqrt(pixels) - 2)
        rows = _even(height, pixels // (columns + 2) - 2)
        together = min(max(pixels // ((rows + 2) * (columns + 2)), 1), samples)
        return cls((samples, height, width), rows, columns, together)

    @property
    def width(self) -> int:
        return self.columns + 2

    @property
    def pixels(self) -> int:
        return (self.rows + 2) * self.width

    def __iter__(self) -> Iterator[tuple[slice, Where, dict[str, int]]]:
        """Yield samples, place in a bordered map, and rows and columns to the map's end."""
        samples, height, width = self.shape
        for first in range(0, samples, self.together):
            n = slice(first, min(first + self.together, samples))
            for top in range(0, height, self.rows):
                for left in range(0, width, self.columns):
                    down, right = slice(top, top + self.rows + 2), slice(left, left + self.width)
                    used = {"rows_used": height - top, "columns_used": width - left}
                    yield n, (n, down, right), used

    def bordered(self, x: Tensor) -> Tensor:
        """Put zeros around N H W C: one on each side, and what the last blocks lack."""
        _, height, width = self.shape
        right, below = 1 + -width % self.columns, 1 + -height % self.rows
        return F.pad(x.contiguous(), (0, 0, 1, right, 1, below))

    def inside(self, x: Tensor) -> Tensor:
        """Undo `bordered`."""
        _, height, width = self.shape
        return x[:, 1 : 1 + height, 1 : 1 + width]

    def run(self, kernel: Any, sides: list[int], *tensors: Tensor, **numbers: Any) -> None:
        """Run `weigh` or `differentiate`; the first tensor has the padded scores."""
        samples, pixels, padded = tensors[0].shape
        tasks = _tasks(tuple(sides), self.rows, self.columns, 1, QUERIES, tensors[0].device)
        numbers |= {"pixels": pixels, "width": self.width, "padded": padded}
        numbers |= {"keys": _keys(sides), "slots": _slots(sides)}
        with _on(tensors[0]):
            kernel[(len(tasks), samples)](*tensors, tasks, **numbers, **WEIGH)

    def spread(
        self, patches: Tensor, totals: Tensor, memory: Tensor, sides: list[int], *, shared: bool
    ) -> Tensor:
        """Run `spread` and return its result, N pixels K, which takes the place of `memory`."""
        samples, pixels, padded = patches.shape
        shape = samples, pixels, _keys(sides)
        out = memory.view(-1)[: math.prod(shape)].view(shape)
        tasks = _tasks(tuple(sides), self.rows, self.columns, 0, SPREAD["QUERIES"], patches.device)
        numbers = {"pixels": pixels, "width": self.width, "padded": padded, "keys": shape[2]}
        with _on(patches):
            spread[(len(tasks), samples)](
                patches, totals, out, tasks, **numbers, SHARED=shared, **SPREAD
            )
        return out


@lru_cache(maxsize=64)
def _tasks(
    sides: tuple[int, ...], rows: int, columns: int, border: int, queries: int, device: torch.device
) -> Tensor:
    """Return the table of tasks of a block of rows x columns queries, the longest walks first.

    Args:
        sides: h, w of each level of keys in turn.
        rows: Rows of queries, without the border.
        columns: Columns of queries, without the border.
        border: 1 for kernels that write queries only, 0 for those that write the border too.
        queries: Columns of queries in a tile.
        device: Where the table should be.
    """
    tasks = []
    padded, first_key, first_slot = 1, 0, 0
    for h, w in zip(sides[::2], sides[1::2], strict=True):
        slots = math.ceil(w / KEYS)
        for shift in range(-rows - 1, h):
            first, last = max(0, -shift), min(rows + 1, h - 1 - shift)
            if max(first, border) > min(last, rows + 1 - border):
                continue
            for x in range(border, columns + 2 - border, queries):
                for slot in range(slots):
                    at = padded, first_key, first_slot + slot, slots
                    tasks.append((shift, first, last, x, slot * KEYS, w, *at))
        padded, first_key, first_slot = (
            padded + h * (w + 1),
            first_key + h * w,
            first_slot + h * slots,
        )
    tasks.sort(key=lambda task: task[1] - task[2])
    return torch.tensor(tasks, dtype=torch.int32, device=device)


def _padded(x: Tensor, sides: list[int]) -> Tensor:
    """Put an empty key before and after each row of keys of N K C, and some at the end."""
    out = x.new_zeros(x.shape[0], _padded_keys(sides), x.shape[2])
    to, start = 1, 0
    for h, w in zip(sides[::2], sides[1::2], strict=True):
        rows = out[:, to : to + h * (w + 1)].view(x.shape[0], h, w + 1, x.shape[2])
        rows[:, :, :w] = x[:, start : start + h * w].view(x.shape[0], h, w, x.shape[2])
        to, start = to + h * (w + 1), start + h * w
    return out


def _keys(sides: list[int]) -> int:
    return sum(h * w for h, w in zip(sides[::2], sides[1::2], strict=True))


def _padded_keys(sides: list[int]) -> int:
    keys = 1 + sum(h * (w + 1) for h, w in zip(sides[::2], sides[1::2], strict=True))
    return keys + -keys % ALIGNED


def _slots(sides: list[int]) -> int:
    """Return the number of partial sums of a query: one for each tile of each row of keys."""
    return sum(h * math.ceil(w / KEYS) for h, w in zip(sides[::2], sides[1::2], strict=True))


def _even(length: int, most: int) -> int:
    """Return the size of parts of `length` that are about equal and at most `most` (at least 1)."""
    return math.ceil(length / math.ceil(length / max(most, 1)))


def _first(x: Tensor, samples: slice) -> Tensor:
    """Return the start of the buffer `x` as one of fewer samples, dimension 0 of 3 or 1 of 4."""
    axis = 1 if x.dim() == 4 else 0
    shape = [*x.shape]
    shape[axis] = samples.stop - samples.start
    return x.view(-1)[: math.prod(shape)].view(shape)


def _flat(x: Tensor) -> Tensor:
    """Make N H W C to N HW C."""
    return x.reshape(x.shape[0], -1, x.shape[3])


def _on(x: Tensor) -> AbstractContextManager[Any]:
    """Let kernels run on the device of `x`."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()
