"""Pyramidal attention in its simplest form, with patches cut out and the whole score matrix.

This is the definition. Tests compare the fast form in `attention.py` with it. Exported graphs use
it too: it never reads a size as a number, so a graph traced at one size works for all sizes. Memory
grows with queries x keys, so it is for images of up to about 512 x 512 pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from dpnet.model.dtype import full

PATCH = 3  # side
KNOWN_MIN = 0.05  # keys with a smaller known share are excluded
SHARPNESS = 10.0
REFERENCE_KEYS = 5376  # 64^2 + 32^2 + 16^2 keys of a 256^2 image, for which sharpness is 10
NORM_MIN = 1e-6  # smallest norm of a patch, so that an empty one is not divided by 0
OFFSETS = [(down, right) for down in (-1, 0, 1) for right in (-1, 0, 1)]  # the cells of a patch
FINEST = 4  # side of a cell of the finest keys in input pixels; it doubles with each layer


def plain_attend(
    query: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], shares: Sequence[Tensor]
) -> Tensor:
    """Attend with the 3x3 patches of one map to those of several other maps.

    With q and k the patches divided by their norms, the logits are s q.k + log c_j in fp32, with
    s = 10 log K / log 5376 for K keys.

    Args:
        query: N D H W.
        keys: Maps N D h w.
        values: Maps N E h w of the same sizes.
        shares: N 1 h w, the known share c_j of the patch around each key, in [0, 1].

    Returns:
        N E H W: the weighted value patches, pasted back and averaged where they overlap. A sample
        without a key of share 0.05 or more is 0.
    """
    q = _unit(_patches(query))
    k = _unit(torch.cat([_patches(key) for key in keys], dim=1))
    v = torch.cat([_patches(value) for value in values], dim=1)
    share = torch.cat([full(c).flatten(1) for c in shares], dim=1)
    usable = share >= KNOWN_MIN
    some = usable.any(dim=1)
    bias = torch.where(usable, share.clamp(min=KNOWN_MIN).log(), float("-inf"))
    # Without any key, softmax over -inf would give NaN, also in the gradient.
    bias = torch.where(some[:, None], bias, 0.0)
    logits = full(q @ k.transpose(1, 2)) * sharpness(share) + bias[:, None, :]
    pasted = _paste(logits.softmax(dim=2).to(v.dtype) @ v, query)
    return torch.where(some[:, None, None, None], pasted, 0.0)


def plain_shares(valid: Tensor, layers: int) -> list[Tensor]:
    """Return the known share under each 3x3 patch at 1/4, 1/8, 1/16, as N 1 h w each.

    Args:
        valid: The input mask N1HW, with sides that are multiples of 16.
        layers: Number of resolutions.
    """
    cells = F.avg_pool2d(full(valid), FINEST)
    shares = []
    for layer in range(layers):
        cells = F.avg_pool2d(cells, 2) if layer else cells
        shares.append(F.avg_pool2d(cells, PATCH, 1, PATCH // 2, count_include_pad=False))
    return shares


def sharpness(per_key: Tensor) -> Tensor:
    """Return the sharpness s, a scalar, for the number of keys K of an N K tensor."""
    # Counted with a tensor, so that an exported graph counts the keys of its own input.
    count = torch.ones_like(per_key[0]).sum()
    return SHARPNESS / math.log(REFERENCE_KEYS) * count.log()


def _patches(x: Tensor) -> Tensor:
    """Return the 3x3 patches around every pixel of an NCHW map, zeros outside, as N(HW)(9C)."""
    padded = F.pad(x, (1, 1, 1, 1))
    return torch.cat([_at(padded, *to) for to in OFFSETS], dim=1).flatten(2).transpose(1, 2)


def _paste(patches: Tensor, like: Tensor) -> Tensor:
    """Paste N(HW)(9C) patches onto an NCHW map of the size of `like`, and average overlaps."""
    # Shifted sums, because ONNX has no fold. Each cell of a patch belongs to the pixel at its
    # offset.
    n, _, height, width = like.shape
    cells = F.pad(patches.transpose(1, 2).reshape(n, -1, height, width), (1, 1, 1, 1))
    ones = F.pad(torch.ones_like(like[:1, :1]), (1, 1, 1, 1))
    total, count = torch.zeros_like(like[:1, :1]), torch.zeros_like(like[:1, :1])
    for cell, (down, right) in zip(cells.chunk(len(OFFSETS), dim=1), OFFSETS, strict=True):
        total = total + _at(cell, -down, -right)
        count = count + _at(ones, -down, -right)
    return total / count


def _at(padded: Tensor, down: int, right: int) -> Tensor:
    """Shift a map that is padded by 1: pixel (y, x) becomes the one at (y + down, x + right)."""
    height, width = padded.shape[2] - 2, padded.shape[3] - 2
    return padded.narrow(2, 1 + down, height).narrow(3, 1 + right, width)


def _unit(patches: Tensor) -> Tensor:
    norm = full(patches).square().sum(dim=2, keepdim=True).clamp(min=NORM_MIN**2).sqrt()
    return patches / norm.to(patches.dtype)
