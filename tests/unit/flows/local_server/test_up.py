"""`dpnet up` without its processes: environments, secrets, places, sentences."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_prep.core.errors import ConfigError, PipelineError
from data_prep.core.storage.local import LocalStore
from data_prep.core.storage.open import open_store
from dpnet.cli import main as cli
from dpnet.pipeline.demo import MARKER, claim_root, clear_root
from dpnet.training.ray.start import RayStart
from flows.local_server import children
from flows.local_server import process_tree as processes
from flows.local_server.children import Child, Place
from flows.local_server.server_log import explain, public_database
from flows.local_server.supervisor import DEATHS, STEADY_S, Kept, Supervisor
from flows.local_server.up import Running, bind, free_port, home_of, running

DATABASE = "postgresql+asyncpg://me:hunter2@db:5432/prefect?password=hunter2"
USERS = {
    "HOME": "/home/me",
    "PATH": "/usr/bin",
    "PREFECT_API_URL": "http://elsewhere/api",
    "PREFECT_PROFILE": "work",
    "PREFECT_API_AUTH_STRING": "admin:secret1",
    "PREFECT_SERVER_DATABASE_CONNECTION_URL": DATABASE,
    "MLFLOW_TRACKING_URI": "http://elsewhere",
    "RAY_ADDRESS": "elsewhere:6379",
    "AWS_ENDPOINT_URL": "http://s3",
}


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place("/data/root", tmp_path, USERS)


@pytest.fixture
def server(place: Place) -> Child:
    with bind(None) as listener:
        return children.server(place, listener)


@pytest.fixture
def worker(place: Place) -> Child:
    at = "http://127.0.0.1"
    return children.worker(place, f"{at}:1/api", f"{at}:2", f"{at}:3", None)


def test_nothing_of_the_users_own_prefect_reaches_the_server_and_the_worker(
    server: Child, worker: Child, tmp_path: Path
) -> None:
    for child in (server, worker):
        assert "PREFECT_PROFILE" not in child.env
        assert child.env["PREFECT_HOME"] == str(tmp_path)
    assert "PREFECT_API_URL" not in server.env
    assert worker.env["PREFECT_API_URL"] == "http://127.0.0.1:1/api"


def test_flow_runs_find_the_root_mlflow_and_storage(worker: Child) -> None:
    assert worker.env["DPNET_ROOT"] == "/data/root"
    assert worker.env["MLFLOW_TRACKING_URI"] == "http://127.0.0.1:2"
    assert worker.env["DPNET_REPORTS_URL"] == "http://127.0.0.1:3"
    assert worker.env["AWS_ENDPOINT_URL"] == "http://s3"
    assert worker.env["PATH"].split(":")[0] == str(Path(sys.executable).parent)


def test_flow_runs_find_the_ray_cluster_that_was_started_instead_of_another(place: Place) -> None:
    own = children.worker(place, "http://x/api", "http://y", "http://z", "http://ray")
    assert own.env["RAY_API_SERVER_ADDRESS"] == "http://ray"
    assert "RAY_ADDRESS" not in own.env


def test_without_one_the_users_own_ray_cluster_stays(worker: Child) -> None:
    assert worker.env["RAY_ADDRESS"] == "elsewhere:6379"


def test_each_process_gets_the_secrets_that_it_needs_and_no_argument_holds_one(
    place: Place, server: Child, worker: Child, tmp_path: Path
) -> None:
    mlflow = children.mlflow(place, tmp_path / "mlflow.db", "file:///a", 5000)
    ray = children.ray_head(place, 1, 2, RayStart(tmp_path))
    has: dict[str, list[str]] = {name: [] for name in ("secret1", "hunter2")}
    for child in (server, worker, mlflow, ray):
        for secret, who in has.items():
            assert not any(secret in word for word in child.command)
            who += [child.name for value in child.env.values() if secret in value]
    assert has == {"secret1": ["Prefect's server", "the worker"], "hunter2": ["Prefect's server"]}
    assert server.env["PREFECT_SERVER_API_AUTH_STRING"] == "admin:secret1"
    assert worker.env["PREFECT_API_AUTH_STRING"] == "admin:secret1"


def test_the_servers_own_setting_for_the_password_counts_too(tmp_path: Path) -> None:
    place = Place("/r", tmp_path, {"PREFECT_SERVER_API_AUTH_STRING": "admin:secret1"})
    assert place.password == "admin:secret1"


def test_the_ui_is_told_the_address_of_its_api(place: Place) -> None:
    with bind(None) as listener:
        at = f"http://127.0.0.1:{listener.getsockname()[1]}/api"
        assert children.server(place, listener).env["PREFECT_SERVER_UI_API_URL"] == at


@pytest.mark.parametrize(
    ("log", "told"),
    [
        ("alembic.util.exc.CommandError: Can't locate revision identified by 'x'", "another ver"),
        ("sqlite3.DatabaseError: file is not a database", "is damaged"),
        ("sqlite3.OperationalError: attempt to write a readonly database", "cannot be written"),
        ("asyncpg.exceptions.InvalidPasswordError: password authentication", "user or the passw"),
        ("asyncpg.exceptions.InvalidCatalogNameError: no database", "does not exist: create it"),
        ('could not open extension control file "pg_trgm.control"', "CREATE EXTENSION pg_trgm"),
        ("ConnectionRefusedError: [Errno 111] Connect call failed", "cannot be reached"),
        ("socket.gaierror: [Errno -2] Name or service not known", "cannot be reached"),
    ],
)
def test_why_a_server_did_not_start_is_one_sentence_without_secrets(log: str, told: str) -> None:
    for database in (DATABASE, "/data/prefect.db"):
        sentence = explain(f"Traceback:\n{log}\n", database) or ""
        assert told in sentence
        assert sentence.startswith("the Prefect database ")
        assert sentence.endswith(".")
        assert sentence.count(". ") == 0
        assert "hunter2" not in sentence


def test_an_unknown_cause_is_not_guessed() -> None:
    assert explain("Traceback: ImportError", "/data/prefect.db") is None


def test_a_database_is_shown_without_user_password_and_options() -> None:
    assert public_database(DATABASE) == "postgresql+asyncpg://db:5432/prefect"
    assert public_database("postgresql+asyncpg://me:h@nter2@db/p") == "postgresql+asyncpg://db/p"
    assert public_database("/data/why?/prefect.db") == "/data/why?/prefect.db"


@pytest.mark.parametrize(
    "url", ["postgresql://me:hunter2@db/prefect", "me:hunter2@db", "mysql://me:hunter2@db/x"]
)
def test_a_database_of_another_kind_is_refused_without_its_password(
    url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(children.DATABASE, "")  # so that it is put back
    assert cli.main(["up", "--root", str(tmp_path), "--database", url]) == 1
    out, err = capsys.readouterr()
    assert "--database postgresql+asyncpg://USER:PASSWORD@HOST" in err
    assert "hunter2" not in out + err


def test_a_password_without_user_is_refused_and_not_shown(tmp_path: Path) -> None:
    place = Place("/r", tmp_path, {"PREFECT_API_AUTH_STRING": "secret1"})
    with pytest.raises(ConfigError, match="set it as user:password") as caught:
        children.check_secrets(place)
    assert "secret1" not in str(caught.value)


@pytest.mark.parametrize("port", ["0", "65536", "http", "-1"])
def test_what_is_no_port_is_wrong_usage(port: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["up", f"--port={port}"])
    assert caught.value.code == 2
    assert "give one from 1 to 65535" in capsys.readouterr().err


def test_a_port_that_is_taken_is_refused_only_if_it_was_asked_for() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(PipelineError, match=f"port {port} is taken: choose another --port"):
            bind(port)
        assert free_port(port) != port
    assert free_port(port) == port


def test_the_home_is_in_a_local_root_and_in_the_cache_for_s3(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert home_of(LocalStore(tmp_path / "root")) == tmp_path / "root" / "up"
    homes = {home_of(open_store(f"s3://bucket/{name}")) for name in ("a", "b")}
    assert len(homes) == 2
    assert {home.parent for home in homes} == {tmp_path / ".cache" / "dpnet"}


def state(root: Path) -> Running:
    """What a `dpnet up` of `root` has written."""
    found = Running(7, str(root), "http://x/api", "http://x", "http://y", "http://z", None)
    (root / "up").mkdir(parents=True)
    (root / "up" / "lock").touch()
    (root / "up" / "up.json").write_text(json.dumps(found.to_json()))
    return found


def test_only_one_that_holds_its_lock_is_running(tmp_path: Path) -> None:
    assert running(str(tmp_path)) is None
    written = state(tmp_path)
    assert running(str(tmp_path)) is None  # it was killed
    with (tmp_path / "up" / "lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert running(str(tmp_path)) == written


def test_a_demo_takes_a_root_where_only_up_has_been(tmp_path: Path) -> None:
    state(tmp_path)
    (tmp_path / "mlflow.db").touch()
    claim_root(LocalStore(tmp_path))
    assert (tmp_path / MARKER).exists()


def test_a_demo_is_not_cleared_while_up_is_at_work_and_keeps_its_home(tmp_path: Path) -> None:
    state(tmp_path)
    store = LocalStore(tmp_path)
    claim_root(store)
    with (tmp_path / "up" / "lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(PipelineError, match="stop it before --fresh"):
            clear_root(store)
    clear_root(store)
    assert (tmp_path / "up" / "up.json").exists()


def kept(place: Place) -> Kept:
    """A child that dies at once, at its first life."""
    log = place.home / "mayfly.log"
    child = Child("the mayfly", log, ["false"], dict(os.environ), lambda: True, 1.0)
    return Kept(child, subprocess.Popen(["false"]), born=0.0)


def test_what_dies_again_and_again_is_given_up_with_the_name_of_its_log(place: Place) -> None:
    mayfly = kept(place)

    def live_on() -> None:
        for now in range(1, 100):
            mayfly.process.wait()
            Supervisor(place).look_after(mayfly, float(now))

    with pytest.raises(PipelineError, match=rf"died {DEATHS} times in a row: {place.home}/mayfly"):
        live_on()
    assert mayfly.deaths == DEATHS


def test_what_dies_after_a_steady_life_begins_anew(place: Place) -> None:
    mayfly = kept(place)
    mayfly.deaths = DEATHS - 1
    mayfly.process.wait()
    Supervisor(place).look_after(mayfly, STEADY_S + 1)
    assert mayfly.deaths == 1
    assert mayfly.again_at == STEADY_S + 1  # at once


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_descendants_are_found_and_the_stubborn_are_killed_with_their_parent() -> None:
    code = (
        "import signal, subprocess, sys, time;"
        " signal.signal(signal.SIGTERM, signal.SIG_IGN);"
        " child = subprocess.Popen(['sleep', '60'], start_new_session=True);"
        " print(child.pid, flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    assert processes.descendants(parent.pid) == [child]
    assert parent.pid in processes.descendants(os.getpid())
    processes.stop(parent, 0.2)
    assert parent.returncode == -9
    deadline = time.monotonic() + 10
    while Path(f"/proc/{child}").exists():  # until init has reaped it
        assert time.monotonic() < deadline
        time.sleep(0.05)
