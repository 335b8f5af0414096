"""Checkpoints of a run on storage, written while training continues.

A checkpoint is a folder such as `step-00001000` in the run's folder. It holds the state, the log so
far and `checkpoint.json`, which is written last, by a conditional write. Without that file the
checkpoint does not exist. The file holds the hashes of the others, so every byte is checked before
use. Nothing is ever written into a folder with files. So a damaged checkpoint stays as it is, and
the same step goes to `step-00001000.2`.
"""

from __future__ import annotations

import io
import json
import logging
import re
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from contextvars import copy_context
from dataclasses import dataclass
from typing import Any

import torch

from data_prep.core.digest import sha256_bytes
from data_prep.core.errors import PipelineError, StorageError
from data_prep.core.lease import confirm_leases
from data_prep.core.record import parse_json
from data_prep.core.storage.store import Store
from dpnet.tracking.run_log import decode_log, encode_log
from dpnet.training.job import PATIENCE_S

_log = logging.getLogger(__name__)

FORMAT = 1
MARK, STATE, LOG = "checkpoint.json", "state.pt", "log.jsonl"
_WAIT_S = 5.0  # between two tries; the store itself retries for a minute each time
_FOLDER = re.compile(r"step-(\d{8,})(?:\.(\d+))?")

Log = list[dict[str, Any]]


@dataclass(frozen=True)
class Mark:
    """The content of a `checkpoint.json`."""

    folder: str  # key
    step: int
    score: float | None  # of the validation at this step, higher is better
    asked: Mapping[str, Any]  # the requested settings and digests
    files: Mapping[str, Mapping[str, Any]]  # size and sha256 of each
    finished: str = ""  # why training ended here; "" if it continues


@dataclass(frozen=True)
class Loaded:
    """A checkpoint with its state and log."""

    mark: Mark
    state: Any
    log: Log


def marks(store: Store, run: str) -> list[Mark]:
    """Return the checkpoints of a run, newest first.

    A checkpoint with an unreadable `checkpoint.json` is left out, with a warning. Raises
    PipelineError if the run has checkpoints and none is readable: a silent restart from step 0
    would lose the work.
    """
    found: list[tuple[tuple[int, int], Mark]] = []
    unreadable: list[tuple[tuple[int, int], str]] = []
    for entry in store.list(run):
        folder, _, name = entry.key.rpartition("/")
        match = _FOLDER.fullmatch(folder.rpartition("/")[2])
        if name != MARK or match is None:
            continue
        order = int(match[1]), int(match[2] or 1)
        try:
            found.append((order, _parse_mark(folder, order[0], store.read(entry.key))))
        except FileNotFoundError:
            continue  # deleted since it was listed
        except ValueError as error:
            _warn_damaged(store, folder, f"its {MARK} {error}")
            unreadable.append((order, f"{folder}/{MARK} {error}"))
    if unreadable and not found:
        raise PipelineError(
            f"none of the {len(unreadable)} checkpoints of {store.label}/{run} can be read:"
            f" {max(unreadable)[1]}. Use the version of dpnet that wrote them, or restore one from"
            " a backup. To train from the start, remove the run's folder, or change"
            " name or train.seed."
        )
    return [mark for _, mark in sorted(found, key=lambda each: each[0], reverse=True)]


def _parse_mark(folder: str, step: int, data: bytes) -> Mark:
    """Read a `checkpoint.json`. Raises ValueError with the rest of a sentence about it.

    Args:
        folder: Key of the checkpoint's folder.
        step: The step in the folder's name.
        data: The content of the file.
    """
    try:
        record = parse_json(data)
        number = record["format"]
    except (ValueError, KeyError, TypeError):
        raise ValueError("is damaged") from None
    if number != FORMAT:
        raise ValueError(f"has format {number}, and this version reads format {FORMAT}")
    try:
        mark = Mark(
            folder,
            int(record["step"]),
            record["score"],
            record["asked"],
            {name: dict(record["files"][name]) for name in (STATE, LOG)},
            record["finished"],
        )
    except (ValueError, KeyError, TypeError):
        raise ValueError("is damaged") from None
    scored = mark.score is None or isinstance(mark.score, int | float)
    if not (scored and isinstance(mark.asked, Mapping)):
        raise ValueError("is damaged")
    if mark.step != step:
        raise ValueError(f"is that of step {mark.step}")
    return mark


