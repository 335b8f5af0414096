"""Folders and files that only this user may read."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_prep.core.private_files import create_private, private_folder, private_opener


@pytest.fixture(autouse=True)
def open_umask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def test_a_new_folder_is_private_and_so_are_the_parents_it_needs(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir(mode=0o777)
    folder = private_folder(shared / "cache" / "dpnet")
    assert [mode(each) for each in (folder, folder.parent, shared)] == [0o700, 0o700, 0o777]


def test_an_older_folder_and_its_files_become_private(tmp_path: Path) -> None:
    (tmp_path / "up").mkdir(mode=0o777)
    (tmp_path / "up" / "prefect.db").touch(0o666)
    (tmp_path / "elsewhere").touch(0o666)
    (tmp_path / "up" / "link").symlink_to(tmp_path / "elsewhere")
    private_folder(tmp_path / "up")
    assert mode(tmp_path / "up") == 0o700
    assert mode(tmp_path / "up" / "prefect.db") == 0o600
    assert mode(tmp_path / "elsewhere") == 0o666  # it is outside of the folder


def test_a_new_file_is_private(tmp_path: Path) -> None:
    with open(tmp_path / "log", "wb", opener=private_opener):
        assert mode(tmp_path / "log") == 0o600


def test_a_file_is_created_private_and_whole_and_only_once(tmp_path: Path) -> None:
    create_private(tmp_path / "key", b"first")
    create_private(tmp_path / "key", b"second")
    assert (tmp_path / "key").read_bytes() == b"first"
    assert [path.name for path in tmp_path.iterdir()] == ["key"]
    assert mode(tmp_path / "key") == 0o600


KILLED = """
import os, signal, sys
from pathlib import Path
from data_prep.core.private_files import create_private
os.link = lambda *names: os.kill(os.getpid(), signal.SIGKILL)
create_private(Path(sys.argv[1]), b"old")
"""


def test_the_next_creation_removes_what_a_killed_one_left(tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED, str(tmp_path / "secret")]
    killed = subprocess.run(command, env=os.environ, check=False)
    assert killed.returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".secret-")
    create_private(tmp_path / "secret", b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["secret"]
    assert (tmp_path / "secret").read_bytes() == b"new"
