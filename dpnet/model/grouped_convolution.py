"""Convolutions in groups, and other forms with the same result for GPUs.

Kernels for groups of few channels are slow on a GPU. So the same sums are computed in other forms:

* fewer groups: several groups become one, with zeros between them. With one group left it is a
  dense convolution. The products grow as the groups shrink.
* blocks of R rows and B columns (block-Toeplitz): the pixels of a block become channels, and a
  convolution in the same groups computes all outputs of a block at once. Along a side of length k
  it makes (2 ceil(r / (s B)) + 1) s B / k times the useful products, with r = k // 2 and stride s.

For columns alone, an input block has s B columns, X[c s B + j, u] = x[c, s B u + j]. Let
L = ceil(r / (s B)). The output block u reads the input blocks u + b - L for b from 0 to 2 L:

    Y[o B + p, u] = sum of W[o B + p, i s B + j, b] X[i s B + j, u + b - L] = y[o, B u + p]
    W[o B + p, i s B + j, b] = w[o, i, s B (b - L) + j - s p + r] if that index is in range, else 0

So the stride along a side in blocks becomes 1. Rows are the same. A block of 1 leaves its side as
it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from math import gcd
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Blocks = tuple[int, int]  # rows and columns of the output in a block
Form = Literal["groups"] | int | Blocks  # as it is, the number of groups left, or blocks
DENSE = 1

# The form of each kernel's side on a GPU in half precision. benchmarks/convolutions.py compares
# the forms and names the fastest.
ON_GPU: Mapping[int, Form] = {5: DENSE, 7: DENSE, 9: DENSE}

_everywhere: Mapping[int, Form] = {}  # by `convolve_as`


@contextmanager
def convolve_as(forms: Mapping[int, Form]) -> Iterator[None]:
    """Compute kernels of these sides in these forms everywhere while in the block."""
    global _everywhere
    before, _everywhere = _everywhere, forms
    try:
        yield
    finally:
        _everywhere = before


def choose_form(x: Tensor, conv: nn.Conv2d) -> Form:
    """Return the form in which to apply `conv` to `x`."""
    kernel = conv.kernel_size[0]
    if conv.groups == 1:
        return "groups"
    if kernel in _everywhere:
        return _everywhere[kernel]
    if x.is_cuda and torch.is_autocast_enabled("cuda"):
        return ON_GPU.get(kernel, DENSE)
    return "groups"


def convolve_all(x: Tensor, convs: Iterable[nn.Conv2d]) -> list[Tensor]:
    """Apply convolutions without bias to the same NCHW, each in the form for it.

    All have the same stride, odd square kernels and a padding of half of the kernel.
    """
    moved: dict[Blocks, Tensor] = {}  # kernels with the same blocks share one moved input
    outputs = []
    for conv in convs:
        form, stride = choose_form(x, conv), conv.stride[0]
        if form == "groups":
            outputs.append(conv(x))
        elif isinstance(form, int):
            weight, left = join_groups(conv.weight, conv.groups, form), gcd(form, conv.groups)
            outputs.append(F.conv2d(x, weight, None, conv.stride, conv.padding, groups=left))
        else:
            if form not in moved:
                moved[form] = move_in(x, _inputs(form, stride))
            height, width = (-(-side // stride) for side in x.shape[2:])
            y = convolve_blocks(moved[form], conv.weight, stride, conv.groups, form)
            outputs.append(move_out(y, form)[:, :, :height, :width])
    return outputs


def join_groups(weight: Tensor, groups: int, left: int) -> Tensor:
    """Convert a weight with `groups`, O (I / groups) k k, to one with fewer, O (I / left) k k.

    If `left` does not divide `groups`, their greatest common divisor is left.
    """
    joined = groups // gcd(left, groups)
    if joined == 1:
        return weight
    weight = torch.unflatten(weight, 0, (-1, joined, weight.shape[0] // groups))
    # left joined O/groups I/groups k k to left joined O/groups joined I/groups k k
    return torch.diag_embed(weight.movedim(1, -1), dim1=1, dim2=3).flatten(3, 4).flatten(0, 2)


def convolve_blocks(
    moved: Tensor, weight: Tensor, stride: int, groups: int, blocks: Blocks
) -> Tensor:
    """Convolve an input whose blocks are channels. The result's blocks are channels too.

    Args:
        moved: The input as `move_in` returns it, for blocks of `stride` times the size.
        weight: O (I / groups) k k.
        stride: Stride of the convolution before the move.
        groups: Groups of the convolution, before and after the move.
        blocks: Rows and columns of the output in a block.
    """
    of_blocks = toeplitz(weight, stride, blocks)
    strides = [stride if block == 1 else 1 for block in blocks]
    padding = [side // 2 for side in of_blocks.shape[2:]]
    return F.conv2d(moved, of_blocks, None, strides, padding, groups=groups)


def move_in(x: Tensor, blocks: Blocks) -> Tensor:
    """Move blocks of pixels into channels: N C H W to N (C R B) ceil(H / R) ceil(W / B).

    Missing pixels are 0. The result is channels_last.
    """
    rows, columns = blocks
    x = F.pad(x, (0, -x.shape[3] % columns, 0, -x.shape[2] % rows))
    x = torch.unflatten(x.permute(0, 2, 3, 1), 2, (-1, columns))
    x = torch.unflatten(x, 1, (-1, rows))
    # N H/R R W/B B C to N H/R W/B C R B
    return x.permute(0, 1, 3, 5, 2, 4).flatten(3).permute(0, 3, 1, 2)


def move_out(y: Tensor, blocks: Blocks) -> Tensor:
    """Undo `move_in`: N (C R B) h w to N C (h R) (w B). The result is channels_last."""
    rows, columns = blocks
    y = torch.unflatten(y.permute(0, 2, 3, 1), 3, (-1, rows, columns))
    # N h w C R B to N h R w B C
    return y.permute(0, 1, 4, 2, 5, 3).flatten(3, 4).flatten(1, 2).permute(0, 3, 1, 2)


def toeplitz(weight: Tensor, stride: int, blocks: Blocks) -> Tensor:
    """Convert O I k k to the weight of blocks, (O R B) (I R' B') h w. The result is channels_last.

    R' and B' are the sides of the input's blocks. A side with blocks of 1 keeps its kernel.
    """
    rows, columns = blocks
    into_rows, into_columns = _inputs(blocks, stride)
    weight = _shifted(weight, stride, columns)  # O I k B (w B')
    weight = _shifted(weight.movedim(2, -1), stride, rows)  # O I B (w B') R (h R')
    weight = torch.unflatten(weight, 5, (-1, into_rows))
    weight = torch.unflatten(weight, 3, (-1, into_columns))
    # O I B w B' R h R' to O R B h w I R' B'
    return weight.permute(0, 5, 2, 6, 3, 1, 7, 4).flatten(5).flatten(0, 2).permute(0, 3, 1, 2)


def _inputs(blocks: Blocks, stride: int) -> Blocks:
    """Return the sides of the input's blocks. A side with blocks of 1 keeps its stride."""
    rows, columns = (1 if block == 1 else stride * block for block in blocks)
    return rows, columns


def _shifted(weight: Tensor, stride: int, block: int) -> Tensor:
    """Return the kernel of each output of a block: ... k to ... block ((2 L + 1) stride block).

    Output p has the kernel shifted by `stride` p. With a block of 1 there is one output, with the
    kernel as it is.
    """
    kernel = weight.shape[-1]
    if block == 1:
        return weight.unsqueeze(-2)
    reach = -(-(kernel // 2) // (stride * block))
    before = stride * block * reach - kernel // 2
    length = (2 * reach + 1) * stride * block
    # Copies of length + stride, one after the other and cut into rows of length: each row begins
    # `stride` earlier in its copy than the row before. Without an index, whose gradient has no
    # fixed order of sums on a GPU.
    copy = F.pad(weight, (before, length + stride - before - kernel))
    copies = copy.unsqueeze(-2).expand(*copy.shape[:-1], block, -1).flatten(-2)
    return torch.unflatten(copies[..., : block * length], -1, (block, length))
