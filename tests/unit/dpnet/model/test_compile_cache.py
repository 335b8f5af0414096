"""Compiled code is kept where only this user can write, not under a name in /tmp."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from dpnet.model.compile_cache import VARIABLE, use_private_cache

IMPORT = """
import dpnet.model
import torch._dynamo  # it makes the folder
"""
COMPILE = """
import torch
from dpnet.training.step import compiler_problem
raise SystemExit(compiler_problem(torch.device("cpu")))
"""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(VARIABLE, "to be restored")
    monkeypatch.delenv(VARIABLE)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def test_it_is_in_the_users_home_and_private_whatever_the_umask_is(home: Path) -> None:
    before = os.umask(0)
    try:
        use_private_cache()
    finally:
        os.umask(before)
    folder = Path(os.environ[VARIABLE])
    assert folder == home / ".cache" / "dpnet" / "compiled"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_without_a_home_it_is_a_new_private_folder(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/proc")
    monkeypatch.setattr("tempfile.tempdir", str(home))
    use_private_cache()
    folder = Path(os.environ[VARIABLE])
    assert folder.parent == home
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_the_users_own_choice_stays(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "/of/the/user")
    use_private_cache()
    assert os.environ[VARIABLE] == "/of/the/user"


def test_the_network_sets_it_before_torch_makes_the_folder(home: Path, tmp_path: Path) -> None:
    done = run(IMPORT, tmp_path / "temporary")
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "temporary").iterdir()) == []
    assert (home / ".cache" / "dpnet" / "compiled").is_dir()


@pytest.mark.slow
def test_compiled_code_is_kept_there(home: Path, tmp_path: Path) -> None:
    done = run(COMPILE, tmp_path / "temporary")
    if done.returncode:
        pytest.skip(f"torch.compile does not work here: {done.stderr}")
    assert list((home / ".cache" / "dpnet" / "compiled").iterdir())
    assert list((tmp_path / "temporary").iterdir()) == []


def run(code: str, temporary: Path) -> subprocess.CompletedProcess[str]:
    temporary.mkdir()
    environment = {**os.environ, "TMPDIR": str(temporary)}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
