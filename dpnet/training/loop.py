"""The training loop: fetch, step, log, validate, save.

It runs on one device of one rank and does not know Ray: everything around it is a `Session`. All
randomness comes from the seed and the step, so a run that resumes from a checkpoint ends with the
same weights as an undisturbed one.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import closing
from functools import partial
from pathlib import Path

import torch

from data_prep.core.errors import PipelineError, StorageError
from data_prep.core.lease import check_leases
from data_prep.core.storage.open import open_store
from data_prep.core.storage.store import Store
from dpnet.loading.batch import to_device
from dpnet.loading.loader import Loader
from dpnet.loading.order import rank_cursors
from dpnet.loading.shard_cache import ShardCache
from dpnet.loading.shard_files import ShardFiles, check_enough, find_shards
from dpnet.model.config import preset
from dpnet.model_store.find_model import PRETRAINED, find_model
from dpnet.model_store.weights import load_generator, read_config
from dpnet.training.checkpoints import (
    Loaded,
    Log,
    Writer,
    check_requested,
    load,
    marks,
    newest,
)
from dpnet.training.compile_progress import compile_progress
from dpnet.training.exported_state import load_state
from dpnet.training.job import PATIENCE_S, TrainJob, is_finished
from dpnet.training.reporting import Meter, Reporter
from dpnet.training.session import Session, share_from_first
from dpnet.training.state import TrainState
from dpnet.training.step import Step, compiler_problem
from dpnet.training.step_memory import advice, explained_out_of_memory, room_logged, step_memory
from dpnet.training.validation import Validation, mask_size
from dpnet.training.vgg import load_vgg

LOG_EVERY = 25  # most steps in one record of the log
NOTICE_EVERY = 10  # steps between two checks whether this machine will be taken away


def train_loop(job: TrainJob, session: Session) -> bool:
    """Train from the newest checkpoint, or from the start, to the last step.

    Returns:
        Whether the run is finished. If a machine will soon be taken away, the loop saves everything
        and returns False.
    """
    settings, device = job.settings, session.device
    rank, world = session.rank, session.world
    store = open_store(job.root)
    patient = open_store(job.root, PATIENCE_S)  # training cannot continue without this data
    validation = Validation(patient, job)
    loader = open_loader(job, session, patient)
    state = initial_state(job, device)
    log, finished = resume(job, session, patient, state)
    if is_finished(job, state.step, finished):
        return True
    backend, problem = choose_backend(settings.compile, device)
    train_step = _build_step(job, session, state, backend)
    if state.step == 0:
        log.append(validation.measure(state.ema, 0, rank, world))
    reporter = Reporter(job, session, store, state.step, loader.size, problem)
    saver = Saver(job, session, store)
    own = len(rank_cursors(0, settings.batch_size, rank, world))

    def advise(total: int) -> str:
        needs = step_memory(
            state.config,
            job.losses,
            loader.size,
            vgg=train_step.vgg,
            bf16=device.type == "cuda",
            checkpointing=settings.activation_checkpointing,
        )
        return advice(needs, total, own, settings.accumulate)

    with closing(reporter), closing(saver), explained_out_of_memory(advise):
        shape = (max(1, own // settings.accumulate), loader.size, device)
        if backend is not None:
            tell = partial(reporter.status, state.step, log)
            with room_logged(shape[0], device), compile_progress(tell) as progress:
                train_step.warm_up(*shape, progress.begin)
        elif world > 1:
            train_step.warm_up(*shape)
        meter = Meter(loader, state, settings)
        with closing(loader.batches(state.step, settings.steps)) as batches:
            for step, batch in batches:
                check_leases()
                image, valid = to_device(batch, device)
                weight = len(batch.image) * world / settings.batch_size
                meter.add(train_step(step, image, valid, weight))
                last = state.step == settings.steps
                validate = last or state.step % settings.validate_every == 0
                save = last or state.step % settings.checkpoint_every == 0
                save |= state.step == settings.constant_until  # a longer run can extend from here
                warned = state.step % NOTICE_EVERY == 0 and session.notice()
                if validate or save or warned or state.step % LOG_EVERY == 0:
                    # First, because it raises if the state is not finite: such a state must be
                    # neither validated nor saved.
                    log.append(meter.record())
                    score = None
                    if validate:
                        with meter.aside():
                            log.append(validation.measure(state.ema, state.step, rank, world))
                        score = log[-1]["hole_psnr"]
                        save |= state.keep_best(score)
                        finished = early_stop(job, log)
                        reporter.picture(state.step, lambda: validation.strip(state.ema))
                    if save or warned or finished:
                        with meter.aside():
                            saver.save(state, log, score, finished, now=warned)
                    reporter.log(log)
                reporter.status(state.step, log)
                if finished or warned:
                    break
        saver.wait()
    return is_finished(job, state.step, finished)


def open_loader(job: TrainJob, session: Session, store: Store) -> Loader:
    """Open the loader of this rank. Raises PipelineError if the data cannot be trained on."""
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


def _build_step(job: TrainJob, session: Session, state: TrainState, backend: str | None) -> Step:
    vgg = None
    if job.losses.vgg_weights is not None:
        vgg = load_vgg(Path(job.losses.vgg_weights), job.losses.vgg, session.device)
    state.generator.checkpointing = job.settings.activation_checkpointing
    return Step(
        state,
        job.losses,
        job.settings,
        vgg=vgg,
        world=session.world,
        bf16=session.device.type == "cuda",
        backend=backend,
    )


def resume(job: TrainJob, session: Session, store: Store, state: TrainState) -> tuple[Log, str]:
    """Load the newest sound checkpoint into `state`, or the generator that the run starts from.

    Args:
        job: The run.
        session: This rank. Every rank must call this.
        store: The root.
        state: The state before the first step. It is changed.

    Returns:
        The log up to there; and the reason for an early end if training has ended there, else "".
    """
    loaded: Loaded | None = None
    if session.rank == 0:  # only one rank chooses, so that all use the same checkpoint
        loaded = newest(store, job.folder) or _extended(job, store)
    folder = share_from_first(loaded.mark.folder if loaded else None, session)
    if folder is None:
        if job.init is not None:
            load_initial(state, *job.init, job.asked["sha256"])
        return [], ""
    if loaded is None:
        run = folder.rpartition("/")[0]
        loaded = load(store, next(mark for mark in marks(store, run) if mark.folder == folder))
    own = folder.startswith(f"{job.folder}/")
    if own:
        check_requested(loaded.mark, job.asked, store.label)
    state.from_dict(loaded.state, f"{store.label}/{folder}")
    return loaded.log, loaded.mark.finished if own else ""


def _extended(job: TrainJob, store: Store) -> Loaded | None:
    """Load the checkpoint of the shorter run that this run extends."""
    if job.extends is None:
        return None
    found = marks(store, job.extends.rpartition("/")[0])
    try:
        return load(store, next(mark for mark in found if mark.folder == job.extends))
    except StorageError:
        raise
    except (StopIteration, PipelineError) as error:
        raise PipelineError(
            f"training cannot start from the checkpoint {store.label}/{job.extends}"
            f" ({error or 'it is missing'}): restore it from a backup, or remove its folder, so"
            " that the same command chooses another start."
        ) from None


def load_initial(state: TrainState, uri: str, folder: str, sha256: Mapping[str, str]) -> None:
    """Start from a model: from its training state, or from its generator alone.

    Args:
        state: The state to change.
        uri: The store of the model, or "pretrained".
        folder: Key of its folder.
        sha256: Hash of the weights (init) and of the training state beside them (init_state).
            Without the second the discriminator is new.
    """
    if uri == PRETRAINED:
        store, folder, _ = find_model(PRETRAINED, None)
    else:
        store = open_store(uri)
    if read_config(store, folder)[0]["weights_sha256"] != sha256["init"]:
        raise PipelineError(
            f"the weights in {store.label}/{folder} are not those that this training was started"
            " with: restore them, or install the same version of dpnet on every machine."
        )
    generator = load_generator(store, folder)
    if generator.config.to_json() != state.config.to_json():
        raise PipelineError(
            f"train.init_from names {store.label}/{folder}, a network that differs from this"
            " config's: set the same preset and switches in `model`, or leave train.init_from out."
        )
    if "init_state" in sha256:
        load_state(state, store, folder, sha256["init_state"])
        return
    for each in (state.generator, state.ema):
        each.load_state_dict(generator.state_dict())


def early_stop(job: TrainJob, log: Log) -> str:
    """Return why training ends now, or "" if it continues."""
    patience = job.settings.patience
    if patience is None:
        return ""
    scores = [record["hole_psnr"] for record in log if record["kind"] == "validation"]
    since = len(scores) - 1 - scores.index(max(scores))
    if since < patience:
        return ""
    return f"{since} validations in a row without a better one"


class Saver:
    """Checkpoints of a run. Only rank 0 writes them."""

    def __init__(self, job: TrainJob, session: Session, store: Store) -> None:
        s = job.settings
        kept = {"last": s.keep_checkpoints, "best": s.keep_best}
        self._writer = None
        if session.rank == 0:
            self._writer = Writer(store, job.folder, job.asked, **kept, fixed=[s.constant_until])
        self._saved = -1

    def save(
        self, state: TrainState, log: Log, score: float | None, finished: str, *, now: bool
    ) -> None:
        """Start writing a checkpoint, at most once for each step.

        Args:
            state: The state to save.
            log: All records so far.
            score: Hole PSNR of the validation at this step, in dB, or None.
            finished: Why training ends here, or "".
            now: Wait until the checkpoint is written.
        """
        if self._writer is None:
            return
        if state.step != self._saved:
            self._writer.save(state.step, state.to_dict(), list(log), score, finished)
            self._saved = state.step
        if now:
            self._writer.wait()

    def wait(self) -> None:
        """Wait until all checkpoints are written."""
        if self._writer:
            self._writer.wait()

    def close(self) -> None:
        """Stop writing, without waiting for storage that does not answer."""
        if self._writer:
            self._writer.close()


def initial_state(job: TrainJob, device: torch.device) -> TrainState:
    """Return the state before the first step."""
    options = job.model.model_dump(exclude={"preset"})
    return TrainState(preset(job.model.preset, **options), job.settings, device)


def choose_backend(wanted: bool | None, device: torch.device) -> tuple[str | None, str | None]:
    """Choose the compiler of the step.

    Args:
        wanted: `train.compile`. None compiles on a GPU, if the compiler works there.
        device: The device of this rank.

    Returns:
        The backend of torch.compile, or None; and the problem that prevents compiling, or None.

    Raises:
        PipelineError: `wanted` is True and the compiler does not work.
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
