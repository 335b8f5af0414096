"""Pyramidal attention: patches of the decoder ask, patches of three encoder layers answer.

The paper takes finer patches "directly from learned layers", so that a pyramid of layers is what a
non-local pixel can draw from. The definition below (patches of 3x3, cosine logits, log known share
as an additive term, sharpness that grows with the number of keys) is our choice.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from dpnet.model.config import Attention

PATCH = 3
KNOWN_MIN = 0.05  # keys whose patch has less known share are excluded
SHARPNESS = 10.0
REFERENCE_KEYS = 5376  # 64^2 + 32^2 + 16^2: the keys at 256^2, where the sharpness is 10
SCORE_BUDGET = 1 << 24  # elements of a score block; beyond it queries go in chunks


def known_share(valid: Tensor, size: tuple[int, int]) -> Tensor:
    """Share of known input pixels under each 3x3 patch of a map of `size`: N1HW.

    `valid` is the input mask V0; its size is a multiple of `size`.
    """
    cells = F.adaptive_avg_pool2d(valid.float(), size)
    return F.avg_pool2d(cells, PATCH, 1, PATCH // 2, count_include_pad=False)


def patches(x: Tensor) -> Tensor:
    """The 3x3 patches of an NCHW map around every pixel, zeros outside: N(HW)(9C)."""
    return F.unfold(x, PATCH, padding=PATCH // 2).transpose(1, 2)


def paste(values: Tensor, size: tuple[int, int]) -> Tensor:
    """Put N(HW)(9C) patches back onto an NCHW map; overlaps are averaged."""
    ones = torch.ones((1, 1, *size), dtype=values.dtype, device=values.device)
    count = F.fold(F.unfold(ones, PATCH, padding=1), size, PATCH, padding=1)
    return F.fold(values.transpose(1, 2), size, PATCH, padding=1) / count


def attend(queries: Tensor, keys: Tensor, values: Tensor, share: Tensor) -> Tensor:
    """Softmax attention over keys with known share at least 0.05.

    Args:
        queries: N L D, L2-normalised. keys: N K D, L2-normalised. values: N K E.
        share: N K in [0, 1], the known share c_j of each key's patch.

    Returns:
        N L E; 0 where a sample has no key left. The logits are s * q.k + log c_j in fp32, with
        s = 10 log K / log 5376.
    """
    usable = share >= KNOWN_MIN
    bias = torch.where(usable, share.clamp(min=KNOWN_MIN).log(), float("-inf"))
    some = usable.any(dim=1)
    # A sample without keys would be softmax over -inf, which is NaN, also in the gradient.
    bias = torch.where(some[:, None], bias, 0.0)
    scale = SHARPNESS * math.log(keys.shape[1]) / math.log(REFERENCE_KEYS)
    result = _in_chunks(queries, keys, values, bias, scale)
    return torch.where(some[:, None, None], result, 0.0)


def _in_chunks(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> Tensor:
    rows = max(1, SCORE_BUDGET // (q.shape[0] * k.shape[1]))
    if rows >= q.shape[1]:
        return _block(q, k, v, bias, scale)
    parts = []
    for chunk in torch.split(q, rows, dim=1):
        if torch.is_grad_enabled():  # keep no chunk's scores for the backward pass
            parts.append(checkpoint(_block, chunk, k, v, bias, scale, use_reentrant=False))
        else:
            parts.append(_block(chunk, k, v, bias, scale))
    return torch.cat(parts, dim=1)


def _block(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> Tensor:
    logits = (q @ k.transpose(1, 2)).float() * scale + bias[:, None, :]
    return logits.softmax(dim=2).to(v.dtype) @ v


class PyramidAttention(nn.Module):
    """Residual attention at one decoder resolution.

    `forward` takes the decoder's feature NCHW, the encoder's layers (the first at the same
    resolution, the others coarser) and the input mask V0.
    """

    def __init__(self, channels: int, layers: list[int], dim: int) -> None:
        super().__init__()
        self.query = nn.Conv2d(channels, dim, 1)
        self.keys = nn.ModuleList(nn.Conv2d(c, dim, 1) for c in layers)
        self.values = nn.ModuleList(nn.Conv2d(c, dim, 1) for c in layers)
        self.out = nn.Conv2d(dim, channels, 1)

    def forward(self, x: Tensor, layers: list[Tensor], valid: Tensor) -> Tensor:
        size = (x.shape[2], x.shape[3])
        queries = F.normalize(patches(self.query(x)), dim=2)
        keys = torch.cat([patches(key(f)) for key, f in zip(self.keys, layers, strict=True)], dim=1)
        values = torch.cat(
            [patches(value(f)) for value, f in zip(self.values, layers, strict=True)], dim=1
        )
        share = torch.cat(
            [known_share(valid, (f.shape[2], f.shape[3])).flatten(1) for f in layers], dim=1
        )
        attended = attend(queries, F.normalize(keys, dim=2), values, share)
        return x + self.out(paste(attended, size))  # type: ignore[no-any-return]


def key_layers(kind: Attention, layers: list[int]) -> list[int]:
    """Which of the encoder's layers (finest first) serve as keys."""
    return layers if kind == "pyramid" else layers[:1]
