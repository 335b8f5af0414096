"""Real Rays of this machine: who can reach them, users without a home, and what a kill leaves."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from clusters import (
    command_of,
    end_with_parent,
    family,
    free_port,
    send,
    wait_until,
)
from sockets import interfaces, listening

from dpnet.training.ray.start import RayStart, prepare_start

pytestmark = [pytest.mark.integration, pytest.mark.slow]

IN_PROCESS = """
import sys, time
from dpnet.training.ray.start import connect, prepare_start
with prepare_start("test-") as start, start.in_this_process():
    connect(**start.init_options(1))
    import ray

    @ray.remote
    def answer():
        return 42

    assert ray.get(answer.remote()) == 42
    print(start.folder, flush=True)
    sys.stdin.read()
    ray.shutdown()
"""
# Runs a command as a user without an entry in the list of users, who may read what we may read.
UNKNOWN_USER = ["unshare", "--user", "--map-user=54321", "--map-group=54321"]


def clean_environment() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}


@contextmanager
def running(process: subprocess.Popen[str]) -> Iterator[subprocess.Popen[str]]:
    try:
        yield process
    finally:
        members = family(process.pid)
        for pid in members:
            send(pid, signal.SIGKILL)
        process.wait(30)


def start_here(environment: dict[str, str] | None = None, *prefix: str) -> subprocess.Popen[str]:
    """Start a process with a Ray of its own, like training on this machine."""
    return subprocess.Popen(
        [*prefix, sys.executable, "-c", IN_PROCESS],
        env=clean_environment() if environment is None else environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd="/",
        preexec_fn=end_with_parent,
    )


def folder_of(process: subprocess.Popen[str]) -> Path:
    assert process.stdout
    return Path(process.stdout.readline().strip())


def start_head(start: RayStart) -> tuple[subprocess.Popen[str], int]:
    """Start a head like that of `dpnet up --ray`, and return it with its dashboard's port."""
    port = free_port()
    while 10002 <= port <= 19999:  # Ray's own workers use these
        port = free_port()
    log = start.folder / "log"
    with log.open("w") as out:
        process = subprocess.Popen(
            start.head_command(port, 0),
            env=start.environ(os.environ),
            stdout=out,
            stderr=out,
            text=True,
            preexec_fn=end_with_parent,
        )
    wait_until(lambda: "Ray runtime started" in log.read_text("utf-8", "replace"), log.name)
    return process, port


def status_of(port: int, path: str, **headers: str) -> int:
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


JOIN = """
import ray, sys
ray.init(address=sys.argv[1], log_to_driver=False)
print("inside", flush=True)
"""


def test_a_head_listens_on_loopback_and_refuses_everybody_without_its_token() -> None:
    with prepare_start("test-") as start:
        process, port = start_head(start)
        with running(process):
            wait_until(lambda: status_of(port, "/api/jobs/") != 500, "no dashboard")
            found = listening(family(process.pid))
            assert f"127.0.0.1:{port}" in found
            assert len(found) > 5
            assert interfaces(family(process.pid)) == {"127.0.0.1"}
            assert "127.0.0.1:10001" not in found  # the server of Ray's client
            assert not [pid for pid in family(process.pid) if "client.server" in command_of(pid)]
            token = start.token_file.read_text()
            assert status_of(port, "/api/jobs/") == 401
            assert status_of(port, "/api/jobs/", Authorization="Bearer " + "0" * 64) == 403
            assert status_of(port, "/api/jobs/", Authorization=f"Bearer {token}") == 200
            control = (start.files / "ray_current_cluster").read_text().strip()
            inside = {**clean_environment(), "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
            no_token = {**inside, "RAY_AUTH_MODE": "disabled"}
            wrong = {**inside, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}
            right = {**inside, **start.credentials}
            joins = [
                subprocess.Popen(
                    [sys.executable, "-c", JOIN, control],
                    env=environment,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                    preexec_fn=end_with_parent,
                )
                for environment in (no_token, wrong, right)
            ]
            answers = [each.communicate(timeout=100)[0] for each in joins]
            assert ["inside" in answer for answer in answers] == [False, False, True]


def test_a_ray_of_this_process_listens_on_loopback_in_a_private_folder() -> None:
    with running(start_here()) as process:
        folder = folder_of(process)
        assert len(listening(family(process.pid))) > 3
        assert interfaces(family(process.pid)) == {"127.0.0.1"}
        assert folder.stat().st_mode & 0o77 == 0  # Ray opens the folder inside to all users
        assert (folder / "token").stat().st_mode & 0o77 == 0
        (raylet,) = [pid for pid in family(process.pid) if "/raylet/raylet " in command_of(pid)]
        environment = Path(f"/proc/{raylet}/environ").read_bytes()
        assert b"RAY_AUTH_MODE=token" in environment
        assert process.communicate("", timeout=60)
        assert process.returncode == 0
        assert not folder.exists()


@pytest.mark.skipif(
    subprocess.run([*UNKNOWN_USER, "true"], capture_output=True).returncode != 0,
    reason="this machine allows no user namespaces",
)
@pytest.mark.parametrize("home", [None, "/proc"])
def test_ray_starts_for_a_user_without_a_name_and_a_home(home: str | None) -> None:
    environment = {k: v for k, v in clean_environment().items() if k not in ("HOME", "USER")}
    if home:
        environment["HOME"] = home
    with running(start_here(environment, *UNKNOWN_USER)) as process:
        assert folder_of(process).name.startswith("dpnet-ray-test-")
        process.communicate("", timeout=60)
        assert process.returncode == 0


def test_the_next_start_removes_what_a_killed_ray_has_left() -> None:
    with running(start_here()) as process:
        folder = folder_of(process)
        process.kill()
        process.wait(30)
        assert folder.exists()
        with prepare_start("test-"):
            assert not folder.exists()
