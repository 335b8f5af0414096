"""B4: one whole GAN step (generator, discriminator, losses, optimisers) and its plain form.

    python benchmarks/step.py [--preset base] [--size 256] [--batch 8] [--repeats 5] [--json]

Ours is the step of the training loop: channels_last, fused Adam, attention without a score matrix.
On a GPU it uses bf16 autocast and torch.compile (on a CPU with --compile, which takes minutes). The
plain form is eager fp32 in NCHW, with torch's default Adam and the whole score matrix. torch keeps
its default precision: convolutions may use TF32, matrix products do not. Both have the same losses
with a feature network of VGG19's shape. Its weights are random unless --vgg names a file. The two
and a large matrix product in the precision of ours take turns.

torch counts the FLOP of the plain form over convolutions and matrix products, forward and backward,
with the feature network. `vs_eager_fp32` is how many times faster ours is. `of_matmul_rate` is the
share of the matrix product's FLOP/s that ours reaches. It needs only torch.
"""

from __future__ import annotations

import argparse
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
from compare import Row, ratio, report, take_turns
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from dpnet.model import PRESETS, losses
from dpnet.model.attention import plain_attention
from dpnet.training.state import BETA2, TrainState, placed
from dpnet.training.step import Step
from dpnet.training.vgg import load_vgg

LOSSES = SimpleNamespace(
    hole=6.0,
    valid=1.0,
    adversarial=0.1,
    gan="nsgan",
    perceptual=0.1,
    style=250.0,
    total_variation=0.0,
)
SETTINGS = SimpleNamespace(
    steps=1_000_000,
    learning_rate=1e-4,
    discriminator_learning_rate=1e-4,
    beta1=0.0,
    warmup_steps=0,
    finetune_share=0.0,
    final_rate=0.1,
    adversarial_from=0,
    gradient_clip=1.0,
    ema_decay=0.999,
    seed=0,
    accumulate=1,
    max_skipped=0,
)
WARM_UP = 3  # steps before the first turn
# Index in torchvision's `features`: channels in and out.
VGG19 = {0: (3, 64), 2: (64, 64), 5: (64, 128), 7: (128, 128), 10: (128, 256), 19: (256, 512)}
VGG19 |= dict.fromkeys((12, 14, 16), (256, 256))


class Turn(NamedTuple):
    """Seconds for a step, and this contender's peak memory in bytes (on a GPU)."""

    seconds: float
    peak: int


class DefaultAdam(torch.optim.Adam):
    """torch's default Adam. It never skips a step: on a GPU it does not support `found_inf`."""

    found_inf = property(lambda self: None, lambda self, value: None)


