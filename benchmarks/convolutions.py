"""Grouped convolutions of the pyramids, compared with dense ones with zeros between groups.

    python benchmarks/convolutions.py --json

The result is why `dpnet/model/pyramid.py` uses dense ones on a GPU in half precision. It measures
forward and backward passes of the four convolutions of a pyramid of `base`, in training at 256 x
256, in channels_last: bfloat16 on a GPU, fp32 on a CPU. It needs only torch.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from compare import Row, ratio, report, take_turns
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from dpnet.model.pyramid import MaskAwareConv, dense, pyramid_levels

# Channels in and out, side of the input, stride.
PYRAMIDS = {"a block": (256, 256, 64, 1), "down 2": (128, 256, 128, 2), "down 1": (64, 128, 256, 2)}
FORMS = ("in groups", "dense")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--batch", type=int, help="samples (default: 8 on a GPU, 1 on a CPU)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    args = parser.parse_args()
    cuda = torch.cuda.is_available()
    batch = args.batch or (8 if cuda else 1)
    rows, ratios = [], {}
    for name in PYRAMIDS:
        forms = {form: passes(name, batch, groups=form == "in groups") for form in FORMS}
        measured = take_turns({form: timed(run) for form, run in forms.items()}, args.repeats)
        rows += [Row(f"{name}, {form}", [1000 * s for s in measured[form]], "ms") for form in FORMS]
        ratios[f"dense_vs_groups {name}"] = ratio(measured["in groups"], measured["dense"])
    where = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads"
    title = f"Pyramids of convolutions, forward and backward, batch {batch}, {where}"
    report(f"{title}, torch {torch.__version__}", rows, ratios, as_json=args.json)


def passes(name: str, batch: int, *, groups: bool) -> Callable[[], None]:
    """Return a function that runs a pyramid's convolutions forward and backward once."""
    channels, out, side, stride = PYRAMIDS[name]
    cuda = torch.cuda.is_available()
    place = {"device": "cuda", "dtype": torch.bfloat16} if cuda else {}
    last = {"memory_format": torch.channels_last}
    layer = MaskAwareConv(channels, pyramid_levels(channels, out, pyramid=True), stride=stride)
    convs = layer.to(**place, **last).convs
    x = torch.randn(batch, channels, side, side, **place).to(**last).requires_grad_()

    def run() -> None:
        x.grad = None
        convs.zero_grad()
        for conv in convs:
            if groups:
                y = conv(x)
            else:
                y = F.conv2d(x, dense(conv.weight, conv.groups), None, stride, conv.padding)
            y.sum().backward()

    return run


def timed(run: Callable[[], None]) -> Callable[[], float]:
    cuda = torch.cuda.is_available()
    times = 20 if cuda else 1

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


if __name__ == "__main__":
    main()
