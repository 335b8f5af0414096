"""The training loop: fetch, step, log, validate, save.

Runs on one device of one rank. It knows nothing of Ray: what it needs of its surroundings is a
`Session`, and ranks speak to one another through torch.distributed. All randomness comes from the
seed and the step, so a run resumed from a checkpoint goes on exactly as an undisturbed one.
"""

from __future__ import annotations

import math
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist

from data_prep.core.errors import PipelineError
from data_prep.core.storage.open import open_store
from data_prep.core.storage.store import Store
from dpnet.loading.batch import to_device
from dpnet.loading.loader import Loader
from dpnet.loading.order import rank_cursors
from dpnet.loading.shard_cache import ShardCache
from dpnet.loading.shard_files import ShardFiles, check_enough, find_shards
from dpnet.model.config import preset
from dpnet.model_store.weights import load_generator
from dpnet.tracking.run_log import Journal
from dpnet.training.checkpoints import (
    PATIENCE_S,
    Loaded,
    Log,
    Writer,
    check_asked,
    load,
    marks,
    newest,
)
from dpnet.training.job import TrainJob, is_finished
from dpnet.training.settings import TrainSettings
from dpnet.training.step import Measured, Step, TrainState, compiler_problem, load_vgg
from dpnet.training.validation import Validation, mask_size

LOG_EVERY = 25  # steps that one record of the log averages, at most
NOTICE_EVERY = 10  # steps between two looks whether this machine is about to be taken away
T = TypeVar("T")


class Session(Protocol):
    """What the loop needs of whoever runs it. Every rank makes the same calls."""

    rank: int
    world: int
    local_world: int  # ranks on this machine
    device: torch.device
    node: str  # how whoever runs it calls this machine
    attempt: str  # names the start of training that this is part of

    def notice(self) -> bool:
        """Whether there is a new warning that a rank's machine will be taken away; the same answer
        on every rank."""


