"""The folder of a demo: claimed when it is new or empty, and only then ever cleared."""

from __future__ import annotations

import fcntl
import shutil
from contextlib import suppress
from pathlib import Path

from data_prep.core.errors import PipelineError, storage_error
from data_prep.core.paths import (
    EVALUATIONS,
    IMAGES,
    MASKS,
    MLFLOW_ARTIFACTS,
    MLFLOW_DATABASE,
    PHOTOS,
    PREFECT,
    REGISTRY,
    RETRAINS,
    RUNS,
    UP,
)
from data_prep.core.storage.local import LocalStore

MARKER = "made-by-dpnet-demo.txt"
_TEXT = b"`dpnet demo` made this folder; `dpnet demo --fresh` removes what it stored here.\n"
_MADE = (
    PHOTOS,
    IMAGES,
    MASKS,
    RUNS,
    EVALUATIONS,
    REGISTRY,
    RETRAINS,
    MLFLOW_DATABASE,
    MLFLOW_ARTIFACTS,
    PREFECT,
)


def claim_root(store: LocalStore) -> None:
    """Mark the folder as a demo's. Raises PipelineError if it holds something else."""
    if store.exists(MARKER):
        return
    hidden = (".probe-", ".staged-")  # what a command that was killed while writing may leave
    of_up = (UP, MLFLOW_DATABASE, MLFLOW_ARTIFACTS)
    there = [path.name for path in store.folder.iterdir()] if store.folder.is_dir() else []
    if UP in there:
        there = [name for name in there if name not in of_up]
    if any(not name.startswith(hidden) for name in there):
        raise PipelineError(
            f"{store.folder} is not empty and no demo made it: choose another --root, or use it"
            f" with `dpnet pipeline run demo --root {store.folder}`."
        )
    store.create(MARKER, _TEXT)


def clear_root(store: LocalStore) -> None:
    """Remove what the demo stored. Raises PipelineError where no demo was, or one is at work."""
    if not store.folder.exists():
        return
    if not store.exists(MARKER):
        raise PipelineError(
            f"{store.folder} was not made by `dpnet demo`, so --fresh removes nothing there:"
            " choose another --root."
        )
    _refuse_if_in_use(store.folder)
    for name in _MADE:
        path = store.folder / name
        try:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        except OSError as error:
            raise storage_error(error, str(path)) from error


def _refuse_if_in_use(folder: Path) -> None:
    """A running command holds such a lock, see `flows/local_server`."""
    for home in (PREFECT, UP):
        with suppress(FileNotFoundError), (folder / home / "lock").open("rb") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise PipelineError(
                    f"another dpnet command is at work in {folder}: stop it before --fresh."
                ) from None
