"""Scratch folders of a Ray on this machine: locked, removed, and swept after a kill."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dpnet.training.ray import start
from dpnet.training.ray.start import LOCK, RayStart, prepare_start, scratch_folder, sweep


@pytest.fixture
def top(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(start, "SCRATCH", tmp_path)
    return tmp_path


def names(folder: Path) -> set[str]:
    return {each.name for each in folder.iterdir()}


def test_only_unlocked_scratch_folders_are_swept(tmp_path: Path) -> None:
    for name in ("dpnet-ray-killed", "dpnet-ray-in-use", "dpnet-ray-without-lock", "others"):
        (tmp_path / name / "session").mkdir(parents=True)
        if name != "dpnet-ray-without-lock":
            (tmp_path / name / LOCK).touch()
    with (tmp_path / "dpnet-ray-in-use" / LOCK).open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        sweep(tmp_path)
    assert names(tmp_path) == {"dpnet-ray-in-use", "dpnet-ray-without-lock", "others"}


def test_a_scratch_folder_is_locked_while_in_use_and_removed_at_the_end(top: Path) -> None:
    with scratch_folder() as folder:
        (folder / "session").mkdir()
        with prepare_start() as other:
            assert names(top) == {folder.name, other.folder.name}
        assert names(top) == {folder.name}
    assert names(top) == set()


STARTERS = {
    "training": "from dpnet.training.ray.launch_local import prepare_start as begin; purpose = ''",
    "ray map": "from dpnet.pipeline.ray_map import prepare_start as begin; purpose = ''",
    "dpnet up": "from flows.local_server.supervisor import prepare_start as begin; purpose = 'up-'",
    "job driver": "from dpnet.training.ray.job_driver import scratch_folder as begin; purpose = ''",
}
KILLED = """
import os, signal, sys
from pathlib import Path
from dpnet.training.ray import start
start.SCRATCH = Path(sys.argv[1])
with begin(purpose):
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("starter", STARTERS)
def test_the_next_start_removes_the_folder_of_a_killed_starter(top: Path, starter: str) -> None:
    code = f"{STARTERS[starter]}\n{KILLED}"
    killed = subprocess.run([sys.executable, "-c", code, str(top)], env=os.environ, check=False)
    assert killed.returncode == -signal.SIGKILL
    (leftover,) = names(top)
    with prepare_start() as new:
        assert names(top) == {new.folder.name} != {leftover}


def test_both_ways_to_start_ray_use_the_scratch_folder(tmp_path: Path) -> None:
    prepared = RayStart(tmp_path)
    assert prepared.init_options(2, 1)["_temp_dir"] == str(tmp_path)
    assert f"--temp-dir={tmp_path}" in prepared.head_command(8265, 1)
    assert prepared.environment["RAY_USAGE_STATS_ENABLED"] == "0"
