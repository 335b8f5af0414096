"""Scratch folders: private, locked, removed at the end, and swept after a kill."""

from __future__ import annotations

import fcntl
import os
import signal
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from data_prep.core import scratch
from data_prep.core.scratch import LOCK, scratch_folder, sweep
from data_prep.core.temporary import temporary_file


@pytest.fixture
def top(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(scratch, "SCRATCH", tmp_path)
    return tmp_path


def names(folder: Path) -> set[str]:
    return {each.name for each in folder.iterdir()}


def test_only_unlocked_scratch_folders_are_swept(tmp_path: Path) -> None:
    for name in ("dpnet-ray-killed", "dpnet-x-in-use", "dpnet-ray-without-lock", "others"):
        (tmp_path / name / "session").mkdir(parents=True)
        if name != "dpnet-ray-without-lock":
            (tmp_path / name / LOCK).touch()
    with (tmp_path / "dpnet-x-in-use" / LOCK).open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        sweep(tmp_path)
    assert names(tmp_path) == {"dpnet-x-in-use", "dpnet-ray-without-lock", "others"}


def test_a_scratch_folder_is_locked_while_in_use_and_removed_at_the_end(top: Path) -> None:
    with scratch_folder("a-") as folder:
        (folder / "session").mkdir()
        with scratch_folder("b-") as other:
            assert names(top) == {folder.name, other.name}
        assert names(top) == {folder.name}
    assert names(top) == set()


def test_a_folder_of_another_user_is_left_alone(top: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (top / "dpnet-folder").mkdir()
    (top / "dpnet-folder" / LOCK).touch()
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with scratch_folder("a-") as folder:
        assert names(top) == {"dpnet-folder", folder.name}


def test_another_user_cannot_make_a_start_wait(top: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (top / "dpnet-trap").mkdir()
    os.mkfifo(top / "dpnet-trap" / LOCK)  # to open it waits until somebody writes
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with scratch_folder("a-") as folder:
        assert names(top) == {"dpnet-trap", folder.name}


def test_a_folder_of_the_user_with_another_lock_is_left_alone(top: Path) -> None:
    (top / "dpnet-photos").mkdir()
    (top / "dpnet-photos" / ".lock").touch()
    with scratch_folder("a-") as folder:
        assert names(top) == {"dpnet-photos", folder.name}


def test_a_temporary_file_is_private_on_the_users_disk_and_removed_at_the_end(
    top: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(disk))
    with temporary_file("a") as file:
        (folder,) = disk.iterdir()
        assert Path(file.name).parent == folder
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert names(top) == {"disk"}
        file.write(b"written")
        file.flush()
        assert Path(file.name).read_bytes() == b"written"
    assert names(disk) == set()


def test_a_scratch_folder_is_private_whatever_the_umask_is(top: Path) -> None:
    before = os.umask(0)
    try:
        with scratch_folder("a-") as folder:
            assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    finally:
        os.umask(before)


KILLED = """
import os, signal, sys, tempfile
from pathlib import Path
from data_prep.core import scratch
scratch.SCRATCH = Path(sys.argv[1])
tempfile.tempdir = sys.argv[1]
with begin("made-by-a-test-"):
    os.kill(os.getpid(), signal.SIGKILL)
"""
STARTERS = {
    "training": "from dpnet.training.ray.launch_local import prepare_start as begin",
    "ray map": "from dpnet.pipeline.ray_map import prepare_start as begin",
    "dpnet up": "from flows.local_server.supervisor import prepare_start as begin",
    "job driver": "from dpnet.training.ray.job_driver import scratch_folder as begin",
    "mlflow database": "from dpnet.tracking.mlflow_client import scratch_folder as begin",
    "shard": "from data_prep.shards.shards import temporary_file as begin",
    "table": "from data_prep.images.tables import temporary_file as begin",
    "pictures": "from dpnet.tracking.mlflow_follower import scratch_folder as begin",
}


@pytest.mark.parametrize("starter", STARTERS)
def test_the_next_start_removes_the_folder_of_a_killed_starter(top: Path, starter: str) -> None:
    code = f"{STARTERS[starter]}\n{KILLED}"
    killed = subprocess.run([sys.executable, "-c", code, str(top)], env=os.environ, check=False)
    assert killed.returncode == -signal.SIGKILL
    (leftover,) = names(top)
    with scratch_folder("new-") as new:
        assert names(top) == {new.name} != {leftover}
