"""`dpnet up` without its processes: environments, secrets, folders and messages."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from data_prep.core.errors import ConfigError, PipelineError
from data_prep.core.password_file import keep_password
from data_prep.core.storage.local import LocalStore
from data_prep.core.storage.open import open_store
from dpnet.cli import main as cli
from dpnet.pipeline.demo import MARKER, claim_root, clear_root
from dpnet.training.ray.start import RayStart
from flows.local_server import children, process_tree
from flows.local_server.children import Child, LocalSetup
from flows.local_server.password import serve_login_url
from flows.local_server.server_log import explain_failure, public_database
from flows.local_server.supervisor import MAX_DEATHS, STABLE_S, Supervised, Supervisor
from flows.local_server.up import (
    Running,
    find_running,
    free_port,
    home_of,
    listen,
    up,
    wait_for_running,
)

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
    "RAY_AUTH_TOKEN": "of elsewhere",
    "AWS_ENDPOINT_URL": "http://s3",
}


@pytest.fixture
def setup(tmp_path: Path) -> LocalSetup:
    return LocalSetup("/data/root", tmp_path, USERS)


@pytest.fixture
def server(setup: LocalSetup) -> Child:
    with listen(None) as listener:
        return children.server(setup, listener)


@pytest.fixture
def worker(setup: LocalSetup) -> Child:
    at = "http://127.0.0.1"
    return children.worker(setup, f"{at}:1/api", f"{at}:2", f"{at}:3", None)


def test_the_users_prefect_settings_do_not_reach_the_server_or_the_worker(
    server: Child, worker: Child, tmp_path: Path
) -> None:
    for child in (server, worker):
        assert "PREFECT_PROFILE" not in child.env
        assert child.env["PREFECT_HOME"] == str(tmp_path)
    assert "PREFECT_API_URL" not in server.env
    assert worker.env["PREFECT_API_URL"] == "http://127.0.0.1:1/api"


def test_flow_runs_get_the_addresses_of_the_root_mlflow_and_storage(worker: Child) -> None:
    assert worker.env["DPNET_ROOT"] == "/data/root"
    assert worker.env["MLFLOW_TRACKING_URI"] == "http://127.0.0.1:2"
    assert worker.env["DPNET_REPORTS_URL"] == "http://127.0.0.1:3"
    assert worker.env["AWS_ENDPOINT_URL"] == "http://s3"
    assert worker.env["PATH"].split(":")[0] == str(Path(sys.executable).parent)


def test_flow_runs_use_the_ray_cluster_of_up_instead_of_the_users(
    setup: LocalSetup,
) -> None:
    start = RayStart(setup.home)
    worker = children.worker(setup, "http://x/api", "http://y", "http://z", "http://ray", start)
    assert worker.env["RAY_API_SERVER_ADDRESS"] == "http://ray"
    assert worker.env["RAY_AUTH_MODE"] == "token"
    assert worker.env["RAY_AUTH_TOKEN_PATH"] == str(start.token_file)
    assert "RAY_AUTH_TOKEN" not in worker.env  # of the user's cluster
    assert "RAY_ADDRESS" not in worker.env


def test_without_a_ray_cluster_of_up_flow_runs_use_the_users(worker: Child) -> None:
    assert worker.env["RAY_ADDRESS"] == "elsewhere:6379"


def test_each_process_gets_only_the_secrets_that_it_needs_and_none_as_an_argument(
    setup: LocalSetup, server: Child, worker: Child, tmp_path: Path
) -> None:
    with listen(None) as listener:
        mlflow = children.mlflow(setup, tmp_path / "mlflow.db", "file:///a", listener)
        exporter = children.exporter(setup, listener)
        serve = children.serve(setup, listener)
    start = RayStart(tmp_path)
    start.token_file.write_text("ray-secret")
    ray = children.ray_head(setup, 1, 2, start)
    assert ray.env.items() >= start.credentials.items()
    holders: dict[str, list[str]] = {"secret1": [], "hunter2": [], "ray-secret": []}
    for child in (server, worker, mlflow, exporter, serve, ray):
        for secret, names in holders.items():
            assert not any(secret in word for word in child.command)
            if any(secret in value for value in child.env.values()):
                names.append(child.name)
    assert holders == {
        "secret1": [
            "Prefect's server",
            "the worker",
            "MLflow",
            "the exporter",
            "the page that fills photos",
        ],
        "hunter2": ["Prefect's server"],
        "ray-secret": [],  # only in its file
    }
    assert server.env["PREFECT_SERVER_API_AUTH_STRING"] == "admin:secret1"
    assert worker.env["PREFECT_API_AUTH_STRING"] == "admin:secret1"
    assert worker.env["MLFLOW_TRACKING_USERNAME"] == "admin"
    assert worker.env["MLFLOW_TRACKING_PASSWORD"] == "secret1"


def test_the_password_may_also_be_the_servers_own_setting(tmp_path: Path) -> None:
    setup = LocalSetup("/r", tmp_path, {"PREFECT_SERVER_API_AUTH_STRING": "admin:secret1"})
    assert setup.password == "admin:secret1"


def test_no_port_is_chosen_before_it_is_opened(setup: LocalSetup, tmp_path: Path) -> None:
    with listen(None) as listener:
        started = (
            children.server(setup, listener),
            children.mlflow(setup, tmp_path / "mlflow.db", "file:///a", listener),
            children.exporter(setup, listener),
            children.serve(setup, listener),
        )
        for child in started:
            assert child.inherited_fds == (listener.fileno(),)
            assert str(listener.fileno()) in child.command
            assert not any(str(listener.getsockname()[1]) in word for word in child.command)
            assert child.private


def test_flow_runs_know_the_page_that_fills_photos_if_it_runs(setup: LocalSetup) -> None:
    without = children.worker(setup, "http://x/api", "http://y", "http://z")
    assert "DPNET_SERVE_URL" not in without.env
    worker = children.worker(
        setup, "http://x/api", "http://y", "http://z", serve_url="http://127.0.0.1:8400"
    )
    assert worker.env["DPNET_SERVE_URL"] == "http://127.0.0.1:8400"


def test_the_page_that_fills_photos_has_the_password_as_its_token(
    setup: LocalSetup, tmp_path: Path
) -> None:
    with listen(None) as listener:
        child = children.serve(setup, listener)
    assert child.env["DPNET_SERVE_TOKEN"] == "secret1"
    assert child.command[-4:-2] == ["--root", setup.root]
    kept = keep_password(tmp_path)
    address = serve_login_url("http://127.0.0.1:8400", tmp_path, {})
    assert address == f"http://127.0.0.1:8400/login#{kept.partition(':')[2]}"
    assert serve_login_url(None, tmp_path, {}) is None
    own = {"PREFECT_API_AUTH_STRING": "admin:secret1"}
    assert serve_login_url("http://127.0.0.1:8400", tmp_path, own) == "http://127.0.0.1:8400"


@pytest.mark.parametrize(
    ("ray", "serve", "said"), [(True, False, "--ray"), (False, True, "--serve")]
)
def test_an_up_that_runs_without_a_part_that_is_asked_for_is_named(
    tmp_path: Path, ray: bool, serve: bool, said: str
) -> None:
    write_state(tmp_path)
    with (tmp_path / "up" / "lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        store = LocalStore(tmp_path)
        assert up(store, None, False, print).pid == 7
        with pytest.raises(PipelineError, match=f"{said} cannot be used: .* is already running"):
            up(store, None, ray, print, serve=serve)


def test_the_ui_gets_the_address_of_its_api(setup: LocalSetup) -> None:
    with listen(None) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/api"
        assert children.server(setup, listener).env["PREFECT_SERVER_UI_API_URL"] == url


@pytest.mark.parametrize(
    ("log", "explanation"),
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
def test_a_failed_start_is_explained_in_one_sentence_without_secrets(
    log: str, explanation: str
) -> None:
    for database in (DATABASE, "/data/prefect.db"):
        sentence = explain_failure(f"Traceback:\n{log}\n", database) or ""
        assert explanation in sentence
        assert sentence.startswith("the Prefect database ")
        assert sentence.endswith(".")
        assert sentence.count(". ") == 0
        assert "hunter2" not in sentence


def test_an_unknown_cause_is_not_explained() -> None:
    assert explain_failure("Traceback: ImportError", "/data/prefect.db") is None


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
    monkeypatch.setenv(children.DATABASE, "")  # so that its old value is restored
    assert cli.main(["up", "--root", str(tmp_path), "--database", url]) == 2
    out, err = capsys.readouterr()
    assert "--database postgresql+asyncpg://USER:PASSWORD@HOST" in err
    assert "hunter2" not in out + err


def test_a_password_without_a_user_is_refused_and_not_shown(tmp_path: Path) -> None:
    setup = LocalSetup("/r", tmp_path, {"PREFECT_API_AUTH_STRING": "secret1"})
    with pytest.raises(ConfigError, match="Set it as user:password") as caught:
        children.check_secrets(setup)
    assert "secret1" not in str(caught.value)


@pytest.mark.parametrize("port", ["0", "65536", "http", "-1"])
def test_a_wrong_port_is_a_usage_error(port: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["up", f"--port={port}"])
    assert caught.value.code == 2
    assert "give one from 1 to 65535" in capsys.readouterr().err


def test_a_used_port_is_refused_only_if_the_user_chose_it() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(
            PipelineError, match=f"--port {port} cannot be used: it is in use. Choose"
        ):
            listen(port)
        assert free_port(port) != port
    assert free_port(port) == port


def test_the_home_is_in_a_local_root_or_for_s3_in_the_cache_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert home_of(LocalStore(tmp_path / "root")) == tmp_path / "root" / "up"
    homes = {home_of(open_store(f"s3://bucket/{name}")) for name in ("a", "b")}
    assert len(homes) == 2
    assert {home.parent for home in homes} == {tmp_path / ".cache" / "dpnet"}


def write_state(root: Path) -> Running:
    """Write the state of a `dpnet up` of `root`, and return it."""
    found = Running(7, str(root), "http://x/api", "http://x", "http://y", "http://z", None)
    (root / "up").mkdir(parents=True)
    (root / "up" / "lock").touch()
    (root / "up" / "up.json").write_text(json.dumps(found.to_json()))
    return found


def test_up_is_running_only_while_its_lock_is_held(tmp_path: Path) -> None:
    assert find_running(str(tmp_path)) is None
    written = write_state(tmp_path)
    assert find_running(str(tmp_path)) is None  # its process was killed
    with (tmp_path / "up" / "lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert find_running(str(tmp_path)) == written


def test_a_command_waits_for_an_up_that_is_starting_and_says_so_if_it_takes_too_long(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    assert wait_for_running(str(tmp_path), 0) is None
    written = write_state(tmp_path)
    state = tmp_path / "up" / "up.json"
    text = state.read_text()
    state.unlink()
    with (tmp_path / "up" / "lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(PipelineError, match="starting or stopping for 0 s: wait until it"):
            wait_for_running(str(tmp_path), 0)
        timer = threading.Timer(0.2, state.write_text, [text])
        timer.start()
        assert wait_for_running(str(tmp_path), 30) == written
        timer.join()
    assert "is starting or stopping: waiting for it" in caplog.text


def test_ctrl_c_says_what_was_stopped_and_how_to_start_it_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def stopped(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("flows.local_server.up.up", stopped)
    monkeypatch.delenv("PREFECT_SERVER_DATABASE_CONNECTION_URL", raising=False)
    assert cli.main(["up", "--root", str(tmp_path)]) == 130
    sentence = capsys.readouterr().err
    for word in ("Prefect", "worker", "MLflow", "exporter", "Ray", "The same command starts"):
        assert word in sentence


def test_a_demo_accepts_a_root_that_only_up_has_used(tmp_path: Path) -> None:
    write_state(tmp_path)
    (tmp_path / "mlflow.db").touch()
    claim_root(LocalStore(tmp_path))
    assert (tmp_path / MARKER).exists()


def test_a_demo_is_not_cleared_while_up_is_running_and_keeps_its_home(
    tmp_path: Path,
) -> None:
    write_state(tmp_path)
    store = LocalStore(tmp_path)
    claim_root(store)
    with (tmp_path / "up" / "lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(PipelineError, match="stop it before --fresh"):
            clear_root(store)
    clear_root(store)
    assert (tmp_path / "up" / "up.json").exists()


def dying_child(setup: LocalSetup) -> Supervised:
    """Return a child that dies at once, started for the first time."""
    log = setup.home / "child.log"
    child = Child("the child", log, ["false"], dict(os.environ), lambda: True, 1.0)
    return Supervised(child, subprocess.Popen(["false"]), started=0.0)


def test_a_child_that_keeps_dying_is_an_error_that_names_its_log(setup: LocalSetup) -> None:
    supervised = dying_child(setup)

    def restart_again_and_again() -> None:
        for now in range(1, 100):
            supervised.process.wait()
            Supervisor(setup).restart_if_dead(supervised, float(now))

    with pytest.raises(
        PipelineError, match=rf"died {MAX_DEATHS} times in a row. See {setup.home}/child.log"
    ):
        restart_again_and_again()
    assert supervised.deaths == MAX_DEATHS


def test_a_child_that_ran_for_long_is_restarted_at_once(
    setup: LocalSetup,
) -> None:
    supervised = dying_child(setup)
    supervised.deaths = MAX_DEATHS - 1
    supervised.process.wait()
    Supervisor(setup).restart_if_dead(supervised, STABLE_S + 1)
    assert supervised.deaths == 1
    assert supervised.restart_at == STABLE_S + 1  # at once


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_descendants_are_found_and_killed_with_a_parent_that_ignores_sigterm() -> None:
    code = (
        "import signal, subprocess, sys, time;"
        " signal.signal(signal.SIGTERM, signal.SIG_IGN);"
        " child = subprocess.Popen(['sleep', '60'], start_new_session=True);"
        " print(child.pid, flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    assert process_tree.descendants(parent.pid) == [child]
    assert parent.pid in process_tree.descendants(os.getpid())
    process_tree.stop(parent, 0.2)
    assert parent.returncode == -9
    deadline = time.monotonic() + 10
    while Path(f"/proc/{child}").exists():  # until init reaps it
        assert time.monotonic() < deadline
        time.sleep(0.05)
