"""Checkpoints of a run on storage: written beside the training, whole or not at all.

A checkpoint is a folder `step-00001000` of the run's folder with the state, the log so far and
`checkpoint.json`. That one is written last, by a conditional write, and holds the hashes of the
others: without it the checkpoint does not exist, and with it every byte is checked before it is
trusted. A folder that has anything in it is never written into again, so what is damaged stays as
it is and the same step goes to `step-00001000.2`.
"""

from __future__ import annotations

import io
import json
import re
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch

from data_prep.core.digest import sha256_bytes
from data_prep.core.errors import PipelineError, StorageError
from data_prep.core.progress import say
from data_prep.core.storage.store import Store
from dpnet.tracking.run_log import decode_log, encode_log

FORMAT = 1
MARK, STATE, LOG = "checkpoint.json", "state.pt", "log.jsonl"
PATIENCE_S = 600.0  # for how long a write is tried again while storage refuses it
_WAIT_S = 5.0  # between two tries; the store itself has tried for a minute
_FOLDER = re.compile(r"step-(\d{8,})(?:\.(\d+))?")

Log = list[dict[str, Any]]


@dataclass(frozen=True)
class Mark:
    """A checkpoint as its `checkpoint.json` tells it."""

    folder: str  # key
    step: int
    score: float | None  # of the validation at this step, higher is better
    asked: Mapping[str, Any]  # what the run was asked for: settings and digests
    files: Mapping[str, Mapping[str, Any]]  # size and sha256 of each
    finished: str = ""  # why training ended here, empty where it goes on


@dataclass(frozen=True)
class Loaded:
    mark: Mark
    state: Any
    log: Log


def marks(store: Store, run: str) -> list[Mark]:
    """The checkpoints of a run, the newest first; those whose mark cannot be read are left out,
    with a warning."""
    found = []
    for entry in store.list(run):
        folder, _, name = entry.key.rpartition("/")
        match = _FOLDER.fullmatch(folder.rpartition("/")[2])
        if name != MARK or match is None:
            continue
        order = int(match[1]), int(match[2] or 1)
        try:
            record = json.loads(store.read(entry.key))
            mark = Mark(
                folder,
                int(record["step"]),
                record["score"],
                record["asked"],
                {name: dict(record["files"][name]) for name in (STATE, LOG)},
                record["finished"],
            )
            if record["format"] != FORMAT or mark.step != order[0]:
                raise ValueError(record["format"])
        except FileNotFoundError:
            continue  # deleted meanwhile
        except (ValueError, KeyError, TypeError):
            say(_damaged(store, folder, "its checkpoint.json is not one of this version"))
            continue
        found.append((order, mark))
    return [mark for _, mark in sorted(found, key=lambda each: each[0], reverse=True)]


def load(store: Store, mark: Mark) -> Loaded:
    """A checkpoint with every byte checked. Raises PipelineError where it is damaged."""
    data = {}
    for name, file in mark.files.items():
        try:
            data[name] = store.read(f"{mark.folder}/{name}")
        except FileNotFoundError:
            raise PipelineError(f"{name} is missing") from None
        if sha256_bytes(data[name]) != file["sha256"]:
            raise PipelineError(f"{name} was altered or cut short")
    try:
        state = torch.load(io.BytesIO(data[STATE]), map_location="cpu", weights_only=True)
        log = decode_log(data[LOG])
    except Exception as error:
        raise PipelineError(f"it cannot be read ({type(error).__name__})") from error
    return Loaded(mark, state, log)


def newest(store: Store, run: str) -> Loaded | None:
    """The newest checkpoint that is sound; None where the run has none.

    Damaged ones are passed over with a warning. Raises PipelineError where all of them are: to
    train afresh without a word would lose the work.
    """
    found = marks(store, run)
    _tell_unfinished(store, run, found)
    for mark in found:
        try:
            return load(store, mark)
        except StorageError:
            raise
        except PipelineError as error:
            say(_damaged(store, mark.folder, str(error)))
    if found:
        raise PipelineError(
            f"none of the {len(found)} checkpoints of {store.uri}/{run} is sound: restore one from"
            " a copy, or remove the run's folder to train afresh."
        )
    return None


def _damaged(store: Store, folder: str, reason: str) -> str:
    return (
        f"warning: the checkpoint {store.uri}/{folder} is passed over: {reason}; it is not written"
        " over."
    )


def _tell_unfinished(store: Store, run: str, found: Sequence[Mark]) -> None:
    """Say which checkpoint, if any, was being written when the run was cut off."""
    marked = {mark.folder for mark in found}
    last = found[0].step if found else 0
    for folder in sorted(_folders(store, run) - marked):
        match = _FOLDER.fullmatch(folder.rpartition("/")[2])
        if match and int(match[1]) > last:
            say(
                f"warning: the checkpoint {store.uri}/{folder} was never finished:"
                f" {'that of step ' + str(last) if last else 'the start'} is taken."
            )


