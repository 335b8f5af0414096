"""Pyramidal attention in its plainest form: patches are cut out, the score matrix is whole.

This is the definition, which the fast form in `attention.py` is tested against, and the form that
exported graphs hold: it asks for no size as a number, so a graph traced at one size serves all.
Memory grows with queries x keys, so it is for images of up to about 512 x 512 pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from dpnet.model.dtype import full

PATCH = 3  # side
KNOWN_MIN = 0.05  # keys whose patch has less known share are excluded
SHARPNESS = 10.0
REFERENCE_KEYS = 5376  # 64^2 + 32^2 + 16^2: the keys at 256^2, where the sharpness is 10
NORM_MIN = 1e-6  # of a patch, so that an empty one is not divided by 0
OFFSETS = [(down, right) for down in (-1, 0, 1) for right in (-1, 0, 1)]  # the cells of a patch
FINEST = 4  # input pixels along a cell of the finest keys; each further layer has twice as many


def plain_attend(
    query: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], shares: Sequence[Tensor]
) -> Tensor:
    """Attention of the 3x3 patches of one map over those of several others.

    Args:
        query: N D H W. keys: maps N D h w. values: maps N E h w of the same sizes.
        shares: N 1 h w, the known share c_j of the patch around each key, in [0, 1].

    Returns:
        N E H W, the weighted value patches pasted back, overlaps averaged; 0 in a sample in which
        no key has a share of 0.05. With q and k the patches divided by their norms, the logits
        are s q.k + log c_j in fp32, s = 10 log K / log 5376 for K keys.
    """
    q = _unit(_patches(query))
    k = _unit(torch.cat([_patches(key) for key in keys], dim=1))
    v = torch.cat([_patches(value) for value in values], dim=1)
    share = torch.cat([full(c).flatten(1) for c in shares], dim=1)
    usable = share >= KNOWN_MIN
    some = usable.any(dim=1)
    bias = torch.where(usable, share.clamp(min=KNOWN_MIN).log(), float("-inf"))
    # A sample without keys would be softmax over -inf, which is NaN, also in the gradient.
    bias = torch.where(some[:, None], bias, 0.0)
    logits = full(q @ k.transpose(1, 2)) * sharpness(share) + bias[:, None, :]
    pasted = _paste(logits.softmax(dim=2).to(v.dtype) @ v, query)
    return torch.where(some[:, None, None, None], pasted, 0.0)


def plain_shares(valid: Tensor, layers: int) -> list[Tensor]:
    """Known share of the input mask under each 3x3 patch at 1/4, 1/8, 1/16: N 1 h w each.

    `valid` is N1HW, with sides that are multiples of 16.
    """
    cells = F.avg_pool2d(full(valid), FINEST)
    shares = []
    for layer in range(layers):
        cells = F.avg_pool2d(cells, 2) if layer else cells
        shares.append(F.avg_pool2d(cells, PATCH, 1, PATCH // 2, count_include_pad=False))
    return shares


def sharpness(per_key: Tensor) -> Tensor:
    """s for as many keys as the N K tensor has, a scalar."""
    # Counted by a tensor, so that an exported graph counts the keys that it is given.
    count = torch.ones_like(per_key[0]).sum()
    return SHARPNESS / math.log(REFERENCE_KEYS) * count.log()


def _patches(x: Tensor) -> Tensor:
    """The 3x3 patches around every pixel of an NCHW map, zeros outside: N(HW)(9C)."""
    padded = F.pad(x, (1, 1, 1, 1))
    return torch.cat([_at(padded, *to) for to in OFFSETS], dim=1).flatten(2).transpose(1, 2)


def _paste(patches: Tensor, like: Tensor) -> Tensor:
    """Put N(HW)(9C) patches back onto an NCHW map of the size of `like`; overlaps are averaged."""
    # Shifted sums, because ONNX has no fold: a patch's cell belongs to the pixel at its offset.
    n, _, height, width = like.shape
    cells = F.pad(patches.transpose(1, 2).reshape(n, -1, height, width), (1, 1, 1, 1))
    ones = F.pad(torch.ones_like(like[:1, :1]), (1, 1, 1, 1))
    total, count = torch.zeros_like(like[:1, :1]), torch.zeros_like(like[:1, :1])
    for cell, (down, right) in zip(cells.chunk(len(OFFSETS), dim=1), OFFSETS, strict=True):
        total = total + _at(cell, -down, -right)
        count = count + _at(ones, -down, -right)
    return total / count


def _at(padded: Tensor, down: int, right: int) -> Tensor:
    """The map that was padded by 1, of which pixel (y, x) is now that at (y + down, x + right)."""
    height, width = padded.shape[2] - 2, padded.shape[3] - 2
    return padded.narrow(2, 1 + down, height).narrow(3, 1 + right, width)


def _unit(patches: Tensor) -> Tensor:
    norm = full(patches).square().sum(dim=2, keepdim=True).clamp(min=NORM_MIN**2).sqrt()
    return patches / norm.to(patches.dtype)