def load(store: Store, mark: Mark) -> Loaded:
    """Read a checkpoint and check every byte. Raises PipelineError if it is damaged."""
    data = {}
    for name, file in mark.files.items():
        try:
            data[name] = store.read(f"{mark.folder}/{name}")
        except FileNotFoundError:
            raise PipelineError(f"{name} is missing") from None
        if sha256_bytes(data[name]) != file.get("sha256"):
            raise PipelineError(f"{name} was altered or cut short")
    try:
        state = torch.load(io.BytesIO(data[STATE]), map_location="cpu", weights_only=True)
        log = decode_log(data[LOG])
    except Exception as error:
        raise PipelineError(f"it cannot be read ({type(error).__name__})") from error
    return Loaded(mark, state, log)


def newest(store: Store, run: str) -> Loaded | None:
    """Return the newest sound checkpoint, or None if the run has no checkpoints.

    Damaged ones are skipped with a warning. Raises PipelineError if all are damaged: a silent
    restart from step 0 would lose the work.
    """
    found = marks(store, run)
    _warn_unfinished(store, run, found)
    for mark in found:
        try:
            return load(store, mark)
        except StorageError:
            raise
        except PipelineError as error:
            _warn_damaged(store, mark.folder, str(error))
    if found:
        raise PipelineError(
            f"every checkpoint of {store.label}/{run} is damaged: restore one from a backup, or"
            " remove the run's folder to train from the start."
        )
    return None


def _warn_damaged(store: Store, folder: str, reason: str) -> None:
    _log.warning(
        "train: the checkpoint %s/%s is skipped: %s. It is not overwritten.",
        store.label,
        folder,
        reason,
    )


def _warn_unfinished(store: Store, run: str, found: Sequence[Mark]) -> None:
    """Warn if a checkpoint was being written when the run was interrupted."""
    marked = {mark.folder for mark in found}
    last = found[0].step if found else 0
    for folder in sorted(_folders(store, run) - marked):
        match = _FOLDER.fullmatch(folder.rpartition("/")[2])
        if match and int(match[1]) > last and not store.exists(f"{folder}/{MARK}"):
            _log.warning(
                "train: the checkpoint %s/%s was never finished: training resumes from step %d",
                store.label,
                folder,
                last,
            )


def _folders(store: Store, run: str) -> set[str]:
    """Return the keys of checkpoint folders, finished or not."""
    keys = {entry.key.rpartition("/")[0] for entry in store.list(run)}
    return {key for key in keys if _FOLDER.fullmatch(key.rpartition("/")[2])}


def check_requested(mark: Mark, requested: Mapping[str, Any], root: str) -> None:
    """Raise PipelineError with the differing options, unless the checkpoint fits the request."""
    if differ := differences(mark.asked, requested):
        raise PipelineError(
            f"the checkpoint {root}/{mark.folder} was made with {', '.join(differ[:5])}: use the"
            " config that made it, or remove the run's folder to train from the start."
        )


def differences(stored: Mapping[str, Any], requested: Mapping[str, Any]) -> list[str]:
    """Return the options that differ, with both values, such as "train.batch_size 16, not 8"."""
    ours, theirs = _leaves(requested), _leaves(stored)
    names = sorted(ours.keys() | theirs.keys())
    return [
        f"{name} {theirs.get(name, 'unset')}, not {ours.get(name, 'unset')}"
        for name in names
        if ours.get(name) != theirs.get(name)
    ]


