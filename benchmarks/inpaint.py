"""B9: fill the hole of a 512 x 512 and of a 2048 x 2048 photo, on the CPU and on a GPU.

    python benchmarks/inpaint.py [--preset base] [--model RUN] [--photo FILE] [--json]

It measures the time and the peak memory of `dpnet.inpainting.tiles.fill`, which `dpnet.inpaint` and
`dpnet inpaint` use. The photo has one hole in its middle, a disc with a fifth of the photo's side.
Each measurement runs in its own process. Peak memory is that of the whole process on the CPU, and
the memory that torch reserves on a GPU. The goal: 2048 x 2048 needs at most 4 GB.

Weights are random unless --model gives a run's folder; the time does not depend on them. This file
needs only torch and NumPy (with --photo also Pillow; with --model the whole package).

The report also shows the computed cost of a LaMa-class network, which is not run. See `lama`.
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
    """Measure every size on every device, and print the report."""
    args = parse_arguments()
    if args.one:
        print(json.dumps(measure(args, args.one)))
        return
    devices = [args.device] if args.device else ["cpu", *["cuda"] * torch.cuda.is_available()]
    rows: list[Row] = []
    ratios: dict[str, float] = {}
    for device in devices:
        for side in args.sides:
            times, peaks, passes = zip(*measure_in_processes(device, side, args), strict=True)
            name = f"{device} {side}^2"
            rows += [Row(name, times, "s"), Row(f"{name}, peak memory", peaks, "GB")]
            rows.append(Row(f"{name}, passes", passes, "of a tile"))
            if side == GOAL_SIDE:
                ratios[f"{device}_memory_of_goal"] = max(peaks) / GOAL_GB
    for side in args.sides:
        parameters, macs = lama(side)
        rows.append(Row(f"LaMa-class {side}^2, computed, not run", [macs / 1e9], "GMac"))
    rows.append(Row("LaMa-class, computed", [parameters / 1e6], "M weights"))
    what = args.model or f"{args.preset}, random weights"
    where = f"CPU with {torch.get_num_threads()} threads"
    if torch.cuda.is_available():
        where += f", {torch.cuda.get_device_name()}"
    title = f"Inpainting, {what}, tiles of {args.tile}, {where}, torch {torch.__version__}"
    report(title, rows, ratios, as_json=args.json)
    for name, share in ratios.items():
        fits = "fits" if share <= 1 else "does not fit"
        print(f"{name.split('_')[0]}: {GOAL_SIDE}^2 {fits} in {GOAL_GB:g} GB", file=sys.stderr)


def parse_arguments() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument(
        "--preset", choices=PRESETS, default="base", help="the network (default: base)"
    )
    parser.add_argument("--model", help="folder of a run with a trained model, instead of --preset")
    parser.add_argument("--photo", help="a photo, scaled to each size (default: a drawn image)")
    parser.add_argument(
        "--sides",
        type=int,
        nargs="+",
        default=[512, GOAL_SIDE],
        metavar="PIXELS",
        help=f"sides of the photos (default: 512 {GOAL_SIDE})",
    )
    parser.add_argument(
        "--tile", type=int, default=TILE, metavar="PIXELS", help=f"side of a tile (default: {TILE})"
    )
    parser.add_argument("--repeats", type=int, default=1, help="measurements each (default: 1)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="(default: all that exist)")
    parser.add_argument("--json", action="store_true", help="print one line of JSON at the end")
    parser.add_argument("--one", type=int, metavar="SIDE", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if min(args.sides) < 64:
        parser.error("--sides: give at least 64 pixels")
    return args


def measure_in_processes(
    device: str, side: int, args: argparse.Namespace
) -> list[tuple[float, float, int]]:
    """Run `measure` in new processes, as often as --repeats says."""
    given = [*sys.argv[1:], "--device", device, "--one", str(side)]
    found = []
    for number in range(args.repeats):
        print(f"{device} {side}: {number + 1} of {args.repeats}", file=sys.stderr)
        found.append(in_a_process([sys.executable, __file__, *given]))
    return found


def measure(args: argparse.Namespace, side: int) -> tuple[float, float, int]:
    """Fill one photo; return seconds, peak memory in GB (1e9 bytes) and forward passes."""
    cuda = args.device == "cuda"
    generator = load(args).to(args.device)
    # A GPU is slow in its first calls. A CPU only has to start its threads.
    small = min(side, args.tile) if cuda else 64
    fill(generator, photo(args.photo, small), mask(small), args.tile)
    image, valid = photo(args.photo, side), mask(side)
    passes: list[None] = []
    generator.register_forward_hook(lambda *_: passes.append(None))
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    fill(generator, image, valid, args.tile)  # the result is on the CPU, so the GPU has finished
    seconds = time.perf_counter() - start
    peak = torch.cuda.max_memory_reserved() if cuda else high_water()
    return seconds, peak / 1e9, len(passes)


def high_water() -> int:
    """Return the peak memory of this process in bytes (`ru_maxrss` includes the parent's)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def load(args: argparse.Namespace) -> Generator:
    """Return the generator of --model, or one of --preset with random weights."""
    if args.model:
        from dpnet import load_model

        return load_model(str(Path(args.model).absolute()))
    torch.manual_seed(0)
    generator = build_generator(args.preset)
    nn.init.normal_(generator.out.weight, std=0.01)  # 0 in a new network, which ignores the image
    return generator.to(memory_format=torch.channels_last).eval()  # type: ignore[call-overload,no-any-return]


def photo(path: str | None, side: int) -> Tensor:
    """Return uint8 1 3 side side: the scaled file, or waves and noise."""
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
    """Return bool 1 1 side side, True = known: the hole is a disc in the middle."""
    from_middle = (torch.arange(side) - (side - 1) / 2) ** 2
    return (from_middle[:, None] + from_middle > (side / 10) ** 2)[None, None]


def lama(side: int) -> tuple[float, float]:
    """Compute (weights, multiply-adds of the convolutions) of LaMa-Fourier for one image.

    The architecture is that of Suvorov et al., Resolution-robust Large Mask Inpainting with Fourier
    Convolutions (WACV 2022), with the generator's configuration `ffc_resnet_075` in the authors'
    repository (advimman/lama): 4 input channels, width 64, 3 downsamplings, 9 residual blocks of
    two fast Fourier convolutions with 3/4 global channels, no local Fourier unit. The sum of the
    weights is the 27 M that the paper states. The Fourier transforms themselves are not counted.
    """
    layers = [(4 * 64 * 49, 1.0)]  # (weights, pixels of the output as a share of the input's)
    layers += [(64 * 2**i * 128 * 2**i * 9, 4.0 ** -(i + 1)) for i in range(3)]
    near, far = 128, 384  # local and global channels of 512
    half = far // 2
    layers += 18 * [
        (9 * (near * near + 2 * near * far), 1 / 64),
        (2 * far * half, 1 / 64),  # into the spectral unit and out of it
        # On real and imaginary parts; the spectrum of a real signal has half the columns.
        ((2 * half) ** 2, (side // 16 + 1) / (side // 8) / 64),
    ]
    # A transposed convolution computes once for each pixel of its input.
    layers += [(64 * 2**i * 128 * 2**i * 9, 4.0 ** -(i + 1)) for i in range(3)]
    layers += [(64 * 3 * 49, 1.0)]
    weights = sum(count for count, _ in layers)
    return weights, sum(count * share for count, share in layers) * side * side


if __name__ == "__main__":
    main()
