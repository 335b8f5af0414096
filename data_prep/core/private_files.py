"""Folders and files that only this user may read, whatever the umask is."""

from __future__ import annotations

import glob
import os
from contextlib import suppress
from pathlib import Path

from data_prep.core.digest import sha256_bytes
from data_prep.core.process_identity import boot, process_start

UMASK = 0o077  # for processes whose files may contain secrets


def private_folder(folder: Path) -> Path:
    """Create a folder that only this user may use, with private parents where they are missing.

    An older folder and the files in it become private.

    Raises:
        OSError: the folder cannot be created, or it belongs to another user.
    """
    for missing in reversed([each for each in folder.parents if not each.exists()]):
        missing.mkdir(mode=0o700, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)
    folder.chmod(0o700)
    for path in folder.iterdir():
        if path.is_file() and not path.is_symlink():
            make_private(path)
    return folder


def make_private(path: Path) -> None:
    """Take the rights of others from a file, if it exists and belongs to this user."""
    with suppress(FileNotFoundError, PermissionError):
        path.chmod(0o600)


def create_private(path: Path, data: bytes) -> None:
    """Create a private file with all its bytes in one step. Leave a file that exists as it is.

    Before that, remove the temporary files of processes of this machine that were killed here.
    """
    mine = f".{path.name}-{sha256_bytes(boot().encode())[:8]}-"
    for left in path.parent.glob(f"{glob.escape(mine)}*"):
        pid, _, started = left.name.removeprefix(mine).partition("-")
        if boot() and pid.isdecimal() and process_start(int(pid)) != started:
            left.unlink(missing_ok=True)
    new = path.with_name(f"{mine}{os.getpid()}-{process_start(os.getpid())}")
    try:
        with open(new, "wb", opener=private_opener) as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        with suppress(FileExistsError):
            os.link(new, path)  # another process can have made one
    finally:
        new.unlink(missing_ok=True)


def private_opener(path: str, flags: int) -> int:
    """Open a file like `open` does, but create it so that only this user may read it."""
    return os.open(path, flags, 0o600)