def _leaves(tree: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """Return the values of a nested mapping by their dotted names."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            found |= _leaves(value, f"{before}{name}.")
        else:
            found[f"{before}{name}"] = value
    return found


class Writer:
    """Write the checkpoints of one run in a thread, one at a time.

    Args:
        store: The root.
        run: Key of the run's folder.
        requested: The requested settings and digests; each checkpoint stores them.
        last: How many of the newest checkpoints to keep.
        best: How many checkpoints with the highest scores to keep as well.
        fixed: Steps that always keep their checkpoints.
        patience: Seconds to retry a write that storage refuses.
    """

    def __init__(
        self,
        store: Store,
        run: str,
        requested: Mapping[str, Any],
        *,
        last: int,
        best: int,
        fixed: Sequence[int] = (),
        patience: float = PATIENCE_S,
    ) -> None:
        self.store, self.run, self.requested = store, run, requested
        self.last, self.best, self.fixed, self.patience = last, best, set(fixed), patience
        self._pool = ThreadPoolExecutor(1, "dpnet-checkpoint")
        self._pending: Future[None] | None = None
        self._closed = threading.Event()

    def save(
        self, step: int, state: Any, log: Log, score: float | None = None, finished: str = ""
    ) -> None:
        """Start writing a checkpoint, after waiting for the one before it.

        Raises the error of the one before it.

        Args:
            step: Steps done so far.
            state: A state that torch can save.
            log: All records so far.
            score: Score of the validation at this step, higher is better; None without one.
            finished: Why training ends here, or "".
        """
        self.wait()
        lines = encode_log(log)
        run = copy_context().run  # with the leases around this call
        self._pending = self._pool.submit(run, self._write, step, state, lines, score, finished)

    def wait(self) -> None:
        """Wait until the current checkpoint is written. Raises the error of writing it."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def close(self) -> None:
        """Wait for a running try, but do not retry."""
        self._closed.set()
        self._pool.shutdown(wait=True)

    def _write(self, step: int, state: Any, log: bytes, score: float | None, finished: str) -> None:
        buffer = io.BytesIO()
        torch.save(state, buffer)
        files = {STATE: buffer.getvalue(), LOG: log}
        record = {
            "format": FORMAT,
            "step": step,
            "score": score,
            "finished": finished,
            "asked": self.requested,
            "files": {
                name: {"size": len(data), "sha256": sha256_bytes(data)}
                for name, data in files.items()
            },
        }
        deadline = time.monotonic() + self.patience
        warned = False
        while True:
            try:
                self._put(step, files, json.dumps(record, indent=1).encode())
                break
            except StorageError as error:
                if self._closed.is_set() or time.monotonic() > deadline:
                    # Not a StorageError: Ray takes that for a temporary problem, and would restart
                    # the workers from the last checkpoint.
                    raise PipelineError(str(error)) from error
                if not warned:
                    warned = True
                    _log.warning(
                        "train: the checkpoint of step %d cannot be written yet: %s Training"
                        " continues, and the write is retried for %d minutes.",
                        step,
                        error,
                        round(self.patience / 60),
                    )
                self._closed.wait(_WAIT_S)
        if warned:
            _log.info("train: the checkpoint of step %d is written now.", step)
        try:
            self._prune()
        except StorageError:
            pass  # the next call deletes the remaining files

    def _put(self, step: int, files: Mapping[str, bytes], mark: bytes) -> None:
        confirm_leases()
        folder = self._new_folder(step)
        for name, data in files.items():
            self.store.write(f"{folder}/{name}", data)
        confirm_leases()
        if self.store.create(f"{folder}/{MARK}", mark) is None:
            raise PipelineError(
                f"{self.store.label}/{folder} was written by another run of the same training: stop"
                " one of the two."
            )

    def _new_folder(self, step: int) -> str:
        """Return an empty folder for this step."""
        name = f"{self.run}/step-{step:08d}"
        number = 1
        while True:
            folder = name if number == 1 else f"{name}.{number}"
            if next(self.store.list(folder), None) is None:
                return folder
            number += 1

    def _prune(self) -> None:
        """Delete checkpoints that are not kept, and files of unfinished ones."""
        confirm_leases()
        found = marks(self.store, self.run)
        scored = sorted((m for m in found if m.score is not None), key=_rank, reverse=True)
        kept = {mark.folder for mark in [*found[: self.last], *scored[: self.best]]}
        kept |= {mark.folder for mark in found if mark.step in self.fixed}
        marked = {mark.folder for mark in found}
        unfinished = {
            folder
            for folder in _folders(self.store, self.run) - marked
            if not self.store.exists(f"{folder}/{MARK}")
        }
        for folder in (marked - kept) | unfinished:
            self.store.delete(
                f"{folder}/{MARK}"
            )  # first, so that no marked checkpoint is incomplete
            for entry in list(self.store.list(folder)):
                self.store.delete(entry.key)
            if top := self.store.local_folder:
                with suppress(OSError):
                    (top / folder).rmdir()


def _rank(mark: Mark) -> tuple[float, int]:
    assert mark.score is not None
    return mark.score, mark.step
