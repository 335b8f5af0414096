"""The one rule about precision: masks, statistics and colours are never computed in half."""

from __future__ import annotations

import torch
from torch import Tensor


def full(x: Tensor) -> Tensor:
    """`x` in float32, or as it is where it has float64 already."""
    return x if x.dtype == torch.float64 else x.float()
