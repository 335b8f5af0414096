"""The training loop: fetch, step, log, validate, save.

Runs on one device of one rank. It knows nothing of Ray: what it needs of its surroundings is a
`Session`. All randomness comes from the seed and the step, so a run resumed from a checkpoint goes
on exactly as an undisturbed one.
"""

from __future__ import annotations

import json
import math
import tempfile
import time
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import torch

from data_prep.errors import PipelineError
from data_prep.storage import open_store
from dpnet.data import Samples, TrainingBatches
from dpnet.model.config import preset
from dpnet.step import Measured, Step, TrainState, compiler_problem, load_vgg
from dpnet.train import TrainJob
from dpnet.validation import Validation, to_device

LOG_EVERY = 25  # steps that one record of the log averages, at most
LOG = "log.jsonl"


class Session(Protocol):
    """What the loop needs of whoever runs it. Every rank makes the same calls."""

    rank: int
    world: int
    device: torch.device

    def latest(self) -> AbstractContextManager[Path | None]:
        """The folder of the newest checkpoint, or None."""

    def save(self, step: int, folder: Path | None) -> None:
        """Keep a checkpoint; only rank 0 gives its folder."""

    def progress(self, step: int, note: str) -> None: ...


def train_loop(job: TrainJob, session: Session) -> None:
    """Train from the newest checkpoint, or from the start, to the last step."""
    settings, device = job.settings, session.device
    store = open_store(job.root)
    digests = (job.images.content_digest, job.masks.content_digest)
    batches = TrainingBatches(
        Samples(store, job.images.folder, "train"),
        Samples(store, job.masks.folder, "train"),
        digests,
        seed=settings.seed,
        batch=settings.batch_size,
        rank=session.rank,
        world=session.world,
    )
    validation = Validation(
        Samples(store, job.images.folder, "val"), Samples(store, job.masks.folder, "eval"), job
    )
    state = initial_state(job, device)
    log: list[dict[str, Any]] = []
    with session.latest() as folder:
        if folder is not None:
            state.load(folder)
            log = [json.loads(line) for line in (folder / LOG).read_text().splitlines()]
    vgg = None
    if job.losses.vgg_weights is not None:
        vgg = load_vgg(Path(job.losses.vgg_weights), job.losses.vgg, device)
    backend, problem = choose_backend(settings.compile, device)
    step_fn = Step(
        state,
        job.losses,
        settings,
        vgg=vgg,
        world=session.world,
        bf16=device.type == "cuda",
        backend=backend,
    )
    if state.step == 0:
        log.append(validation.measure(state.ema, 0, session.rank, session.world))
    meter = Meter()
    for step, batch in batches.ahead(state.step, settings.steps):
        meter.add(step_fn(step, *to_device(batch, device)), len(batch.image) * session.world)
        last = state.step == settings.steps
        validate = last or state.step % settings.validate_every == 0
        save = last or state.step % settings.checkpoint_every == 0
        if validate or save or state.step % LOG_EVERY == 0:
            # First of all: a state that is not finite is neither validated nor saved.
            log.append(meter.record(state.step))
            if validate:
                log.append(validation.measure(state.ema, state.step, session.rank, session.world))
            if save:
                save_checkpoint(state, log, session)
            meter = Meter()
        session.progress(state.step, _note(log, problem))


def initial_state(job: TrainJob, device: torch.device) -> TrainState:
    """The state before the first step."""
    options = job.model.model_dump(exclude={"preset"})
    return TrainState(preset(job.model.preset, **options), job.settings, device)


def choose_backend(wanted: bool | None, device: torch.device) -> tuple[str | None, str | None]:
    """What compiles the step, or None; and why not, where it would have been compiled.

    None leaves it open: compiled on a GPU, if that works there. Raises PipelineError when it is
    wanted and does not work.
    """
    if wanted is False or (wanted is None and device.type != "cuda"):
        return None, None
    problem = compiler_problem(device)
    if problem is None:
        return "inductor", None
    if wanted:
        raise PipelineError(
            f"train.compile is true, but torch.compile does not work here ({problem}): install a"
            " C++ compiler (Debian, Ubuntu: apt-get install g++), for a GPU triton too, or leave"
            " the option out."
        )
    return None, problem


class Meter:
    """What the steps since the last record measured; it stays on the device until then."""

    def __init__(self) -> None:
        self.measured: list[Measured] = []
        self.images, self.start = 0, time.monotonic()

    def add(self, measured: Measured, images: int) -> None:
        self.measured.append(measured)
        self.images += images

    def record(self, step: int) -> dict[str, Any]:
        """The log's record of the steps up to `step`: means, images, seconds.

        The one place in which the host waits for the device. Raises PipelineError, with the first
        bad step, when a loss or a gradient was not finite.
        """
        scalars = [term for m in self.measured for group in m for term in group.values()]
        values = iter(torch.stack(scalars).tolist())  # one transfer for all of them
        seconds = time.monotonic() - self.start
        losses, gradients = [], []
        for number, m in enumerate(self.measured, step - len(self.measured) + 1):
            losses.append({name: next(values) for name in m.losses})
            gradients.append({name: next(values) for name in m.gradients})
            _check_finite(number, losses[-1], gradients[-1])
        return {
            "kind": "train",
            "step": step,
            "losses": _means(losses),
            "gradients": _means(gradients),
            "images": self.images,
            "seconds": round(seconds, 3),
        }


def _check_finite(step: int, losses: dict[str, float], gradients: dict[str, float]) -> None:
    bad = [name for name, value in losses.items() if not math.isfinite(value)]
    if bad or not all(map(math.isfinite, gradients.values())):
        raise PipelineError(
            f"training stopped at step {step}: the loss or its gradient is not finite"
            f" ({', '.join(bad) or 'the gradient'}); the last checkpoint is kept: lower"
            " train.learning_rate or train.gradient_clip."
        )


def _means(records: list[dict[str, float]]) -> dict[str, float]:
    """Mean of each name over the records that have it."""
    found: dict[str, list[float]] = {}
    for record in records:
        for name, value in record.items():
            found.setdefault(name, []).append(value)
    return {name: round(sum(values) / len(values), 6) for name, values in found.items()}


def save_checkpoint(state: TrainState, log: list[dict[str, Any]], session: Session) -> None:
    """Every rank calls; rank 0 writes."""
    if session.rank != 0:
        session.save(state.step, None)
        return
    with tempfile.TemporaryDirectory(prefix="dpnet-checkpoint-") as name:
        folder = Path(name)
        state.save(folder)
        (folder / LOG).write_text("".join(json.dumps(record) + "\n" for record in log))
        session.save(state.step, folder)


def _note(log: list[dict[str, Any]], problem: str | None) -> str:
    """The newest of what the log tells of the course of training."""
    newest = {record["kind"]: record for record in log}
    parts = []
    if "train" in newest:
        parts.append(f"L1 in the hole {newest['train']['losses']['hole']:.3f}")
    parts.append(f"validation {newest['validation']['hole_psnr']:.2f} dB")
    if problem is not None:
        parts.append(f"not compiled ({problem})")
    return ", ".join(parts)
