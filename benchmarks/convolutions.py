"""Convolutions of the pyramids in groups, compared with the forms of `grouped_convolution.py`.

    python benchmarks/convolutions.py --json

It measures forward and backward passes of the convolutions of a pyramid of `base`, in training at
256 x 256, in channels_last: autocast to bfloat16 on a GPU, fp32 on a CPU. First each kernel by
itself in each form, then whole pyramids: each form for all kernels, and for each kernel the form
that was the fastest by itself. The last is what `ON_GPU` should be. `--count` measures nothing and
counts products and bytes instead. It needs only torch.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from math import gcd
from pathlib import Path

import torch
from compare import Row, ratio, report, take_turns
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from dpnet.model.grouped_convolution import (
    DENSE,
    Form,
    convolve_all,
    convolve_as,
    join_groups,
    toeplitz,
)
from dpnet.model.pyramid import MaskAwareConv, pyramid_levels

# Channels in and out, side of the input, stride.
PYRAMIDS = {"a block": (256, 256, 64, 1), "down 2": (128, 256, 128, 2), "down 1": (64, 128, 256, 2)}
KERNELS = (5, 7, 9)  # those with groups
FORMS: dict[str, Form] = {
    "in groups": "groups",
    "4 groups left": 4,
    "2 groups left": 2,
    "dense": DENSE,
    "2 columns": (1, 2),
    "4 columns": (1, 4),
    "8 columns": (1, 8),
    "2 x 2 blocks": (2, 2),
    "4 x 4 blocks": (4, 4),
}
FASTEST = "the fastest for each kernel"
HALF, FULL = 2, 4  # bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--batch", type=int, help="samples (default: 8 on a GPU, 1 on a CPU)")
    parser.add_argument("--small", action="store_true", help="a quarter of the sides and channels")
    parser.add_argument("--compile", action="store_true", help="compile, as training on a GPU does")
    parser.add_argument("--count", action="store_true", help="count products and bytes only")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    args = parser.parse_args()
    cuda = torch.cuda.is_available()
    batch = args.batch or (8 if cuda else 1)
    if args.count:
        print_counts(batch)
        return
    rows: list[Row] = []
    ratios: dict[str, float] = {}
    for name in PYRAMIDS:
        convs, x = layers(name, batch, small=args.small)

        def run(forms: Mapping[int, Form], only: int | None = None) -> Callable[[], float]:
            times = 20 if cuda or args.small else 1
            return timed(convs, x, forms, only, compiled=args.compile, times=times)  # noqa: B023

        fastest = {}
        for kernel in KERNELS:
            turns = {form: run({kernel: FORMS[form]}, kernel) for form in FORMS}
            of_kernel = to_rows(f"{name}, {kernel} x {kernel}", take_turns(turns, args.repeats))
            fastest[kernel] = min(FORMS, key=lambda form: of_kernel[form].median)
            rows += of_kernel.values()
        print(f"The fastest for {name}: {', '.join(f'{k} x {k} {fastest[k]}' for k in KERNELS)}")
        turns = {form: run(dict.fromkeys(KERNELS, FORMS[form])) for form in FORMS}
        turns[FASTEST] = run({kernel: FORMS[form] for kernel, form in fastest.items()})
        measured = take_turns(turns, args.repeats)
        rows += to_rows(name, measured).values()
        for form in turns:
            ratios[f"{form} vs groups, {name}"] = ratio(measured["in groups"], measured[form])
        ratios[f"{FASTEST} vs dense, {name}"] = ratio(measured["dense"], measured[FASTEST])
    where = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads"
    title = f"Pyramids of convolutions, forward and backward, batch {batch}, {where}"
    report(f"{title}, torch {torch.__version__}", rows, ratios, as_json=args.json)


def to_rows(name: str, measured: Mapping[str, Sequence[float]]) -> dict[str, Row]:
    return {f: Row(f"{name}, {f}", [1000 * s for s in measured[f]], "ms") for f in measured}


def layers(name: str, batch: int, *, small: bool) -> tuple[list[nn.Conv2d], Tensor]:
    """Return a pyramid's convolutions and an input for them."""
    channels, out, side, stride = PYRAMIDS[name]
    if small:
        channels, out, side = channels // 4, out // 4, side // 4
    device = "cuda" if torch.cuda.is_available() else "cpu"
    layer = MaskAwareConv(channels, pyramid_levels(channels, out, pyramid=True), stride=stride)
    layer = layer.to(device=device, memory_format=torch.channels_last)
    x = torch.randn(batch, channels, side, side, device=device)
    if device == "cuda":
        x = x.bfloat16()
    return list(layer.convs), x.to(memory_format=torch.channels_last).requires_grad_()


