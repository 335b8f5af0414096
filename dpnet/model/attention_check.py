"""Check the Triton kernels of attention on the GPU that is to run them, once a process.

A compiler, a driver or a C compiler can be missing or wrong on any machine. So the first use runs a
small example both ways. If the results differ, attention runs by torch's own operations instead.
"""

from __future__ import annotations

import warnings
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from dpnet.model import attention_blocks
from dpnet.model.dtype import without_autocast

# Largest norm of a difference, as a share of the result's norm. TF32 may be in products of fp32.
LIMITS = {torch.bfloat16: 2e-2, torch.float32: 5e-3, torch.float64: 1e-9}
SIDES = [7, 9, 4, 5, 2, 3]  # of the levels of keys; the first is also the grid of queries
DIM = 16


@cache
def checked_kernels(device: torch.device, kind: torch.dtype) -> ModuleType | None:
    """Return `attention_triton` if it imports, runs and is right for tensors of type `kind`.

    Else warn with the reason and return None. float16 has no kernels: exp(logit) overflows in it.
    """
    if kind not in LIMITS:
        return None
    try:
        from dpnet.model import attention_triton
    except ImportError as error:
        return _without(f"it does not import: {error}")
    try:
        differences = differences_of(attention_triton, device, kind)
    except Exception as error:  # the compiler, the driver and the launch fail in many ways
        return _without(f"it does not run: {type(error).__name__}: {error}")
    if not all(far <= LIMITS[kind] for far in differences.values()):  # NaN is not near
        found = ", ".join(f"{name} {far:.1e}" for name, far in differences.items())
        return _without(f"its results are wrong for {kind}: {found} (at most {LIMITS[kind]:.0e})")
    return attention_triton


def differences_of(form: Any, device: torch.device, kind: torch.dtype) -> dict[str, float]:
    """Return how far the output and the five gradients are from float64 in a small example.

    Args:
        form: A module with `forward` and `backward` as those of `attention_blocks`.
        device: Where `form` computes.
        kind: Type of q, k and v.

    Returns:
        The norm of each difference as a share of the norm that float64 gives.
    """
    inputs, gradient = example(kind)
    given = [x.to(device) for x in inputs]
    with torch.no_grad(), without_autocast(given[0]):
        found = _both(form, given, gradient.to(device))
    expected = _both(attention_blocks, [x.double() for x in inputs], gradient.double())
    names = "output", "d_q", "d_k", "d_v", "d_row", "d_column"
    return {
        name: float((ours.double().cpu() - theirs).norm() / theirs.norm())
        for name, ours, theirs in zip(names, found, expected, strict=True)
    }


def _both(form: Any, inputs: list[Tensor], gradient: Tensor) -> list[Tensor]:
    """Return the output of `form`, and its five gradients."""
    return [form.forward(*inputs, SIDES), *form.backward(gradient, *inputs, SIDES)]


def example(kind: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """Return the tensors of `attention_blocks.forward` and a gradient, the same each time."""
    random = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    samples, height, width = 2, *SIDES[:2]
    keys = sum(h * w for h, w in zip(SIDES[::2], SIDES[1::2], strict=True))
    maps = [draw(samples, height, width, DIM), draw(samples, keys, DIM), draw(samples, keys, DIM)]
    # Factors as those of cosines times a sharpness of 10.
    factors = [draw(samples, height, width), draw(samples, keys)]
    row, column = (scale + 0.1 * scale * x for scale, x in zip((0.1, 0.5), factors, strict=True))
    bias = -draw(samples, keys).abs()
    bias[:, 1::5] = float("-inf")
    vectors = torch.float64 if kind == torch.float64 else torch.float32
    gradient = draw(samples, height, width, DIM).to(kind)
    return [*(x.to(kind) for x in maps), *(x.to(vectors) for x in (row, column, bias))], gradient


def _without(reason: str) -> ModuleType | None:
    line = reason.strip().splitlines()[0]
    warnings.warn(f"attention runs without Triton, which is slower: {line}", stacklevel=2)
    return None
