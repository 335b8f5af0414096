"""The device time of a training step, by kind of kernel.

    python benchmarks/kernels.py [--preset base] [--batch 16] [--steps 5] [--json]

The step is that of `benchmarks/step.py`. A kind is recognised by the kernel's name (KINDS). The
matrix products of attention count as matrix products, unless their kernels have attention's name.
`of_step` is the time of all kernels as a share of the step's time, which is measured without the
profiler. On a CPU, operators take the place of kernels. It needs only torch.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from compare import Row, report
from step import Contender, options_of_a_step, wait
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

# The first that matches counts. Compiled element-wise kernels have the names of everything that is
# fused into them, so their own prefix comes first.
KINDS = {
    "element-wise, compiled": r"^triton_(poi|red|per|for)",
    "optimiser": r"adam|multi_tensor|foreach",
    "convolution, backward": r"[wdb]grad|convolution_?backward|conv.*backward",
    "attention": r"attention|attend|flash|fmha|attn",
    "convolution, forward": r"fprop|conv|implicit_gemm|winograd",
    "matrix products": r"gemm|gemv|nvjet|cublas|splitk|triton_tem|aten::(mm|bmm|addmm|baddbmm)$",
    "copies and layout": r"mem(cpy|set)|copy|clone|nchw|nhwc|transpose|cat|pad|fill|zero",
    "element-wise, other": r"elementwise|reduce|softmax|vectorized|upsample|aten::",
}
OTHER = "other"
LONGEST = 15  # kernels in the list of the longest


def kind_of(name: str) -> str:
    """Return the kind of a kernel, or of an operator on a CPU."""
    matching = (kind for kind, names in KINDS.items() if re.search(names, name, re.IGNORECASE))
    return next(matching, OTHER)


def durations(events: Iterable[Any], *, cuda: bool) -> Counter[str]:
    """Return the milliseconds of each kernel (on a CPU: of each operator itself) by name.

    Args:
        events: those of torch's profiler.
        cuda: whether to count what ran on the device.
    """
    found = Counter[str]()
    for event in events:
        if cuda and event.device_type == DeviceType.CUDA:
            # Ranges that someone named are shown on the device too, around their kernels.
            if not event.name.startswith(("ProfilerStep", "Optimizer.", "## ", "Torch-Compiled")):
                found[event.name] += event.time_range.elapsed_us() / 1000
        elif not cuda:
            found[event.name] += event.self_cpu_time_total / 1000
    return found


def by_kind(kernels: Mapping[str, float]) -> dict[str, float]:
    """Return the sum of each kind, the longest first."""
    sums = Counter[str]()
    for name, milliseconds in kernels.items():
        sums[kind_of(name)] += milliseconds
    return dict(sums.most_common())


def main() -> None:
    """Profile some steps, and print the kinds and the longest kernels."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cuda = device.type == "cuda"
    options = options_of_a_step(__doc__, device).parse_args()
    contender = Contender(options, device, ours=True)
    step_ms = 1000 * contender.turn().seconds
    activity = ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU
    with profile(activities=[activity]) as profiler:
        for _ in range(options.steps):
            contender.run()
        wait(device)
    found = durations(profiler.events(), cuda=cuda)
    kernels = {name: ms / options.steps for name, ms in found.items()}
    if not kernels:
        sys.exit("the profiler saw no kernel: its user may not read the device's counters")
    total = sum(kernels.values())
    print(f"The {LONGEST} longest, in ms a step:")
    for name, ms in Counter(kernels).most_common(LONGEST):
        print(f"{ms:9.3f}  {100 * ms / total:4.1f} %  {kind_of(name):<24} {name[:150]}")
    rows = [Row("a step", [step_ms], "ms"), Row("all kernels", [total], "ms")]
    for kind, ms in by_kind(kernels).items():
        rows += [Row(kind, [ms], "ms"), Row(f"{kind}, share", [100 * ms / total], "%")]
    where = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads"
    title = f"\nKernels of a step of {options.preset}, batch {options.batch}, {where}"
    report(
        f"{title}, torch {torch.__version__}", rows, {"of_step": total / step_ms},
        as_json=options.json,
    )  # fmt: skip


if __name__ == "__main__":
    main()
