"""B3: pyramidal attention, forward and backward, compared with its plain form.

    python benchmarks/attention.py --json

64 x 64 queries, keys of 64 x 64 + 32 x 32 + 16 x 16, 3 x 3 patches, 256 channels projected to
d = d_v = 128 and back. The plain form cuts patches out and holds the whole score matrix. On a GPU
two more are timed: the form by torch's own operations, in blocks, and SDPA's memory-efficient
kernel on patches of 9 x 128 channels, the only fused kernel that takes so many.

Each form first runs in a process of its own, with a time limit. It gives the time of the first
pass, with compiling, and the peak memory minus the memory before. A form that fails or is late is
left out. The benchmark needs only torch; the kernels of the GPU form need Triton.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from compare import Row, in_a_process, ratio, report, take_turns
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from dpnet.model import attention, plain_attention
from dpnet.model.attention import PyramidAttention, attention_by_blocks
from dpnet.model.attention import plain_attention as by_definition
from dpnet.model.attention_check import checked_kernels

CHANNELS, DIM = 256, 128
ON_CPU = ("dpnet", "plain fp32")  # without bfloat16 arithmetic a CPU only emulates it
FORMS = (*ON_CPU, "dpnet bf16", "plain bf16", "blocks bf16", "sdpa bf16")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--batch", type=int, help="samples (default: 8 on a GPU, 2 on a CPU)")
    parser.add_argument("--side", type=int, default=64, help="of the grid of queries")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--limit", type=float, default=120, help="seconds for a form's first passes"
    )
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--alone", choices=FORMS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    cuda = torch.cuda.is_available()
    batch = args.batch or (8 if cuda else 2)
    if args.alone:
        print(json.dumps(first_passes(args.alone, batch, args.side)))
        return
    first = {}
    for form in FORMS if cuda else ON_CPU:
        command = [sys.executable, __file__, "--alone", form]
        command += ["--batch", str(batch), "--side", str(args.side)]
        try:
            first[form] = in_a_process(command, limit=args.limit)
        except SystemExit as error:
            print(f"{form} is left out: {error}", file=sys.stderr, flush=True)
    best = "dpnet bf16" if cuda else "dpnet"
    if best not in first:
        sys.exit(f"There is nothing to compare: {best} did not run.")
    passes = {form: one_pass(form, batch, args.side) for form in first}
    for run in passes.values():
        run()
    measured = take_turns({form: timed(run) for form, run in passes.items()}, args.repeats)
    del passes
    rows = [Row(form, [1000 * s / batch for s in t], "ms/image") for form, t in measured.items()]
    rows += [Row(f"{form}, first pass", [seconds], "s") for form, (seconds, _) in first.items()]
    rows += [Row(f"{form}, peak", [mb], "MB") for form, (_, mb) in first.items()]
    if set(ON_CPU) <= set(first):
        difference = largest_difference(args.side)
        rows.append(Row("largest difference, fp32", [1e6 * difference], "1e-6"))
    peers = {"vs_plain_fp32": "plain fp32", "vs_plain_bf16": "plain bf16"}
    peers |= {"vs_blocks": "blocks bf16", "vs_sdpa": "sdpa bf16"}
    ratios = {
        name: ratio(measured[peer], measured[best])
        for name, peer in peers.items()
        if peer in measured
    }
    if "plain fp32" in first:
        ratios["memory_vs_plain_fp32"] = first[best][1] / first["plain fp32"][1]
    where = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads"
    if cuda and checked_kernels(torch.device("cuda", 0), torch.bfloat16):
        where += ", Triton kernels"
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
    ways = {"plain": by_definition, "blocks": attention_by_blocks, "sdpa": by_sdpa}
    way = ways.get(form.split()[0], nullcontext)

    def run() -> tuple[Tensor, Tensor]:
        x.grad = None
        with torch.autocast(device, torch.bfloat16, enabled="bf16" in form), way():
            out = layer(x, layers, valid)
        out.float().square().mean().backward()
        assert x.grad is not None
        return out.detach(), x.grad

    return run


@contextmanager
def by_sdpa() -> Iterator[None]:
    """Use SDPA in place of the definition while in the block."""
    before, attention.plain_attend = attention.plain_attend, sdpa_attend
    try:
        with by_definition():
            yield
    finally:
        attention.plain_attend = before


def sdpa_attend(
    query: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], shares: Sequence[Tensor]
) -> Tensor:
    """Do what `plain_attend` does with SDPA's memory-efficient kernel. Each sample has a key."""
    patches, unit = plain_attention._patches, plain_attention._unit
    q, k = unit(patches(query)), unit(torch.cat([patches(key) for key in keys], dim=1))
    v = torch.cat([patches(value) for value in values], dim=1)
    share = torch.cat([c.flatten(1) for c in shares], dim=1)
    least = plain_attention.KNOWN_MIN
    bias = torch.where(share >= least, share.clamp(min=least).log(), float("-inf")).to(q.dtype)
    mask = bias[:, None, None].expand(-1, 1, q.shape[1], -1)
    scale = plain_attention.SHARPNESS * math.log(share.shape[1])
    scale /= math.log(plain_attention.REFERENCE_KEYS)
    with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
        out = F.scaled_dot_product_attention(
            q[:, None], k[:, None], v[:, None], attn_mask=mask, scale=scale
        )
    return plain_attention._paste(out[:, 0], query)


def largest_difference(side: int) -> float:
    """Return the largest difference of the two forms in fp32, relative to the largest value."""
    both = [one_pass(form, 1, side)() for form in ON_CPU]
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


def first_passes(form: str, batch: int, side: int) -> tuple[float, float]:
    """Return the seconds of the first pass and the peak memory of a pass in MB.

    Run this in a process of its own.
    """
    run = one_pass(form, batch, side)
    before = high_water()
    seconds = timed(run)()
    if not torch.cuda.is_available():
        return seconds, (high_water() - before) / 1e3
    torch.cuda.reset_peak_memory_stats()
    allocated = torch.cuda.memory_allocated()
    run()
    return seconds, (torch.cuda.max_memory_allocated() - allocated) / 1e6


def high_water() -> int:
    """Return this process's peak memory in kB. (`ru_maxrss` includes its parent's.)"""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


if __name__ == "__main__":
    main()