def random_batch(
    options: argparse.Namespace, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return images N3HW in channels_last, and masks N1HW with a square hole in the middle."""
    torch.manual_seed(0)
    image = torch.rand(options.batch, 3, options.size, options.size, device=device)
    valid = torch.ones_like(image[:, :1])
    quarter = options.size // 4
    valid[:, :, quarter:-quarter, quarter:-quarter] = 0
    return image.contiguous(memory_format=torch.channels_last), valid


class Contender:
    """A model with its step on random images, and its memory on the device."""

    def __init__(self, options: argparse.Namespace, device: torch.device, *, ours: bool) -> None:
        before = _allocated(device)
        self.device, self.steps, self.ours = device, options.steps, ours
        self.resident = 0  # until it is known
        state = TrainState(PRESETS[options.preset], SETTINGS, device)
        vgg = feature_network(options.vgg, device)
        self.image, self.valid = random_batch(options, device)
        if not ours:
            self.image = self.image.contiguous()
            for module in (state.generator, state.discriminator, vgg):
                module.to(memory_format=torch.contiguous_format)
            for name in ("generator", "discriminator"):
                parameters = getattr(state, name).parameters()
                optimizer = DefaultAdam(parameters, betas=(SETTINGS.beta1, BETA2))
                setattr(state, f"{name}_optimizer", optimizer)
        self.step = Step(
            state,
            LOSSES,
            SETTINGS,
            vgg=vgg,
            bf16=ours and device.type == "cuda",
            backend="inductor" if ours and options.compile else None,
        )
        self.first = self.turn(1).seconds
        for _ in range(WARM_UP - 1):
            self.run()
        self.resident = _allocated(device) - before

    def run(self) -> None:
        with nullcontext() if self.ours else plain_attention():
            self.step(0, self.image, self.valid)

    def turn(self, steps: int | None = None) -> Turn:
        steps = steps or self.steps
        others = _allocated(self.device) - self.resident
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        wait(self.device)
        start = time.perf_counter()
        for _ in range(steps):
            self.run()
        wait(self.device)
        seconds = (time.perf_counter() - start) / steps
        peak = torch.cuda.max_memory_allocated() if self.device.type == "cuda" else 0
        return Turn(seconds, peak - others)


def matmul_rate(device: torch.device) -> float:
    """Return the FLOP/s of a large matrix product in the precision of our step."""
    cuda = device.type == "cuda"
    side, times = (8192, 30) if cuda else (2048, 3)
    a, b = torch.randn(2, side, side, device=device, dtype=torch.bfloat16 if cuda else None)
    a @ b
    wait(device)
    start = time.perf_counter()
    for _ in range(times):
        a @ b
    wait(device)
    return 2 * side**3 * times / (time.perf_counter() - start)


def flop_per_image(options: argparse.Namespace, device: torch.device) -> int:
    """Return the FLOP of a step on one image in the plain form."""
    one = argparse.Namespace(**{**vars(options), "batch": 1})
    contender = Contender(one, device, ours=False)
    # torch counts the backward pass of grouped convolutions as if they had no groups.
    mapping = {torch.ops.aten.convolution_backward: _convolution_backward}
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        contender.run()
    return counter.get_total_flops()


def _convolution_backward(grad, x, weight, *rest, out_shape=None, **_) -> int:  # type: ignore[no-untyped-def]
    wanted = rest[-1]  # gradient of the input, of the weight, of the bias
    return sum(wanted[:2]) * conv_flop_count(x, weight, grad)


def feature_network(file: Path | None, device: torch.device) -> losses.VGGFeatures:
    """Return VGG19 with the weights of a file, or with random ones."""
    if file is not None:
        return load_vgg(file, "vgg19", device)
    random = torch.Generator().manual_seed(0)
    weights = {}
    for i, (channels, out) in VGG19.items():
        deviation = (2 / (9 * channels)) ** 0.5
        weights[f"features.{i}.weight"] = deviation * torch.randn(
            out, channels, 3, 3, generator=random
        )
        weights[f"features.{i}.bias"] = torch.zeros(out)
    return placed(losses.VGGFeatures(weights, "vgg19"), device)


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated() if device.type == "cuda" else 0


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def options_of_a_step(text: str | None, device: torch.device) -> argparse.ArgumentParser:
    """Return a parser of the options of our step, for a script with this docstring."""
    cuda = device.type == "cuda"
    parser = argparse.ArgumentParser(description=(text or "").partition("\n")[0])
    parser.add_argument("--preset", choices=sorted(PRESETS), default="base" if cuda else "tiny")
    parser.add_argument("--size", type=int, default=256, help="side of the images in pixels")
    parser.add_argument("--batch", type=int, default=8 if cuda else 2)
    parser.add_argument("--steps", type=int, default=10 if cuda else 1, help="steps of a turn")
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, default=cuda, help="ours, by inductor"
    )
    parser.add_argument("--vgg", type=Path, help="file of VGG19 weights; speed is the same")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    return parser


def main() -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cuda = device.type == "cuda"
    parser = options_of_a_step(__doc__, device)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()

    flop = flop_per_image(options, device)
    ours, eager = (Contender(options, device, ours=flag) for flag in (True, False))
    measured = take_turns(
        {"ours": ours.turn, "eager fp32": eager.turn, "matmul": lambda: matmul_rate(device)},
        options.repeats,
    )
    seconds = {name: [turn.seconds for turn in measured[name]] for name in ("ours", "eager fp32")}
    rows, rates = [], {}
    for name, times in seconds.items():
        rates[name] = [options.batch * flop / t for t in times]
        rows += [
            Row(f"{name}: a step", [1000 * t for t in times], "ms"),
            Row(f"{name}: speed", [options.batch / t for t in times], "images/s"),
            Row(f"{name}: reached", [rate / 1e12 for rate in rates[name]], "TFLOP/s"),
        ]
        if cuda:
            peaks = [turn.peak / 2**30 for turn in measured[name]]
            rows.append(Row(f"{name}: peak memory", peaks, "GiB"))
    rows += [
        Row("ours: the first step", [ours.first], "s"),  # with what is compiled in it
        Row("eager fp32: the first step", [eager.first], "s"),
        Row("matmul", [rate / 1e12 for rate in measured["matmul"]], "TFLOP/s"),
        Row("work on one image", [flop / 1e12], "TFLOP"),
    ]
    ratios = {
        "vs_eager_fp32": ratio(seconds["eager fp32"], seconds["ours"]),
        "of_matmul_rate": ratio(rates["ours"], measured["matmul"]),
    }
    where = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads"
    title = (
        f"A GAN step of {options.preset}, batch {options.batch} of {options.size} x {options.size};"
        f" ours in {'bf16' if cuda else 'fp32'}, {'' if options.compile else 'not '}compiled"
        f"\n{where}, torch {torch.__version__}"
    )
    report(title, rows, ratios, as_json=options.json)


if __name__ == "__main__":
    main()
