"""Precision of tensors, and whether a graph is traced."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def full(x: Tensor) -> Tensor:
    """Return `x` in float32; float64 stays float64."""
    return x if x.dtype == torch.float64 else x.float()


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """Keep products in the precision of their factors. (Meta tensors have no autocast.)"""
    if x.is_meta:
        return nullcontext()
    return torch.autocast(x.device.type, enabled=False)


def is_traced() -> bool:
    """Return whether `torch.jit.trace` is running, for which all values are examples."""
    return bool(torch.jit.is_tracing())  # type: ignore[attr-defined,no-untyped-call]
