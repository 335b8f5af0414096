"""The root of a demo: a new or empty folder is marked, and only a marked folder is cleared."""

from __future__ import annotations

import fcntl
import shutil
from contextlib import suppress
from pathlib import Path

from data_prep.core import paths
from data_prep.core.errors import ConfigError, PipelineError, storage_error
from data_prep.core.storage.local import LocalStore
from dpnet.tracking.mlflow_database import mlflow_database

MARKER = "made-by-dpnet-demo.txt"
_TEXT = b"`dpnet demo` made this folder; `dpnet demo --fresh` removes what it stored here.\n"
_OF_BOTH = (paths.MLFLOW_DATABASE, paths.MLFLOW_ARTIFACTS)  # the demo and `dpnet up` write them
_MADE = (
    paths.PHOTOS,
    paths.IMAGES,
    paths.MASKS,
    paths.RUNS,
    paths.EVALUATIONS,
    paths.REGISTRY,
    paths.RETRAINS,
    paths.PREFECT,
    *_OF_BOTH,
)


def claim_root(store: LocalStore) -> None:
    """Mark a folder as the root of a demo.

    Raises:
        PipelineError: the folder contains files of others.
    """
    if store.exists(MARKER):
        return
    temporary = (".probe-", ".staged-")  # a command that was killed may leave such files
    present = [path.name for path in store.folder.iterdir()] if store.folder.is_dir() else []
    if paths.UP in present:  # `dpnet up` may have used the folder first
        present = [name for name in present if name not in (paths.UP, *_OF_BOTH)]
    if any(not name.startswith(temporary) for name in present):
        raise ConfigError(
            f"{store.folder} is not empty and no demo made it: choose another --root, or use it"
            f" with `dpnet pipeline run demo --root {store.folder}`."
        )
    store.create(MARKER, _TEXT)


def clear_root(store: LocalStore) -> None:
    """Remove everything that a demo stored in its root, and nothing else.

    Raises:
        PipelineError: no demo made the folder, or a command is using it.
    """
    if not store.folder.exists():
        return
    if not store.exists(MARKER):
        raise ConfigError(
            f"{store.folder} was not made by `dpnet demo`, so --fresh removes nothing there:"
            " choose another --root."
        )
    _refuse_if_in_use(store.folder)
    made = [store.folder / name for name in _MADE]
    if database := mlflow_database(store):  # elsewhere for a root on a network disk
        made.append(database)
    for path in made:
        try:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        except OSError as error:
            raise storage_error(error, str(path)) from error


def _refuse_if_in_use(folder: Path) -> None:
    """Raise PipelineError if a running command holds a lock of `flows/local_server`."""
    for home in (paths.PREFECT, paths.UP):
        with suppress(FileNotFoundError), (folder / home / "lock").open("rb") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise PipelineError(
                    f"another dpnet command is using {folder}: stop it before --fresh."
                ) from None