def _folders(store: Store, run: str) -> set[str]:
    """Keys of the folders of checkpoints, finished or not."""
    keys = {entry.key.rpartition("/")[0] for entry in store.list(run)}
    return {key for key in keys if _FOLDER.fullmatch(key.rpartition("/")[2])}


def check_requested(mark: Mark, asked: Mapping[str, Any], where: str) -> None:
    """Raise PipelineError, which names what differs, unless the checkpoint is of what is asked."""
    if differ := differences(mark.asked, asked):
        raise PipelineError(
            f"the checkpoint {where}/{mark.folder} was made with {', '.join(differ[:5])}: run with"
            " the config that it was made with, or remove the run's folder to train afresh."
        )


def differences(there: Mapping[str, Any], asked: Mapping[str, Any]) -> list[str]:
    """Each option that differs, with both values: "train.batch_size 16, not 8"."""
    ours, theirs = _leaves(asked), _leaves(there)
    names = sorted(ours.keys() | theirs.keys())
    return [
        f"{name} {theirs.get(name, 'unset')}, not {ours.get(name, 'unset')}"
        for name in names
        if ours.get(name) != theirs.get(name)
    ]


def _leaves(tree: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            found |= _leaves(value, f"{before}{name}.")
        else:
            found[f"{before}{name}"] = value
    return found


class Writer:
    """Writes the checkpoints of one run, one at a time, while training goes on.

    Args:
        last: how many of the newest are kept; best: how many more of those with the highest scores.
        fixed: steps whose checkpoints are kept whatever comes later.
    """

    def __init__(
        self,
        store: Store,
        run: str,
        asked: Mapping[str, Any],
        *,
        last: int,
        best: int,
        fixed: Sequence[int] = (),
        patience: float = PATIENCE_S,
    ) -> None:
        self.store, self.run, self.asked = store, run, asked
        self.last, self.best, self.fixed, self.patience = last, best, set(fixed), patience
        self._pool = ThreadPoolExecutor(1, "dpnet-checkpoint")
        self._pending: Future[None] | None = None
        self._closed = threading.Event()

    def save(
        self, step: int, state: Any, log: Log, score: float | None = None, finished: str = ""
    ) -> None:
        """Begin to write; waits for the checkpoint before this one, and raises what it raised."""
        self.wait()
        lines = encode_log(log)
        self._pending = self._pool.submit(self._write, step, state, lines, score, finished)

    def wait(self) -> None:
        """Until the checkpoint that is being written is there. Raises what its writing raised."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def close(self) -> None:
        """Wait for a try that is under way, but not for storage to come back."""
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
            "asked": self.asked,
            "files": {
                name: {"size": len(data), "sha256": sha256_bytes(data)}
                for name, data in files.items()
            },
        }
        deadline = time.monotonic() + self.patience
        told = False
        while True:
            try:
                self._put(step, files, json.dumps(record, indent=1).encode())
                break
            except StorageError as error:
                if self._closed.is_set() or time.monotonic() > deadline:
                    # No StorageError any more, of which whoever runs this would think that it may
                    # pass, and take up the last checkpoint.
                    raise PipelineError(str(error)) from error
                if not told:
                    told = True
                    say(
                        f"warning: the checkpoint of step {step} cannot be written yet ({error})"
                        " Training goes on, and it is tried again for"
                        f" {round(self.patience / 60)} minutes."
                    )
                self._closed.wait(_WAIT_S)
        if told:
            say(f"the checkpoint of step {step} is written now.")
        try:
            self._prune()
        except StorageError:
            pass  # the next one deletes what this one could not

    def _put(self, step: int, files: Mapping[str, bytes], mark: bytes) -> None:
        folder = self._new_folder(step)
        for name, data in files.items():
            self.store.write(f"{folder}/{name}", data)
        if self.store.create(f"{folder}/{MARK}", mark) is None:
            raise PipelineError(
                f"{self.store.uri}/{folder} was written by another run of the same training: stop"
                " one of the two."
            )

    def _new_folder(self, step: int) -> str:
        """A folder of this step in which there is nothing."""
        name = f"{self.run}/step-{step:08d}"
        number = 1
        while True:
            folder = name if number == 1 else f"{name}.{number}"
            if next(self.store.list(folder), None) is None:
                return folder
            number += 1

    def _prune(self) -> None:
        """Delete the checkpoints that need not be kept, and leftovers of ones never finished."""
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
            self.store.delete(f"{folder}/{MARK}")  # first, so that it is never half there
            for entry in list(self.store.list(folder)):
                self.store.delete(entry.key)
            if top := self.store.local_folder:
                with suppress(OSError):
                    (top / folder).rmdir()


def _rank(mark: Mark) -> tuple[float, int]:
    assert mark.score is not None
    return mark.score, mark.step
