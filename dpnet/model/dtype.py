"""Of tensors: precision, and what is only traced."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def full(x: Tensor) -> Tensor:
    """`x` in float32, or as it is where it has float64 already."""
    return x if x.dtype == torch.float64 else x.float()


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """In it, products stay in the precision of their factors. (Meta tensors know no autocast.)"""
    if x.is_meta:
        return nullcontext()
    return torch.autocast(x.device.type, enabled=False)


def is_traced() -> bool:
    """Whether `torch.jit.trace` is at work, to which all values are examples."""
    return bool(torch.jit.is_tracing())  # type: ignore[attr-defined,no-untyped-call]
