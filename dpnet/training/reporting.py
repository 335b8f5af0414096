"""Measure and publish the steps: log records, status, validation images."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from data_prep.core.errors import PipelineError
from data_prep.core.storage.store import Store
from dpnet.loading.loader import Loader
from dpnet.tracking.run_log import Journal
from dpnet.training.checkpoints import Log
from dpnet.training.job import TrainJob
from dpnet.training.session import Session, describe_process, gather
from dpnet.training.settings import TrainSettings
from dpnet.training.state import TrainState
from dpnet.training.step import Measured


class Reporter:
    """Publish the status, the log and validation images of a run. Only rank 0 writes them.

    Args:
        job: The run.
        session: This rank. Creating a Reporter exchanges data between all ranks.
        store: The root.
        start: Step from which training starts or resumes.
        size: Side of the images in pixels.
        problem: Why the step is not compiled, or None.
    """

    def __init__(
        self,
        job: TrainJob,
        session: Session,
        store: Store,
        start: int,
        size: int,
        problem: str | None,
    ) -> None:
        self._problem, self._steps, self._start = problem, job.settings.steps, start
        self._about: dict[str, Any] = {"attempt": session.attempt, "resumed_from": start}
        self._about |= {"size": size, "gpus": session.device.type == "cuda"}
        self._about["workers"] = gather(describe_process(session), session)
        self._journal = None if session.rank else Journal(store, job.folder)
        self._newest: dict[str, dict[str, Any]] = {}  # the newest record of each kind
        self._seen = 0  # records of the log that were looked at

    def status(self, step: int, log: Log, activity: str = "") -> None:
        """Publish the step and the newest record of each kind.

        Args:
            step: Steps done so far.
            log: All records so far.
            activity: Current work other than training, such as compiling.
        """
        if self._journal:
            record: dict[str, Any] = {"step": step, "steps": self._steps, "records": len(log)}
            for each in log[self._seen :]:
                if each["kind"] != "train" or each["step"] > self._start:
                    self._newest[each["kind"]] = each
            self._seen = len(log)
            record |= self._newest
            newest = list(self._newest.values())
            parts = [status_line(newest, self._problem), *[activity] * bool(activity)]
            self._journal.status({**self._about, **record, "note": ", ".join(parts)})

    def log(self, log: Log) -> None:
        """Publish all records so far."""
        if self._journal:
            self._journal.log(log)

    def picture(self, step: int, draw: Callable[[], bytes]) -> None:
        """Publish the validation images that `draw` returns as a PNG."""
        if self._journal:
            self._journal.picture(step, draw())

    def close(self) -> None:
        """Wait until everything is published."""
        if self._journal:
            self._journal.close()


def status_line(log: Log, problem: str | None) -> str:
    """Return the newest figures of the log as text, and why the step is not compiled."""
    newest = {record["kind"]: record for record in log}
    parts = []
    if "train" in newest:
        record = newest["train"]
        if "hole" in record["losses"]:  # missing if every step of the record was skipped
            parts.append(f"L1 in the hole {record['losses']['hole']:.3f}")
        wait = record["data_seconds"] / max(record["seconds"], 1e-9)
        parts.append(f"{record['images_per_second']:.1f} images/s, {wait:.0%} waiting for data")
    last = newest["validation"]
    parts.append(f"validation {last['hole_psnr']:.2f} dB at step {last['step']}")
    if problem is not None:
        parts.append(f"not compiled ({problem})")
    return ", ".join(parts)


class Meter:
    """Measurements of the steps since the last log record. They stay on the device until then."""

    def __init__(self, loader: Loader, state: TrainState, settings: TrainSettings) -> None:
        self._loader, self._state, self._settings = loader, state, settings
        self._skipped = int(state.skipped)
        self._begin()

    def _begin(self) -> None:
        self._measured: list[Measured] = []
        self._start, self._aside, self._waited = time.monotonic(), 0.0, self._loader.waited

    def add(self, measured: Measured) -> None:
        """Add the measurements of one step."""
        self._measured.append(measured)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Count the time in the block as validation or saving, not as training."""
        begun = time.monotonic()
        yield
        self._aside += time.monotonic() - begun

    def record(self) -> dict[str, Any]:
        """Return the log record of the steps since the last one: mean losses, and times.

        The host waits for the device only here.

        Raises:
            PipelineError: More losses or gradients were not finite than may be skipped. The message
                names the first such step.
        """
        losses, gradients, skipped_samples = self._values()
        most, step, count = self._settings.max_skipped, self._state.step, len(self._measured)
        sound = []
        for at, number in enumerate(range(step - count + 1, step + 1)):
            if bad := _not_finite(losses[at], gradients[at]):
                self._skipped += 1
                if self._skipped > most:
                    raise PipelineError(_halted(number, bad, most))
            else:
                sound.append(at)
        training = time.monotonic() - self._start - self._aside
        images = count * self._settings.batch_size
        record = {
            "kind": "train",
            "step": step,
            "losses": _means([losses[at] for at in sound]),
            "gradients": _means([gradients[at] for at in sound]),
            "images": images,
            "workers": self._loader.world,
            "seconds": round(training, 3),
            "data_seconds": round(self._loader.waited - self._waited, 3),
            "other_seconds": round(self._aside, 3),
            "images_per_second": round(images / max(training, 1e-9), 2),
            "skipped_steps": self._skipped,
            "skipped_samples": skipped_samples,
        }
        if self._state.skipped.is_cuda:
            record["gpu_memory_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 3)
        self._begin()
        return record

    def _values(self) -> tuple[list[dict[str, float]], list[dict[str, float]], int]:
        """Copy the measurements from the device.

        Returns:
            For each step its losses, averaged over the samples of all ranks; for each step the
            norms of its gradients; the number of samples skipped so far.
        """
        device, world = self._state.skipped.device, self._loader.world
        skipped = torch.tensor(float(self._loader.skipped), device=device)
        of_losses = [m.weight / world * v for m in self._measured for v in m.losses.values()]
        shared = torch.stack([v.double() for v in [*of_losses, skipped]])
        if world > 1:
            dist.all_reduce(shared)
        norms = [v.double() for m in self._measured for v in m.gradients.values()]
        *numbers, total = torch.cat([torch.stack(norms), shared]).tolist()  # one transfer for all
        values = iter(numbers)
        gradients = [{name: next(values) for name in m.gradients} for m in self._measured]
        losses = [{name: next(values) for name in m.losses} for m in self._measured]
        return losses, gradients, int(total)


def _not_finite(losses: dict[str, float], gradients: dict[str, float]) -> str:
    """Return the names of the losses that are not finite, else "the gradient", else ""."""
    if bad := [name for name, value in losses.items() if not math.isfinite(value)]:
        return ", ".join(bad)
    return "" if all(map(math.isfinite, gradients.values())) else "the gradient"


def _halted(step: int, bad: str, allowed: int) -> str:
    before = f", after {allowed} such steps that were skipped" if allowed else ""
    return (
        f"training stopped at step {step}: the loss or its gradient is not finite ({bad}){before}."
        " Neither that step nor a later one has changed the weights. The last checkpoint is kept."
        " Lower train.learning_rate or train.gradient_clip, or raise train.max_skipped to skip such"
        " steps."
    )


def _means(records: list[dict[str, float]]) -> dict[str, float]:
    """Return the mean of each name over the records that have it."""
    found: dict[str, list[float]] = {}
    for record in records:
        for name, value in record.items():
            found.setdefault(name, []).append(value)
    return {name: round(sum(values) / len(values), 6) for name, values in found.items()}
