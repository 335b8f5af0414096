"""Run the Triton kernels of attention without a GPU, in a process of their own; print JSON.

    TRITON_INTERPRET=1 python tests/support/attention_kernels_on_cpu.py
    python tests/support/attention_kernels_on_cpu.py --compile

Triton reads the variable when it is imported, so a process has either the interpreter or the
compiler. The interpreter takes about a millisecond for a step of a program, so cases are small.
"""

from __future__ import annotations

import json
import math
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dpnet.model import attention, attention_blocks, attention_kernels, attention_triton
from dpnet.model.plain_attention import plain_attend

Grid = tuple[int, int]
KERNELS = "weigh", "differentiate", "spread"
NAMES = "output", "d_q", "d_k", "d_v", "d_row", "d_column"


@dataclass(frozen=True)
class Case:
    """Shapes of one run. `workspace` in bytes says how many blocks it takes."""

    query: Grid
    grids: tuple[Grid, ...]
    samples: int = 1
    dim: int = 3
    values: int = 2
    kind: torch.dtype = torch.float64
    workspace: int = 1 << 28
    excluded: float = 0.3  # share of keys


CASES = {
    "three levels": Case((2, 4), ((2, 4), (2, 3), (1, 2))),
    "fp32": Case((3, 3), ((3, 3),), kind=torch.float32),
    "bf16": Case((3, 3), ((3, 3),), dim=8, values=4, kind=torch.bfloat16),
    "one pixel": Case((1, 1), ((1, 1),), excluded=0),
    "one row": Case((1, 5), ((1, 5),)),
    "one column": Case((4, 1), ((3, 1),), values=1),
    "more columns than a tile": Case((1, 18), ((2, 34),)),
    "blocks partly outside the map": Case((5, 5), ((2, 2),), workspace=5_000),
    "samples in several blocks": Case((2, 2), ((2, 3),), samples=3, workspace=12_000),
}


def drawn(seed: int) -> Case:
    """Draw shapes at random."""
    draw = random.Random(seed)

    def side() -> int:
        return draw.randint(1, 3)

    grids = tuple((side(), side()) for _ in range(draw.randint(1, 2)))
    workspace = draw.choice([5_000, 1 << 28])
    excluded = draw.choice([0.0, 0.6])
    return Case((side(), side()), grids, 1, side(), side(), workspace=workspace, excluded=excluded)


def differences(case: Case) -> dict[str, float]:
    """Return the relative differences of output and gradients from torch's form in float64."""
    torch.manual_seed(0)
    vectors = torch.float64 if case.kind == torch.float64 else torch.float32
    n, (h, w), keys = case.samples, case.query, sum(h * w for h, w in case.grids)
    q, gradient = torch.randn(n, h, w, case.dim), torch.randn(n, h, w, case.values)
    k, v = torch.randn(n, keys, case.dim), torch.randn(n, keys, case.values)
    row, column = 0.2 + torch.rand(n, h, w), 0.2 + torch.rand(n, keys)
    bias = torch.rand(n, keys).log().masked_fill(torch.rand(n, keys) < case.excluded, -math.inf)
    bias[:, 0] = -0.5
    maps = [x.to(case.kind) for x in (q, k, v)]
    inputs = [*maps, *(x.to(vectors) for x in (row, column, bias))]
    gradient = gradient.to(case.kind)
    sides = [side for grid in case.grids for side in grid]
    attention_triton.WORKSPACE = case.workspace

    def both(form: Any, inputs: list[Tensor], gradient: Tensor) -> Iterator[Tensor]:
        return iter((form.forward(*inputs, sides), *form.backward(gradient, *inputs, sides)))

    ours = both(attention_triton, inputs, gradient)
    true = both(attention_blocks, [x.double() for x in inputs], gradient.double())
    return {name: far(a, b) for name, a, b in zip(NAMES, ours, true, strict=True)}


def whole() -> dict[str, float]:
    """Return the same for `attend` and the definition, with samples that lack keys."""
    torch.manual_seed(0)
    attention_triton.WORKSPACE = 30_000
    grids = ((3, 3), (2, 2))

    def maps(channels: int) -> list[Tensor]:
        return [torch.randn(2, channels, *g).double().requires_grad_() for g in grids]

    query, keys, values = torch.randn(2, 3, 3, 3).double().requires_grad_(), maps(3), maps(2)
    shares = [torch.rand(2, 1, *g).double() for g in grids]
    for share in shares:
        share[1] = 0.01  # sample 1 has no key
        share[0, 0, 0] = 0.049  # sample 0 loses some
    weights = torch.randn(2, 2, 3, 3).double()

    def passed(form: Any) -> Iterator[Tensor]:
        out = form(query, keys, values, shares)
        return iter((out, *torch.autograd.grad((out * weights).sum(), [query, *keys, *values])))

    attention._form = lambda *_: attention_triton
    found, true = list(passed(attention.attend)), list(passed(plain_attend))
    assert not found[0][1].any()
    return {str(i): far(a, b) for i, (a, b) in enumerate(zip(found, true, strict=True))}


def far(ours: Tensor, theirs: Tensor) -> float:
    """Return the norm of the difference as a share of what it should be (or of 0.001)."""
    assert ours.shape == theirs.shape
    ours, theirs = ours.detach(), theirs.detach()
    return float((ours.double() - theirs).norm() / theirs.double().norm().clamp(min=1e-3))


class Card:
    """Stands in for Triton's driver of a card of compute capability 9.0, to compile only."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)


class Compiled:
    """A kernel whose launches only compile. Keeps the machine code of each variant."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.variants: dict[str, bytes] = {}

    def __getitem__(self, grid: Any) -> Any:
        def launch(*tensors: Tensor, **options: Any) -> None:
            made = self.kernel.warmup(*tensors, grid=grid, **options)
            self.variants[made.hash] = made.asm["cubin"]

        return launch


def compiled() -> dict[str, list[int]]:
    """Compile what passes of several sizes launch. Return the bytes of each kernel's variants."""
    from triton.runtime import driver

    driver.set_active(Card())  # type: ignore[no-untyped-call]
    kernels = {name: Compiled(getattr(attention_kernels, name)) for name in KERNELS}
    for name, kernel in kernels.items():
        setattr(attention_triton, name, kernel)
    launched = [Case((16, 16), ((16, 16), (8, 8), (4, 4)), 2, 8, 8), Case((1, 1), ((1, 1),))]
    # Samples and rows that start at odd places in memory must not be compiled again.
    launched.append(Case((9, 11), ((9, 11), (5, 6), (3, 3)), 3, 5, 3, workspace=1 << 18))
    for case in launched:
        differences(replace(case, kind=torch.bfloat16))  # of nothing: no kernel runs
    return {name: [len(code) for code in k.variants.values()] for name, k in kernels.items()}


def main() -> None:
    if sys.argv[1:] == ["--compile"]:
        print(json.dumps(compiled()))
        return
    found = {name: differences(case) for name, case in CASES.items()}
    found |= {f"drawn {seed}": differences(drawn(seed)) for seed in range(2)}
    found["whole"] = whole()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
