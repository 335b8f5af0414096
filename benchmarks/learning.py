"""A short training with the real loader, which must lower the loss.

    python benchmarks/learning.py --data DIR [--seconds 120] [--preset base] [--batch 16] [--json]

DIR is a folder of `benchmarks/gpu_data.py`. Each step takes the next batch of the loader, as
training does. The L1 loss in the hole depends on the batch, so it is divided by that of a smooth
fill of the same holes. `loss_of_start` is the mean of this share over the last tenth of the steps,
divided by that over the first tenth. The script fails if it is not below 1. `speed` counts from the
second step, and includes the smooth fill, which training does not compute.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from compare import Row, report
from gpu_data import load_sets
from torch import Tensor
from training import OneProcess, job_on, step_of

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data_prep.core.storage.open import open_store
from dpnet.loading.batch import to_device
from dpnet.model.fill import pull_push
from dpnet.model.losses import l1_terms
from dpnet.training.job import TrainJob
from dpnet.training.loop import initial_state, open_loader

EVERY = 25  # steps between two lines
LEAST = 20  # steps; with fewer a tenth says nothing


def fill_loss(image: Tensor, valid: Tensor) -> Tensor:
    """Return the L1 loss in the hole of a smooth fill, a scalar on the device.

    Args:
        image: N3HW in [0, 1].
        valid: N1HW in {0, 1}; 1 is a known pixel.
    """
    known = torch.where(valid > 0, image, 0.0)
    mean = known.sum((2, 3), keepdim=True) / valid.sum((2, 3), keepdim=True).clamp(min=1)
    return l1_terms(pull_push(known, valid, mean), image, valid)[0]


def train(job: TrainJob, seconds: float) -> tuple[list[float], list[float], float]:
    """Train for some seconds, or to the last step of the job.

    Returns:
        Each step's loss; that of the smooth fill; and the images/s.
    """
    session: Any = OneProcess()
    device = session.device
    start = time.monotonic()
    loader = open_loader(job, session, open_store(job.root))
    step = step_of(job, initial_state(job, device), device)
    ours, fills, since = list[Tensor](), list[Tensor](), start
    batches = loader.batches(0, job.settings.steps)
    for number, batch in batches:
        image, valid = to_device(batch, device)
        ours.append(step(number, image, valid).losses["hole"])
        fills.append(fill_loss(image, valid))
        if number % EVERY == 0:  # reading a loss waits for the device
            print(
                f"step {number}, {time.monotonic() - start:.0f} s: hole L1 {float(ours[-1]):.4f},"
                f" smooth fill {float(fills[-1]):.4f}", flush=True,
            )  # fmt: skip
        if number == 0:
            since = time.monotonic()
        if time.monotonic() - start > seconds:
            break
    batches.close()
    losses = torch.stack(ours).tolist()
    rate = (len(ours) - 1) * job.settings.batch_size / (time.monotonic() - since)
    return losses, torch.stack(fills).tolist(), rate


def main() -> None:
    """Train, print the report, and fail if the loss did not fall."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--data", type=Path, required=True, metavar="DIR")
    parser.add_argument("--seconds", type=float, default=120.0, help="with the first step")
    parser.add_argument("--steps", type=int, default=10**7, help="stop after so many")
    parser.add_argument("--preset", default="tiny", choices=["tiny", "base", "large"])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rate", type=float, default=3e-4, help="learning rate")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    options = parser.parse_args()
    job = job_on(
        *load_sets(options.data), options.preset, options.batch, steps=options.steps, beta1=0.9,
        learning_rate=options.rate, warmup_steps=20,
    )  # fmt: skip
    ours, fills, rate = train(job, options.seconds)
    if len(ours) < LEAST:
        sys.exit(f"only {len(ours)} steps in {options.seconds:g} s, fewer than {LEAST}")
    share = [own / fill for own, fill in zip(ours, fills, strict=True)]
    tenth = len(ours) // 10
    rows = [Row("steps", [len(ours)], ""), Row("speed", [rate], "images/s")]
    ends = {"first": slice(tenth), "last": slice(-tenth, None)}
    for name, part in ends.items():
        rows += [
            Row(f"hole L1, {name} tenth", [statistics.mean(ours[part])], ""),
            Row(f"the smooth fill's, {name} tenth", [statistics.mean(fills[part])], ""),
            Row(f"share, {name} tenth", [statistics.mean(share[part])], ""),
        ]
    first, last = (statistics.mean(share[part]) for part in ends.values())
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    title = f"A training of {len(ours)} steps of {options.preset}, batch {options.batch}"
    report(
        f"{title}, {where}, torch {torch.__version__}", rows, {"loss_of_start": last / first},
        as_json=options.json,
    )  # fmt: skip
    if not last < first:  # true for NaN too
        sys.exit("the loss did not fall")


if __name__ == "__main__":
    main()
