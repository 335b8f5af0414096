"""B9: inpainting one 512 x 512 and one 2048 x 2048 photograph, on the CPU and on a GPU.

    python benchmarks/inpaint.py [--preset base] [--model RUN] [--photo FILE] [--json]

Time and peak memory by `dpnet.inpainting.tiles.fill`, which is what `dpnet.inpaint` and `dpnet
inpaint` run:
one photograph, in its middle a hole of a fifth of its side. Each measurement has a process of its
own, so the peak is its own: on the CPU all that the process holds, on a GPU what torch reserves
there. The goal is that 2048 x 2048 fits in 4 GB. Weights are random unless --model gives a run's
folder; time does not depend on them. Needs torch and NumPy alone (--photo: Pillow as well; --model:
the whole package).

Beside it stands what a LaMa-class network costs on paper; it is not run. See `lama`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from compare import Row, in_a_process, report
from numpy.typing import NDArray
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from dpnet.inpainting.tiles import TILE, fill
from dpnet.model import Generator, build_generator
from dpnet.model.config import PRESETS

GOAL_GB, GOAL_SIDE = 4.0, 2048


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--preset", choices=PRESETS, default="base")
    parser.add_argument("--model", help="a run's folder with a trained model, in --preset's place")
    parser.add_argument("--photo", help="scaled to each size; a drawn one if none is given")
    parser.add_argument("--sides", type=int, nargs="+", default=[512, GOAL_SIDE])
    parser.add_argument("--tile", type=int, default=TILE)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--device", choices=("cpu", "cuda"), help="(default: all there are)")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    parser.add_argument("--one", type=int, metavar="SIDE", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if min(args.sides) < 64:
        parser.error("--sides: give at least 64 pixels")
    if args.one:
        print(json.dumps(measure(args, args.one)))
        return
    devices = [args.device] if args.device else ["cpu", *["cuda"] * torch.cuda.is_available()]
    rows: list[Row] = []
    ratios: dict[str, float] = {}
    for device in devices:
        for side in args.sides:
            given = [*sys.argv[1:], "--device", device, "--one", str(side)]
            found = []
            for number in range(args.repeats):
                print(f"{device} {side}: {number + 1} of {args.repeats}", file=sys.stderr)
                found.append(in_a_process([sys.executable, __file__, *given]))
            times, peaks, passes = zip(*found, strict=True)
            name = f"{device} {side}^2"
            rows += [Row(name, times, "s"), Row(f"{name}, peak memory", peaks, "GB")]
            rows.append(Row(f"{name}, passes", passes, "of a tile"))
            if side == GOAL_SIDE:
                ratios[f"{device}_memory_of_goal"] = max(peaks) / GOAL_GB
    for side in args.sides:
        parameters, macs = lama(side)
        rows.append(Row(f"LaMa-class {side}^2, on paper, not run", [macs / 1e9], "GMac"))
    rows.append(Row("LaMa-class, on paper", [parameters / 1e6], "M weights"))
    what = args.model or f"{args.preset}, random weights"
    where = f"CPU with {torch.get_num_threads()} threads"
    if torch.cuda.is_available():
        where += f", {torch.cuda.get_device_name()}"
    title = f"Inpainting, {what}, tiles of {args.tile}, {where}, torch {torch.__version__}"
    report(title, rows, ratios, as_json=args.json)
    for name, share in ratios.items():
        fits = "fits" if share <= 1 else "does not fit"
        print(f"{name.split('_')[0]}: {GOAL_SIDE}^2 {fits} in {GOAL_GB:g} GB", file=sys.stderr)


def measure(args: argparse.Namespace, side: int) -> tuple[float, float, int]:
    """Seconds to fill a photograph of this side, peak memory in GB of 1e9 bytes, forward passes."""
    cuda = args.device == "cuda"
    generator = load(args).to(args.device)
    # A GPU is slow at what it does first; a CPU needs no more than its threads started.
    small = min(side, args.tile) if cuda else 64
    fill(generator, photograph(args.photo, small), mask(small), args.tile)
    image, valid = photograph(args.photo, side), mask(side)
    passes: list[None] = []
    generator.register_forward_hook(lambda *_: passes.append(None))
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    fill(generator, image, valid, args.tile)  # its result is on the CPU, so it has ended
    seconds = time.perf_counter() - start
    peak = torch.cuda.max_memory_reserved() if cuda else high_water()
    return seconds, peak / 1e9, len(passes)


def high_water() -> int:
    """Bytes that this process has held at most. (`ru_maxrss` counts those of its parent too.)"""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def load(args: argparse.Namespace) -> Generator:
    if args.model:
        from dpnet import load_model

        return load_model(str(Path(args.model).absolute()))
    torch.manual_seed(0)
    generator = build_generator(args.preset)
    nn.init.normal_(generator.out.weight, std=0.01)  # a new network does not look at the image
    return generator.to(memory_format=torch.channels_last).eval()  # type: ignore[call-overload,no-any-return]


def photograph(path: str | None, side: int) -> Tensor:
    """Uint8 1 3 side side: the file scaled to it, or waves and noise."""
    if path:
        from PIL import Image

        array: NDArray[np.uint8] = np.array(Image.open(path).convert("RGB").resize((side, side)))
        return torch.from_numpy(array).permute(2, 0, 1)[None]
    rng = np.random.default_rng(0)
    at = np.arange(side, dtype=np.float32)
    waves = [np.sin(at[:, None] / a + at / b) for a, b in ((9, 31), (17, 11), (40, 23))]
    values = 128 + 60 * np.stack(waves) + 10 * rng.standard_normal((3, side, side), np.float32)
    return torch.from_numpy(values.clip(0, 255).astype(np.uint8))[None]


def mask(side: int) -> Tensor:
    """Bool 1 1 side side, True = known: an object in the middle, a disc of a fifth of the side."""
    from_middle = (torch.arange(side) - (side - 1) / 2) ** 2
    return (from_middle[:, None] + from_middle > (side / 10) ** 2)[None, None]


def lama(side: int) -> tuple[float, float]:
    """(weights, multiply-adds of the convolutions) of LaMa-Fourier, counted on paper.

    Architecture: Suvorov et al., Resolution-robust Large Mask Inpainting with Fourier Convolutions
    (WACV 2022), and the generator's configuration `ffc_resnet_075` in the authors' repository
    (advimman/lama): 4 channels in, 64 wide, 3 downsamplings, 9 residual blocks of two fast Fourier
    convolutions with 3/4 global channels, no local Fourier unit. The count of weights comes to the
    27 M that the paper states. The Fourier transforms themselves are left out.
    """
    layers = [(4 * 64 * 49, 1.0)]  # (weights, pixels of its output as a share of the input's)
    layers += [(64 * 2**i * 128 * 2**i * 9, 4.0 ** -(i + 1)) for i in range(3)]
    own, far = 128, 384  # local and global channels of 512
    half = far // 2
    layers += 18 * [
        (9 * (own * own + 2 * own * far), 1 / 64),
        (2 * far * half, 1 / 64),  # into the spectral unit and out of it
        # On real and imaginary parts, of a real signal's half of the spectrum.
        ((2 * half) ** 2, (side // 16 + 1) / (side // 8) / 64),
    ]
    # A transposed convolution works once for each pixel of its input.
    layers += [(64 * 2**i * 128 * 2**i * 9, 4.0 ** -(i + 1)) for i in range(3)]
    layers += [(64 * 3 * 49, 1.0)]
    weights = sum(count for count, _ in layers)
    return weights, sum(count * share for count, share in layers) * side * side


if __name__ == "__main__":
    main()
