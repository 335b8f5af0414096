"""Temporary files: where they are, and errors that name their folder and not the root."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, cast

from data_prep.core.errors import StorageError
from data_prep.core.scratch import scratch_folder

_TOO_MANY_FILES = (errno.EMFILE, errno.ENFILE)


def temporary_folder() -> str:
    """Return the folder of temporary files: TMPDIR, else a usual one."""
    try:
        return tempfile.gettempdir()
    except OSError:  # none can be used
        return "TMPDIR"


@contextmanager
def naming_temporary_folder() -> Iterator[None]:
    """Raise errors in using a temporary file as StorageErrors that say so.

    An error about too many open files passes: another folder does not help.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _TOO_MANY_FILES:
            raise
        reason = os.strerror(error.errno).lower() if error.errno else str(error)
        raise StorageError(
            f"cannot use the temporary folder {temporary_folder()}: {reason}. Free some space"
            " there, or set TMPDIR to another folder, and run the same command again. It resumes."
        ) from error


@contextmanager
def temporary_file(purpose: str) -> Iterator[BinaryIO]:
    """Open a new temporary file with a name, and remove it at the end.

    It is in a scratch folder, so that the next start removes it after a kill. Write to it inside
    of `naming_temporary_folder`.

    Args:
        purpose: part of the folder's name.
    """
    with ExitStack() as stack:
        with naming_temporary_folder():
            top = Path(tempfile.gettempdir())
            folder = stack.enter_context(scratch_folder(f"{purpose}-", top))
            prefix = f"dpnet-{purpose}-"
            file = tempfile.NamedTemporaryFile(prefix=prefix, dir=folder)  # noqa: SIM115
        try:
            yield cast("BinaryIO", file)
        finally:
            with suppress(OSError):  # what was not flushed does not fit either
                file.close()


@contextmanager
def nameless_file() -> Iterator[BinaryIO]:
    """Open a new temporary file without a name, so that a kill leaves no file behind."""
    with naming_temporary_folder():
        file = tempfile.TemporaryFile()  # noqa: SIM115
    try:
        yield cast("BinaryIO", file)
    finally:
        with suppress(OSError):
            file.close()