def timed(
    convs: list[nn.Conv2d],
    x: Tensor,
    forms: Mapping[int, Form],
    only: int | None = None,
    *,
    compiled: bool,
    times: int,
) -> Callable[[], float]:
    """Return a function that returns the seconds of one pass forward and backward.

    Args:
        convs: The convolutions of a pyramid.
        x: Their input.
        forms: The form of each kernel.
        only: Side of the only kernel to compute.
        compiled: Compile the pass.
        times: Number of passes to average over.
    """
    cuda = x.is_cuda
    convs = [conv for conv in convs if only in (None, conv.kernel_size[0])]
    leaves = [x, *(conv.weight for conv in convs)]

    def forward(x: Tensor) -> list[Tensor]:
        return convolve_all(x, convs)

    if compiled:
        torch._dynamo.config.recompile_limit = 1000  # torch counts all forms as one function
        forward = torch.compile(forward, fullgraph=True, dynamic=False)

    def run() -> None:
        with convolve_as(forms), torch.autocast(x.device.type, torch.bfloat16, enabled=cuda):
            outputs = forward(x)
        torch.autograd.grad(outputs, leaves, outputs)

    def measure() -> float:
        run()  # so that the other form's last run has no effect
        if cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(times):
            run()
        if cuda:
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / times

    return measure


def print_counts(batch: int) -> None:
    """Print the products and bytes of each form, for each kernel and pyramid."""
    print(
        f"Forward pass: GMac an image, and as a multiple of the useful products.\nBoth passes in"
        f" bfloat16: MB an image, in batches of {batch}.\n"
    )
    for name, (channels, out, side, stride) in PYRAMIDS.items():
        levels = pyramid_levels(channels, out, pyramid=True)
        convs = list(MaskAwareConv(channels, levels, stride=stride).convs)
        for form in FORMS:
            counts = [count(conv, side, FORMS[form], batch) for conv in convs]
            moved = moved_bytes(channels, side) if isinstance(FORMS[form], tuple) else 0
            whole = [sum(column) for column in zip(*counts, strict=True)]
            parts = [
                f"{conv.kernel_size[0]} x {conv.kernel_size[0]}: {macs / useful:.2f}"
                f" ({wide} to {narrow})"
                for conv, (macs, useful, _, wide, narrow) in zip(convs, counts, strict=True)
            ]
            print(
                f"{name}, {form}: {whole[0] / 1e9:.2f} GMac, {whole[0] / whole[1]:.2f}"
                f" of the useful; {(whole[2] + moved) / 1e6:.0f} MB; {', '.join(parts)}"
            )


def count(
    conv: nn.Conv2d, side: int, form: Form, batch: int
) -> tuple[float, float, float, int, int]:
    """Count one convolution in a form.

    Returns:
        Products executed and useful ones, forward; bytes of both passes without those of the moved
        input; channels of the input and the output in a group. All a sample.
    """
    stride, out = conv.stride[0], side // conv.stride[0]
    weight, groups, blocks = conv.weight, conv.groups, 1
    useful = out * out * weight.numel()
    read, written = side * side * conv.in_channels, out * out * conv.out_channels
    moved = expanded = 0
    if groups == 1:
        form = "groups"
    if isinstance(form, int):
        weight, groups = join_groups(weight, groups, form), gcd(form, groups)
    elif form != "groups":
        weight, blocks = toeplitz(weight, stride, form), form[0] * form[1]
        moved = 2 * 2 * HALF * written  # moved out and its gradient moved in: read and written
    if form != "groups":
        # In full precision written and read, in half precision written; the same backward.
        expanded = 2 * (2 * FULL + HALF) * weight.numel()
    macs = out * out // blocks * weight.numel()
    # The convolution, its gradient to the input, and that to the weight: each has three operands.
    passes = 3 * HALF * (read + written + weight.numel() / batch)
    bytes_ = passes + moved + expanded / batch
    return macs, useful, bytes_, weight.shape[1], weight.shape[0] // groups


def moved_bytes(channels: int, side: int) -> int:
    """Return the bytes of moving the input in, shared by the kernels, and its gradient out."""
    return 2 * 2 * HALF * side * side * channels


if __name__ == "__main__":
    main()
