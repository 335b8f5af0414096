"""Figures that were measured or published elsewhere, for plans in which nothing better is known.

docs/performance.md has the measured ones with their machines and dates.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from data_prep.core.tar_format import BLOCK

MEASURED_SIDE = 256  # pixels; decoding and preparing were measured with samples of this side
DECODE_MS = 0.49  # processor time of an image with its mask
PREPARE_MS = 2.93  # processor time of a photo of about 400 x 530 pixels
DECODE_SOURCE = (
    "0.49 ms of one core for each pair of 256 x 256 pixels (Xeon at 2.5 GHz, 2026-11-26)"
)
PREPARE_SOURCE = "2.93 ms of one core for each photo of 400 x 530 pixels (the same, 2026-11-22)"
# Bytes of a checkpoint: weights, average, best average and the optimiser's state, all float32.
STATE_BYTES = {"tiny": 7_160_000, "base": 222_600_000, "large": 762_000_000}
# Seconds between the loss of a machine and the next step, without the time until a new machine is
# there.
RESTART_GPU_S, RESTART_CPU_S = 246.0, 7.3
RESTART_SOURCES = {
    True: "246 s to compile again (H200, 2026-11-29; 34 s where the compiler's cache is kept)",
    False: "7.3 s until the next step (2 cores, 2026-11-26)",
}
# Photos of published datasets by layout. places2: Places365-Standard; celeba: img_align_celeba.
PUBLISHED: Mapping[str, Mapping[str, int]] = {
    "places2": {"train": 1_803_460, "val": 36_500, "test": 328_500},
    "celeba": {"train": 162_770, "val": 19_867, "test": 19_962},
    "celeba-hq": {"train": 30_000},
    "paris-street-view": {"train": 14_900, "test": 100},
    "bsds500": {"train": 200, "val": 100, "test": 200},
}
# Bytes of a stored pixel, without the tar's headers. Ours, rounded up: 256 x 256 JPEG of quality 95
# has about 30 KB.
PIXEL_BYTES = {"jpeg": 0.46, "png": 1.8, "webp": 0.35}
KEPT_BYTES = 150_000  # of an unchanged file, where the source is unknown
SIDECAR = 2 * BLOCK + 512  # two headers, and the block of the sample's JSON


@dataclass(frozen=True)
class Speed:
    """Images per second of one training worker, all steps, validations and checkpoints included.

    Attributes:
        workers: number of workers of the run that it was measured in.
        source: where it comes from, for people.
        batch: samples of one worker in one step there; 0 if unknown.
    """

    images_per_second: float
    workers: int
    source: str
    batch: int = 0


# Speeds of the benchmarks: (preset, side, GPUs) and the speed. docs/performance.md has them too.
BENCHMARKS: Mapping[tuple[str, int, bool], Speed] = {
    ("base", 256, True): Speed(
        113.0,
        1,
        "measured on an H200 with 16 cores on 2026-11-29 (torch 2.11, batch 16, bfloat16)",
        16,
    ),
    ("tiny", 64, False): Speed(
        28.2,
        2,
        "measured on 2 cores of a Xeon at 2.5 GHz on 2026-11-26 (batch 16, 2 workers)",
        8,
    ),
}


def benchmark_speed(preset: str, side: int, gpus: bool) -> Speed | None:
    """Return the measured speed of a network, or one scaled by the number of pixels, or None.

    Args:
        preset: of the network.
        side: of a sample, in pixels.
        gpus: whether each worker has a GPU.
    """
    for (name, measured, on_gpus), speed in BENCHMARKS.items():
        if (name, on_gpus) != (preset, gpus):
            continue
        if side == measured:
            return speed
        scaled = speed.images_per_second * (measured / side) ** 2
        source = f"{speed.source}, from {measured} to {side} pixels by the number of pixels"
        return Speed(scaled, speed.workers, source, speed.batch)
    return None
