"""B3: pyramidal attention, forward and backward, compared with its plain form.

    python benchmarks/attention.py --json

64 x 64 queries, keys of 64 x 64 + 32 x 32 + 16 x 16, 3 x 3 patches, 256 channels projected to
d = d_v = 128 and back. The plain form cuts patches out and holds the whole score matrix. Memory is
the peak of a process minus its memory before. The benchmark needs only torch.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
from compare import Row, in_a_process, ratio, report, take_turns
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from dpnet.model.attention import PyramidAttention, plain_attention

CHANNELS, DIM = 256, 128
FORMS = ("dpnet", "plain fp32", "dpnet bf16", "plain bf16")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--batch", type=int, help="samples (default: 8 on a GPU, 2 on a CPU)")
    parser.add_argument("--side", type=int, default=64, help="of the grid of queries")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--memory-of", choices=FORMS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    cuda = torch.cuda.is_available()
    batch = args.batch or (8 if cuda else 2)
    if args.memory_of:
        print(peak(args.memory_of, batch, args.side))
        return
    # Not on a CPU: without bfloat16 arithmetic it only emulates.
    forms = FORMS if cuda else FORMS[:2]
    difference = largest_difference(args.side)
    passes = {form: one_pass(form, batch, args.side) for form in forms}
    for run in passes.values():
        run()
    measured = take_turns({form: timed(run) for form, run in passes.items()}, args.repeats)
    del passes
    memory = {
        form: in_a_process(
            [
                *(sys.executable, __file__, "--memory-of", form),
                *("--batch", str(batch), "--side", str(args.side)),
            ]
        )
        for form in forms
    }
    rows = [Row(form, [1000 * s / batch for s in t], "ms/image") for form, t in measured.items()]
    rows += [Row(f"{form}, peak", [mb], "MB") for form, mb in memory.items()]
    rows.append(Row("largest difference, fp32", [1e6 * difference], "1e-6"))
    best = "dpnet bf16" if cuda else "dpnet"
    ratios = {
        "vs_plain_fp32": ratio(measured["plain fp32"], measured[best]),
        "memory_vs_plain_fp32": memory[best] / memory["plain fp32"],
    }
    if cuda:
        ratios["vs_plain_bf16"] = ratio(measured["plain bf16"], measured[best])
    where = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads"
    title = f"Attention, forward and backward, {batch} x {args.side}^2 queries, {where}"
    report(f"{title}, torch {torch.__version__}", rows, ratios, as_json=args.json)


def one_pass(form: str, batch: int, side: int) -> Callable[[], tuple[Tensor, Tensor]]:
    """Return a function that runs one pass and returns output and gradient of the queries."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    layer = PyramidAttention(CHANNELS, [CHANNELS] * 3, DIM).to(device)
    x = torch.randn(batch, CHANNELS, side, side, device=device).requires_grad_()
    layers = [torch.randn(batch, CHANNELS, side // s, side // s, device=device) for s in (1, 2, 4)]
    valid = torch.ones(batch, 1, 4 * side, 4 * side, device=device)
    valid[:, :, side : 3 * side, side : 3 * side] = 0

    def run() -> tuple[Tensor, Tensor]:
        x.grad = None
        half = torch.autocast(device, torch.bfloat16, enabled="bf16" in form)
        with half, plain_attention() if "plain" in form else nullcontext():
            out = layer(x, layers, valid)
        out.float().square().mean().backward()
        assert x.grad is not None
        return out.detach(), x.grad

    return run


def largest_difference(side: int) -> float:
    """Return the largest difference of the two forms in fp32, relative to the largest value."""
    both = [one_pass(form, 1, side)() for form in FORMS[:2]]
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(*both, strict=True))


def timed(run: Callable[[], object]) -> Callable[[], float]:
    def measure() -> float:
        wait()
        start = time.perf_counter()
        run()
        wait()
        return time.perf_counter() - start

    return measure


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak(form: str, batch: int, side: int) -> float:
    """Return the peak memory of a pass in MB. Run this in a process of its own."""
    run = one_pass(form, batch, side)
    if torch.cuda.is_available():
        run()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    before = high_water()
    run()
    return (high_water() - before) / 1e3


def high_water() -> int:
    """Return this process's peak memory in kB. (`ru_maxrss` includes its parent's.)"""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


if __name__ == "__main__":
    main()