def train_loop(job: TrainJob, session: Session) -> bool:
    """Train from the newest checkpoint, or from the start, to the last step.

    Returns whether it came to the end: it leaves earlier, with everything saved, where a machine is
    about to be taken away.
    """
    settings, device = job.settings, session.device
    rank, world = session.rank, session.world
    store = open_store(job.root)
    patient = open_store(job.root, PATIENCE_S)  # for what training cannot go on without
    validation = Validation(patient, job)
    loader = open_loader(job, session, patient)
    state = initial_state(job, device)
    log, finished = resume(job, session, patient, state)
    if is_finished(job, state.step, finished):
        return True
    vgg = None
    if job.losses.vgg_weights is not None:
        vgg = load_vgg(Path(job.losses.vgg_weights), job.losses.vgg, device)
    backend, problem = choose_backend(settings.compile, device)
    bf16 = device.type == "cuda"
    options: dict[str, Any] = {"vgg": vgg, "world": world, "bf16": bf16, "backend": backend}
    step_fn = Step(state, job.losses, settings, **options)
    if state.step == 0:
        log.append(validation.measure(state.ema, 0, rank, world))
    tell = Teller(job, session, store, state.step, loader.size, problem)
    saver = None if rank else Saver(job, store)
    warned = False
    try:
        if world > 1 or backend is not None:
            if backend is not None:
                tell.status(state.step, log, "compiling the network's layers")
            own = len(rank_cursors(0, settings.batch_size, rank, world))
            step_fn.warm_up(max(1, own // settings.accumulate), loader.size, device)
        meter = Meter(loader, state, settings)
        with closing(loader.batches(state.step, settings.steps)) as batches:
            for step, batch in batches:
                image, valid = to_device(batch, device)
                weight = len(batch.image) * world / settings.batch_size
                meter.add(step_fn(step, image, valid, weight))
                last = state.step == settings.steps
                validate = last or state.step % settings.validate_every == 0
                save = last or state.step % settings.checkpoint_every == 0
                save |= state.step == settings.constant_until  # where a longer run can go on
                warned = state.step % NOTICE_EVERY == 0 and session.notice()
                if validate or save or warned or state.step % LOG_EVERY == 0:
                    # First of all: a state that is not finite is neither validated nor saved.
                    log.append(meter.record())
                    score = None
                    if validate:
                        with meter.aside():
                            log.append(validation.measure(state.ema, state.step, rank, world))
                        score = log[-1]["hole_psnr"]
                        save |= state.keep_best(score)
                        finished = early_stop(job, log)
                        tell.picture(state.step, lambda: validation.strip(state.ema))
                    if saver and (save or warned or finished):
                        with meter.aside():
                            saver.save(state, log, score, finished, now=warned)
                    tell.log(log)
                tell.status(state.step, log)
                if finished or warned:
                    break
        if saver:
            saver.wait()
    finally:
        if saver:
            saver.close()
        tell.close()
    return is_finished(job, state.step, finished)


def open_loader(job: TrainJob, session: Session, store: Store) -> Loader:
    """The loader of this rank. Raises PipelineError where the data cannot be trained on."""
    s = job.settings
    images = find_shards(store, job.images, "train")
    masks = find_shards(store, job.masks, "train")
    for shards in (images, masks):
        check_enough(shards, s.batch_size)
    cache = ShardCache(Path(s.cache).expanduser(), int(s.cache_gb * 1e9)) if s.cache else None
    cores = len(os.sched_getaffinity(0))
    return Loader(
        images,
        masks,
        ShardFiles(store, cache),
        size=mask_size(store, job.masks.folder),
        seed=s.seed,
        batch=s.batch_size,
        lanes=s.lanes,
        rank=session.rank,
        world=session.world,
        threads=s.loader_threads or max(1, cores // session.local_world),
        pin=session.device.type == "cuda",
        skip=s.on_bad_sample == "skip",
    )


def resume(job: TrainJob, session: Session, store: Store, state: TrainState) -> tuple[Log, str]:
    """Put the newest sound checkpoint into `state`, or what the run begins with.

    Returns the log so far, and why training ended there if it did.
    """
    loaded: Loaded | None = None
    if session.rank == 0:  # one looks, so that all take the same
        loaded = newest(store, job.folder) or _extended(job, store)
    folder = agreed(loaded.mark.folder if loaded else None, session)
    if folder is None:
        if job.init is not None:
            begin_with(state, *job.init)
        return [], ""
    if loaded is None:
        run = folder.rpartition("/")[0]
        loaded = load(store, next(mark for mark in marks(store, run) if mark.folder == folder))
    if folder.startswith(f"{job.folder}/"):
        check_asked(loaded.mark, job.asked, store.uri)
    state.from_dict(loaded.state, f"{store.uri}/{folder}")
    finished = loaded.mark.finished if folder.startswith(f"{job.folder}/") else ""
    return loaded.log, finished


def _extended(job: TrainJob, store: Store) -> Loaded | None:
    if job.extends is None:
        return None
    found = marks(store, job.extends.rpartition("/")[0])
    return next((load(store, mark) for mark in found if mark.folder == job.extends), None)


def begin_with(state: TrainState, uri: str, folder: str) -> None:
    """Start from the generator in `folder` of the store at `uri`; the discriminator is new."""
    generator = load_generator(open_store(uri), folder)
    if generator.config.to_json() != state.config.to_json():
        raise PipelineError(
            f"train.init_from names {uri}/{folder}, which is another network than `model` asks for:"
            " give it the same preset and switches, or leave train.init_from out."
        )
    for each in (state.generator, state.ema):
        each.load_state_dict(generator.state_dict())


def early_stop(job: TrainJob, log: Log) -> str:
    """Why training ends now, empty where it goes on."""
    patience = job.settings.patience
    if patience is None:
        return ""
    scores = [record["hole_psnr"] for record in log if record["kind"] == "validation"]
    since = len(scores) - 1 - scores.index(max(scores))
    if since < patience:
        return ""
    return f"{since} validations in a row without a better one"


def agreed(value: T, session: Session) -> T:
    """What rank 0 has, on every rank."""
    if session.world == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0, device=session.device)
    return values[0]


class Saver:
    """Rank 0's checkpoints."""

    def __init__(self, job: TrainJob, store: Store) -> None:
        s = job.settings
        kept = {"last": s.keep_checkpoints, "best": s.keep_best}
        self._writer = Writer(store, job.folder, job.asked, **kept, fixed=[s.constant_until])
        self._saved = -1

    def save(
        self, state: TrainState, log: Log, score: float | None, finished: str, *, now: bool
    ) -> None:
        """Begin to write; with `now` wait until it is written."""
        if state.step != self._saved:
            self._writer.save(state.step, state.to_dict(), list(log), score, finished)
            self._saved = state.step
        if now:
            self._writer.wait()

    def wait(self) -> None:
        self._writer.wait()

    def close(self) -> None:
        self._writer.close()


class Teller:
    """What rank 0 tells of the course of training."""

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
        self._about["workers"] = _gathered(_whereabouts(session), session)
        self._journal = None if session.rank else Journal(store, job.folder)

    def status(self, step: int, log: Log, doing: str = "") -> None:
        if self._journal:
            record: dict[str, Any] = {"step": step, "steps": self._steps, "records": len(log)}
            fresh = [r for r in log if r["kind"] != "train" or r["step"] > self._start]
            record |= {r["kind"]: r for r in fresh}  # the newest of each kind
            told = [note(fresh, self._problem), *[doing] * bool(doing)]
            self._journal.status({**self._about, **record, "note": ", ".join(told)})

    def log(self, log: Log) -> None:
        if self._journal:
            self._journal.log(log)

    def picture(self, step: int, draw: Callable[[], bytes]) -> None:
        if self._journal:
            self._journal.picture(step, draw())

    def close(self) -> None:
        if self._journal:
            self._journal.close()


def _whereabouts(session: Session) -> dict[str, Any]:
    process = {"host": socket.gethostname(), "pid": os.getpid()}
    return {"rank": session.rank, "node": session.node, **process}


def _gathered(value: T, session: Session) -> list[T]:
    """What every rank has, by rank."""
    if session.world == 1:
        return [value]
    values: list[Any] = [None] * session.world
    dist.all_gather_object(values, value)
    return values


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

    def __init__(self, loader: Loader, state: TrainState, settings: TrainSettings) -> None:
        self._loader, self._state, self._settings = loader, state, settings
        self._skipped = int(state.skipped)
        self._begin()

    def _begin(self) -> None:
        self._measured: list[Measured] = []
        self._start, self._aside, self._waited = time.monotonic(), 0.0, self._loader.waited

    def add(self, measured: Measured) -> None:
        self._measured.append(measured)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Time that is no training: validation and saving."""
        begun = time.monotonic()
        yield
        self._aside += time.monotonic() - begun

    def record(self) -> dict[str, Any]:
        """The log's record of the steps since the last one: means over their samples, times.

        The one place in which the host waits for the device. Raises PipelineError, with the first
        bad step, when more losses or gradients were not finite than may be skipped.
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
        """Of each step its losses, over the samples of all ranks, and its gradients' norms; and
        the samples skipped so far."""
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
    """The terms that are not finite, "the gradient" where it is that alone; empty where all are."""
    if bad := [name for name, value in losses.items() if not math.isfinite(value)]:
        return ", ".join(bad)
    return "" if all(map(math.isfinite, gradients.values())) else "the gradient"


def _halted(step: int, bad: str, allowed: int) -> str:
    before = f", after {allowed} such steps that were skipped" if allowed else ""
    return (
        f"training stopped at step {step}: the loss or its gradient is not finite ({bad}){before};"
        " nothing was trained on after it, and the last checkpoint is kept: lower"
        " train.learning_rate or train.gradient_clip, or let train.max_skipped such steps be left"
        " out."
    )


def _means(records: list[dict[str, float]]) -> dict[str, float]:
    """Mean of each name over the records that have it."""
    found: dict[str, list[float]] = {}
    for record in records:
        for name, value in record.items():
            found.setdefault(name, []).append(value)
    return {name: round(sum(values) / len(values), 6) for name, values in found.items()}


def note(log: Log, problem: str | None) -> str:
    """The newest of what the log tells of the course of training."""
    newest = {record["kind"]: record for record in log}
    parts = []
    if "train" in newest:
        record = newest["train"]
        if "hole" in record["losses"]:  # not where every step of it was skipped
            parts.append(f"L1 in the hole {record['losses']['hole']:.3f}")
        wait = record["data_seconds"] / max(record["seconds"], 1e-9)
        parts.append(f"{record['images_per_second']:.1f} images/s, {wait:.0%} waiting for data")
    last = newest["validation"]
    parts.append(f"validation {last['hole_psnr']:.2f} dB at step {last['step']}")
    if problem is not None:
        parts.append(f"not compiled ({problem})")
    return ", ".join(parts)
