"""The start of a Ray on this machine: its token, its environment, its arguments."""

from __future__ import annotations

import os
import pwd
import stat
import sys
from pathlib import Path

import pytest

from data_prep.core import scratch
from dpnet.training.ray.start import RayStart, prepare_start


@pytest.fixture
def top(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(scratch, "SCRATCH", tmp_path)
    return tmp_path


def test_both_ways_to_start_ray_use_its_folder_inside_the_private_one(tmp_path: Path) -> None:
    prepared = RayStart(tmp_path)
    assert prepared.init_options(2, 1)["_temp_dir"] == str(tmp_path / "ray")
    assert f"--temp-dir={tmp_path / 'ray'}" in prepared.head_command(8265, 1)


@pytest.mark.usefixtures("top")
def test_every_start_has_its_own_token_in_a_private_file() -> None:
    before = os.umask(0)
    try:
        with prepare_start() as one, prepare_start() as other:
            assert len(one.token_file.read_text()) == 64
            assert one.token_file.read_text() != other.token_file.read_text()
            assert stat.S_IMODE(one.token_file.stat().st_mode) == 0o600
            assert stat.S_IMODE(one.folder.stat().st_mode) == 0o700
    finally:
        os.umask(before)


USER = {
    "RAY_AUTH_MODE": "disabled",
    "RAY_AUTH_TOKEN": "of another cluster",
    "RAY_AUTH_TOKEN_PATH": "/of/another",
    "RAY_ADDRESS": "http://head:8265",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "1",
    "RAY_USAGE_STATS_ENABLED": "1",
    "GLOO_SOCKET_IFNAME": "eth0",
    "OTHER": "kept",
}


def test_the_environment_demands_the_token_on_loopback_whatever_the_user_has_set(
    tmp_path: Path,
) -> None:
    start = RayStart(tmp_path)
    assert start.environ(USER) == {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(tmp_path / "token"),
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "GLOO_SOCKET_IFNAME": "lo",
        "NCCL_SOCKET_IFNAME": "lo",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "RAY_USAGE_STATS_ENABLED": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        "OTHER": "kept",
    }
    assert start.environ({})["RAY_USAGE_STATS_ENABLED"] == "0"
    assert start.environ({"OMP_WAIT_POLICY": "ACTIVE"})["OMP_WAIT_POLICY"] == "ACTIVE"


def test_this_process_gets_the_users_settings_for_other_clusters_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in USER.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    before = dict(os.environ)
    with RayStart(tmp_path).in_this_process():
        assert os.environ["RAY_AUTH_MODE"] == "token"
        assert "RAY_AUTH_TOKEN" not in os.environ
    assert dict(os.environ) == before


def test_a_user_without_a_home_gets_the_private_folder_as_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(uid: int) -> object:
        raise KeyError(uid)

    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    with RayStart(tmp_path).in_this_process():
        assert Path.home() == tmp_path
    assert "HOME" not in os.environ


@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_the_head_starts_without_the_server_of_rays_client(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray.scripts import scripts

    from dpnet.training.ray import head

    seen: list[object] = []
    monkeypatch.setattr(scripts, "get_ray_client_dependency_error", lambda: None)
    monkeypatch.setattr(
        scripts, "main", lambda: seen.append(scripts.get_ray_client_dependency_error())
    )
    head.main()
    assert isinstance(seen[0], ImportError)
    command = RayStart(tmp_path).head_command(8265, 1)
    assert command[:3] == [sys.executable, "-m", "dpnet.training.ray.head"]
