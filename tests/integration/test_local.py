"""The embedded Prefect server: what a killed command leaves, and what the next one does."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
from secret_forms import forms

pytestmark = pytest.mark.integration

# The real embedded server with a flow that only sleeps. The arguments: its home, the seconds.
SLEEPER = """
import sys, time, types
from pathlib import Path

def run_checked(config, root):
    from prefect import flow

    @flow(name="sleeper")
    def sleeper():
        print("running", flush=True)
        time.sleep(float(root))
        return {}

    return sleeper()

sys.modules["flows.pipeline"] = types.ModuleType("flows.pipeline")
sys.modules["flows.pipeline"].run_checked = run_checked
from flows.run_from_command import run_pipeline
run_pipeline(None, sys.argv[2], Path(sys.argv[1]), embedded=True)
"""
# A user's setting for another Prefect server. Nothing listens at this address.
ENVIRONMENT = {**os.environ, "PREFECT_API_URL": "http://127.0.0.1:9/api"}


def start(home: Path, seconds: float) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", SLEEPER, str(home), str(seconds)],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        text=True,
    )


def servers_of(process: int) -> list[int]:
    children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    return [
        int(c)
        for c in children
        if b"flows.local_server.server" in Path(f"/proc/{c}/cmdline").read_bytes()
    ]


def is_alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc")
def test_the_server_ends_with_a_killed_command_and_the_next_one_marks_the_run_crashed(
    tmp_path: Path,
) -> None:
    home = tmp_path / "prefect"
    home.mkdir()
    # A server that was killed while it created its database left this file.
    (home / "prefect.db").write_bytes(b"an unfinished database")
    with start(home, 120) as killed:
        assert killed.stdout is not None
        assert killed.stdout.readline() == "running\n"
        (server,) = servers_of(killed.pid)
        killed.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 10
    while is_alive(server) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not is_alive(server)
    with start(home, 0) as second:
        second.communicate(timeout=120)
    assert second.returncode == 0
    with sqlite3.connect(home / "prefect.db") as database:
        rows = database.execute("select state_type from flow_run order by created").fetchall()
    assert rows == [("CRASHED",), ("COMPLETED",)]


def test_a_configured_prefect_api_that_does_not_answer_is_one_line_of_error(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "dpnet", "pipeline", "run", "demo", "--root", str(tmp_path)],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("dpnet: the Prefect API at http://127.0.0.1:9/api cannot be")
    assert len(done.stderr.splitlines()) == 1


SECRET = "hunter2-must-not-be-seen"
CONFIG = """
name: broken
images: {{source: {photos}, name: broken, size: 32}}
masks: {{name: tiny, size: 32, train: 4, eval_per_bin: 1}}
register: {{tracking_uri: 'http://me:{secret}@127.0.0.1:9'}}
"""


@pytest.mark.slow
def test_a_secret_in_an_option_or_the_environment_reaches_no_page_log_or_file(
    tmp_path: Path,
) -> None:
    photos = tmp_path / "photos\x1b[2J"
    photos.mkdir()
    # The first stage fails, so the run is short.
    for number in range(4):
        (photos / f"broken\x1b[2J{number}.jpg").write_bytes(b"no image")
    (tmp_path / "broken.yaml").write_text(
        CONFIG.format(photos=json.dumps(str(photos)), secret=SECRET)
    )
    root = tmp_path / "root"
    command = [sys.executable, "-m", "dpnet", "pipeline", "run", "broken.yaml"]
    command += ["--root", str(root), "--json", "--debug"]
    for option in ("register.tracking_uri", "launch.address"):
        command += ["--set", f"{option}=http://me:{SECRET}@127.0.0.1:9/x?token={SECRET}"]
    secrets = {
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "DPNET_ALERT_URL": f"http://127.0.0.1:9/{SECRET}",
        "DPNET_REPORTS_URL": f"http://me:{SECRET}@127.0.0.1:9",
        "MLFLOW_TRACKING_PASSWORD": SECRET,
        "MLFLOW_TRACKING_URI": f"http://me:{SECRET}@127.0.0.1:9",
        "AWS_ENDPOINT_URL": f"http://me:{SECRET}@127.0.0.1:9",
    }
    environ = {k: v for k, v in os.environ.items() if not k.startswith("PREFECT_")}
    done = subprocess.run(
        command,
        env=environ | secrets,
        cwd=tmp_path,  # the name of the run has at most 100 characters
        umask=0,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 1, done.stdout
    with sqlite3.connect(root / "prefect" / "prefect.db") as database:
        ((name, parameters),) = database.execute("select name, parameters from flow_run")
        assert database.execute("select count(*) from log").fetchone() > (0,)
        database.execute("pragma wal_checkpoint(truncate)")
    assert "register.tracking_uri=" in name
    assert "register.tracking_uri=http://127.0.0.1:9" in parameters
    seen = {str(file): file.read_bytes() for file in root.rglob("*") if file.is_file()}
    seen |= {"standard output": done.stdout.encode(), "standard error": done.stderr.encode()}
    found = [name for name, data in seen.items() for form in forms(SECRET) if form.encode() in data]
    assert found == []
    assert [
        name for name, data in seen.items() if b"\x1b" in data and name.startswith("standard")
    ] == []
    with sqlite3.connect(root / "prefect" / "prefect.db") as database:
        dump = "\n".join(database.iterdump())
    assert "\\x1b[2J" in dump
    assert "\x1b" not in dump
    home = root / "prefect"
    open_to_others = [path for path in (home, *home.iterdir()) if path.stat().st_mode & 0o077]
    assert open_to_others == []
    assert {"lock", "prefect.db", "server.log", "storage"} <= set(os.listdir(home))
