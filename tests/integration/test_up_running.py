"""`dpnet up` as a user runs it: what it starts, survives and leaves behind."""

from __future__ import annotations

import base64
import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import small_root
from clusters import (
    alive,
    command_of,
    end_with_parent,
    family,
    free_port,
    wait_until,
)
from platforms import Platform, environment, platform, up_command
from postgres_server import postgres
from sockets import interfaces, listening

from data_prep.core.storage.local import LocalStore
from dpnet.registry.settings import RegisterSettings
from dpnet.registry.stage import register
from flows.local_server.up import find_running

pytestmark = [
    pytest.mark.integration,
    pytest.mark.slow,
    pytest.mark.rotated(4),
    pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc"),
]
PASSWORD = "admin:correct-horse"
# A user's settings for other servers of Prefect and MLflow. Nothing listens at these addresses.
USERS = {
    "PREFECT_API_URL": "http://127.0.0.1:9/api",
    "PREFECT_PROFILE": "none-such",
    "MLFLOW_TRACKING_URI": "http://127.0.0.1:9",
}
# MLflow refuses webhooks to this machine by default.
WEBHOOKS = {
    "MLFLOW_WEBHOOK_ALLOWED_SCHEMES": "http,https",
    "MLFLOW_WEBHOOK_ALLOW_PRIVATE_IPS": "true",
    "MLFLOW_WEBHOOK_CACHE_TTL": "1",  # else a list that was read in the last minute is used
}
# A flow with a child process in another session, like a training.
FLOW = """
import subprocess, time
from pathlib import Path
from prefect import flow

@flow
def sleeper(file: str):
    child = subprocess.Popen(["sleep", "601"], start_new_session=True)
    Path(file).write_text(str(child.pid))
    time.sleep(600)
"""
DEPLOY = """
import sys
from prefect import flow
from prefect.deployments import run_deployment

source = flow.from_source(source=sys.argv[1], entrypoint="sleeping.py:sleeper")
source.deploy(name="test", work_pool_name="dpnet", print_next_steps=False)
run_deployment("sleeper/test", parameters={"file": sys.argv[2]}, timeout=0)
"""

REGISTER = """
import sys
from pathlib import Path
import small_root
from dpnet.registry.settings import RegisterSettings
from dpnet.registry.stage import register

store = small_root.new_store(Path(sys.argv[1]))
run, evaluation = small_root.run_and_evaluation(store, 20.0)
print(register(RegisterSettings(model="through-up"), run, evaluation, store).summary["alias"])
"""


def started(root: Path, *options: str, **more: str) -> AbstractContextManager[Platform]:
    """Run `dpnet up` for a user who has configured other servers."""
    return platform(root, *options, **USERS, **more)


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    before = os.umask(0)  # nothing of it may depend on the umask
    try:
        root = tmp_path_factory.mktemp("up") / "root"
        with started(root, **WEBHOOKS) as found:
            os.umask(before)
            yield found
    finally:
        os.umask(before)


def ask(url: str, password: str = "", body: Any = None, **headers: str) -> Any:
    """Return the JSON of the answer, or its text if it is not JSON."""
    if password:
        headers["Authorization"] = "Basic " + base64.b64encode(password.encode()).decode()
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(
        url, data, {"Content-Type": "application/json", "Accept": "text/html, */*", **headers}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        text = answer.read().decode()
    try:
        return json.loads(text)
    except ValueError:
        return text


@contextmanager
def receiver() -> Iterator[tuple[str, list[Any]]]:
    """Listen for JSON on a port of this machine. Yield the address and what has come."""
    calls: list[Any] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            calls.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *arguments: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/hook", calls
        finally:
            server.shutdown()


def answers(url: str) -> bool:
    try:
        ask(url)
    except OSError:
        return False
    return True


def status_of(url: str, password: str = "", **headers: str) -> int:
    """Return the HTTP status of a refused request."""
    with pytest.raises(urllib.error.HTTPError) as caught:
        ask(url, password, **headers)
    return caught.value.code


def online_workers(up: Platform) -> list[str]:
    """Return the names of the pool's online workers."""
    workers = up.ask("/work_pools/dpnet/workers/filter", {})
    return [worker["name"] for worker in workers if worker["status"] == "ONLINE"]


def run_sleeper(up: Platform, folder: Path) -> tuple[int, int]:
    """Run the flow on the worker. Return the pids of the flow and of its child."""
    (folder / "sleeping.py").write_text(FLOW)
    file = folder / "child"
    subprocess.run(
        [sys.executable, "-c", DEPLOY, str(folder), str(file)],
        env=environment(
            {
                "PREFECT_API_URL": up.running.api_url,
                "PREFECT_API_AUTH_STRING": up.password,
                "PREFECT_HOME": str(folder),
            }
        ),
        cwd=folder,
        check=True,
        capture_output=True,
    )
    wait_until(lambda: file.exists() and file.read_text(), "the flow does not run", 180)
    child = int(file.read_text())
    stat = Path(f"/proc/{child}/stat").read_text()
    return int(stat.rpartition(")")[2].split()[1]), child


def refused(root: Path, *options: str, **more: str) -> str:
    """Return the last line of standard error of a `dpnet up` that fails to start."""
    done = subprocess.run(
        up_command(root, *options),
        env=environment({**USERS, **more}),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    line = done.stderr.strip().splitlines()[-1]
    assert line.startswith("dpnet: ")
    assert line.endswith(".")
    return line


def test_all_addresses_answer_and_a_worker_is_online(up: Platform) -> None:
    running = up.running
    assert ask(f"{running.api_url}/health") is True
    assert "<html" in ask(running.ui_url)
    assert ask(f"{running.ui_url}/ui-settings")["api_url"] == running.api_url
    assert "<html" in ask(running.mlflow_url, up.password)
    assert len(online_workers(up)) == 1
    assert up.ask("/work_pools/dpnet")["type"] == "process"
    assert running.ray_url is None


def test_every_server_asks_for_the_password_and_only_the_users_files_have_it(up: Platform) -> None:
    running, secret = up.running, up.password.partition(":")[2]
    api = f"{running.api_url}/work_pools/dpnet"
    for address in (api, running.mlflow_url, running.metrics_url):
        assert status_of(address) == 401
        assert status_of(address, "dpnet:another-password") == 401
        assert status_of(address, up.password, Host="evil.example") == 403
        assert status_of(address, up.password, Origin="http://evil.example") == 403
        assert ask(address, up.password)
    assert up.login_url == f"{running.ui_url}/login#{up.password}"
    for pid in family(up.process.pid):
        assert secret not in command_of(pid)
    others = [*up.home.glob("*.log"), up.home / "up.json"]
    assert not any(secret.encode() in path.read_bytes() for path in others)


def test_deploy_and_notify_find_the_password_by_the_root(up: Platform) -> None:
    settings = environment({"PREFECT_HOME": str(up.root / "user")})
    for more in ({}, {"PREFECT_API_URL": up.running.api_url}):
        deploy = [sys.executable, "-m", "dpnet", "deploy", "--dry-run", "--root", str(up.root)]
        done = subprocess.run(deploy, env=settings | more, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_everything_that_up_starts_listens_on_the_loopback_address_only(up: Platform) -> None:
    found = listening(family(up.process.pid))
    ports = {int(address.rpartition(":")[2]) for address in found}
    urls = (
        up.running.ui_url,
        up.running.mlflow_url,
        up.running.metrics_url.removesuffix("/metrics"),
    )
    assert ports >= {int(url.rpartition(":")[2]) for url in urls}
    assert interfaces(family(up.process.pid)) == {"127.0.0.1"}


def test_only_the_user_may_read_what_can_hold_a_secret(up: Platform) -> None:
    # The fixture started it with an umask of 000.
    # SQLite keeps the latest changes in files next to a database.
    files = [*up.root.glob("mlflow.db*"), up.home, *up.home.iterdir()]
    modes = {path.name: path.stat().st_mode & 0o077 for path in files}
    logs = {f"{name}.log" for name in ("server", "mlflow", "exporter", "worker")}
    others = {"up", "password", "prefect.db", "prefect.db-wal", "up.json", "lock", "storage"}
    assert {"mlflow.db", *logs, *others} <= set(modes)
    assert {name: oct(mode) for name, mode in modes.items() if mode} == {}


def test_mlflow_accepts_requests_from_its_own_pages(up: Platform) -> None:
    search = f"{up.running.mlflow_url}/ajax-api/2.0/mlflow/experiments/search"
    found = ask(search, up.password, {"max_results": 5}, Origin=up.running.mlflow_url)
    assert found["experiments"][0]["name"] == "Default"


def test_mlflow_refuses_requests_from_another_site(up: Platform) -> None:
    search = f"{up.running.mlflow_url}/ajax-api/2.0/mlflow/experiments/search"
    with pytest.raises(urllib.error.HTTPError) as caught:
        ask(search, up.password, {"max_results": 5}, Origin="http://evil.example")
    assert caught.value.code == 403


def test_a_model_of_a_local_root_is_registered_through_the_server(
    up: Platform, tmp_path: Path
) -> None:
    support = str(Path(__file__).parents[1] / "support")
    user, _, password = up.password.partition(":")
    settings = {
        "PYTHONPATH": os.pathsep.join([support, os.environ.get("PYTHONPATH", "")]),
        "MLFLOW_TRACKING_URI": up.running.mlflow_url,
        "MLFLOW_TRACKING_USERNAME": user,
        "MLFLOW_TRACKING_PASSWORD": password,
    }
    done = subprocess.run(
        [sys.executable, "-c", REGISTER, str(tmp_path)],
        env=environment(settings),
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (0, "champion\n"), done.stderr
    search = f"{up.running.mlflow_url}/api/2.0/mlflow/registered-models/search"
    (model,) = ask(search, up.password)["registered_models"]
    assert model["name"] == "through-up"
    assert model["aliases"] == [{"alias": "champion", "version": "1"}]


def test_a_promotion_by_hand_is_an_event_in_prefect_and_calls_mlflows_webhook(up: Platform) -> None:
    store = LocalStore(up.root)
    small_root.champion(store)
    run, evaluation = small_root.run_and_evaluation(store, 10.0)
    register(RegisterSettings.model_validate({"promote": "never"}), run, evaluation, store)
    with receiver() as (url, calls):
        event = {"entity": "MODEL_VERSION_ALIAS", "action": "CREATED"}
        hook = {"name": "promotions", "url": url, "events": [event]}
        ask(f"{up.running.mlflow_url}/api/2.0/mlflow/webhooks", up.password, hook)
        command = [sys.executable, "-m", "dpnet", "registry", "promote", "2"]
        command += ["--root", str(up.root), "--why", "It looks better."]
        done = subprocess.run(command, env=environment(), capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")
        wait_until(lambda: calls, "MLflow has not called", 30)
    assert (calls[0]["data"]["alias"], calls[0]["data"]["version"]) == ("champion", "2")
    wanted = {"filter": {"event": {"name": ["dpnet.model.promoted"]}}}
    wait_until(lambda: up.ask("/events/filter", wanted)["events"], "there is no event", 30)
    (sent,) = up.ask("/events/filter", wanted)["events"]
    assert (sent["payload"]["version"], sent["payload"]["why"]) == (2, "It looks better.")


def test_a_second_up_prints_the_same_addresses_and_ends(up: Platform) -> None:
    done = subprocess.run(
        up_command(up.root, "--json"), env=environment(USERS), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {
        "ok": True,
        "attached": True,
        **up.running.to_json(),
        "login_url": up.login_url,
        "serve_login_url": None,
    }
    assert find_running(str(up.root)) == up.running


def test_a_second_up_with_other_options_is_refused(up: Platform) -> None:
    assert "without Ray. Stop it" in refused(up.root, "--ray")
    assert "without the page that fills photos. Stop it" in refused(up.root, "--serve")
    assert f"at {up.running.ui_url}. Stop it" in refused(up.root, f"--port={free_port()}")


def test_a_used_port_is_refused(up: Platform, tmp_path: Path) -> None:
    port = up.running.ui_url.rpartition(":")[2]
    assert f"--port {port} cannot be used: it is in use. Choose another --port" in refused(
        tmp_path, f"--port={port}"
    )


def test_two_roots_can_be_up_at_the_same_time(up: Platform, tmp_path: Path) -> None:
    with started(tmp_path / "other") as other:
        assert len({*up.running.to_json().values(), *other.running.to_json().values()}) == 13
        assert online_workers(other)
        assert other.password != up.password


def test_a_schedule_creates_runs(up: Platform) -> None:
    up.deploy("watch=0 0 1 1 *", "retrain=null")
    (flow,) = up.ask("/flows/filter", {"flows": {"name": {"any_": ["watch-raw-data"]}}})
    scheduled = {"flow_runs": {"state": {"type": {"any_": ["SCHEDULED"]}}}}
    scheduled["flows"] = {"id": {"any_": [flow["id"]]}}
    wait_until(lambda: up.ask("/flow_runs/filter", scheduled), "the scheduler creates no run", 120)
    days = {run["expected_start_time"][4:10] for run in up.ask("/flow_runs/filter", scheduled)}
    assert days == {"-01-01"}
    assert "Traceback" not in (up.home / "server.log").read_text()


def test_a_killed_server_is_restarted_at_the_same_port(up: Platform) -> None:
    killed = up.child("flows.local_server.server")
    os.kill(killed, signal.SIGKILL)
    wait_until(lambda: not alive(killed), "the server does not die")
    wait_until(lambda: answers(f"{up.running.api_url}/health"), "the server is not restarted", 180)
    assert up.child("flows.local_server.server") != killed
    assert "Prefect's server died and is restarted" in up.out.read_text()


def test_a_killed_worker_is_restarted_and_its_flow_run_keeps_running(
    up: Platform, tmp_path: Path
) -> None:
    flow, child = run_sleeper(up, tmp_path)
    killed = up.child("worker start")
    os.kill(killed, signal.SIGKILL)
    wait_until(lambda: "the worker died" in up.out.read_text(), "it is not reported")
    wait_until(
        lambda: [p for p in family(up.process.pid) if "worker start" in command_of(p)], "no worker"
    )
    assert up.child("worker start") != killed
    assert alive(flow)
    assert alive(child)
    assert child in family(up.process.pid)  # so that it ends when `dpnet up` ends


def test_a_killed_up_leaves_no_process_behind(up: Platform, tmp_path: Path) -> None:
    # This is the last test on the shared `dpnet up`: the killed worker's orphans must end too.
    flow, child = run_sleeper(up, tmp_path)
    processes = family(up.process.pid)
    assert {flow, child} <= set(processes)
    os.kill(up.process.pid, signal.SIGKILL)
    wait_until(lambda: not [pid for pid in processes if alive(pid)], "processes remain", 45)
    assert find_running(str(up.root)) is None


def test_the_page_that_fills_photos_is_one_of_the_servers(tmp_path: Path) -> None:
    small_root.champion(LocalStore(tmp_path / "root"))
    with started(tmp_path / "root", "--serve") as up:
        url = str(up.running.serve_url)
        token = up.password.partition(":")[2]
        assert up.serve_login_url == f"{url}/login#{token}"
        with pytest.raises(urllib.error.HTTPError, match="401"):
            ask(f"{url}/api/models")
        bearer = {"Authorization": f"Bearer {token}"}
        assert ask(f"{url}/api/models", **bearer)["models"][0]["id"] == "dpnet@1"
        assert ask(f"{url}/api/models", up.password)["default"] == "champion"
        assert interfaces(family(up.process.pid)) == {"127.0.0.1"}
        killed = up.child("dpnet serve")
        assert token.encode() not in Path(f"/proc/{killed}/cmdline").read_bytes()
        os.kill(killed, signal.SIGKILL)
        wait_until(lambda: not alive(killed), "the server does not die")
        wait_until(lambda: answers(f"{url}/livez"), "the server is not restarted", 180)
        worker = up.child("worker start")
        assert f"DPNET_SERVE_URL={url}".encode() in Path(f"/proc/{worker}/environ").read_bytes()
        for log in (up.root / "up").glob("*.log"):
            assert token not in log.read_text(), log.name


def test_ctrl_c_stops_everything_and_keeps_the_database(tmp_path: Path) -> None:
    root = tmp_path / "root"
    ray_folders = set(Path("/tmp").glob("dpnet-ray-up-*"))
    with started(root, "--ray") as up:
        assert "<html" in ask(str(up.running.ray_url))
        jobs, token = f"{up.running.ray_url}/api/jobs/", Path(str(up.running.ray_token))
        with pytest.raises(urllib.error.HTTPError, match="401"):
            ask(jobs)
        assert ask(jobs, Authorization=f"Bearer {token.read_text()}") == []
        assert token.stat().st_mode & 0o77 == 0 == token.parent.stat().st_mode & 0o77
        run_sleeper(up, tmp_path)
        processes = family(up.process.pid)
        assert interfaces(processes) == {"127.0.0.1"}
        start = time.monotonic()
        up.process.send_signal(signal.SIGINT)
        assert up.process.wait(60) == 130
        assert time.monotonic() - start < 45
        assert not [pid for pid in processes if alive(pid)]
    assert not set(Path("/tmp").glob("dpnet-ray-up-*")) - ray_folders
    assert not (root / "up" / "up.json").exists()
    with sqlite3.connect(root / "up" / "prefect.db") as database:
        assert database.execute("select name from deployment").fetchall() == [("test",)]
        ((state,),) = database.execute("select state_type from flow_run").fetchall()
    assert state == "CRASHED"  # its last state reached the server


def test_ctrl_c_during_the_start_leaves_no_process_behind(tmp_path: Path) -> None:
    process = subprocess.Popen(
        up_command(tmp_path),
        env=environment(USERS),
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=end_with_parent,
    )
    assert process.stderr is not None
    line = process.stderr.readline()
    assert line.endswith(" INFO flows.local_server.supervisor: starting Prefect's server\n")
    wait_until(lambda: len(family(process.pid)) > 2, "no server")
    processes = family(process.pid)
    process.send_signal(signal.SIGINT)
    assert "stopped" in process.stderr.read()
    assert process.wait(45) == 130
    assert not [pid for pid in processes if alive(pid)]


def test_the_users_own_password_is_used_and_shown_nowhere(tmp_path: Path) -> None:
    root = tmp_path / "root"
    with started(root, PREFECT_API_AUTH_STRING=PASSWORD) as up:
        assert ask(f"{up.running.api_url}/work_pools/dpnet", PASSWORD)["name"] == "dpnet"
        assert len(online_workers(up)) == 1
        assert up.login_url == up.running.ui_url  # the user's own password is not shown
        assert not (up.home / "password").exists()
        assert ask(f"{up.running.ui_url}/ui-settings")["auth"] == "BASIC"
    written = [up.out, *up.home.glob("*.log"), up.home / "up.json"]
    assert not any(b"correct-horse" in path.read_bytes() for path in written if path.exists())


def old_database(root: Path) -> None:
    (root / "up").mkdir(parents=True)
    (root / "up" / "created").touch()
    with sqlite3.connect(root / "up" / "prefect.db") as database:
        database.execute("create table alembic_version (version_num varchar(32) not null)")
        database.execute("insert into alembic_version values ('0123456789ab')")


def test_a_database_of_another_version_of_prefect_is_refused(tmp_path: Path) -> None:
    old_database(tmp_path)
    line = refused(tmp_path)
    assert f"{tmp_path}/up/prefect.db belongs to another version of Prefect" in line


def test_a_damaged_database_is_refused_and_not_changed(tmp_path: Path) -> None:
    old_database(tmp_path)
    (tmp_path / "up" / "prefect.db").write_bytes(b"no database" * 1000)
    assert f"{tmp_path}/up/prefect.db is damaged: move it away" in refused(tmp_path)
    assert (tmp_path / "up" / "prefect.db").read_bytes() == b"no database" * 1000


def test_an_unreachable_database_is_refused_without_showing_its_password(tmp_path: Path) -> None:
    address = f"127.0.0.1:{free_port()}/prefect"
    line = refused(tmp_path, "--database", f"postgresql+asyncpg://me:hunter2@{address}")
    assert f"postgresql+asyncpg://{address} cannot be reached: start it" in line
    assert b"hunter2" not in (tmp_path / "up" / "server.log").read_bytes()


def test_a_postgres_database_is_used_and_its_password_is_shown_nowhere(tmp_path: Path) -> None:
    with postgres() as port:
        address = f"127.0.0.1:{port}/dpnet"
        line = refused(tmp_path, "--database", f"postgresql+asyncpg://dpnet:wrong@{address}")
        assert f"postgresql+asyncpg://{address} refuses the user or the password" in line
        assert "wrong" not in line
        root = tmp_path / "root"
        url = f"postgresql+asyncpg://dpnet:hunter2@{address}"
        with started(root, PREFECT_SERVER_DATABASE_CONNECTION_URL=url) as up:
            assert online_workers(up)
            up.deploy("watch=null", "retrain=null")
            few = ["images.size=32", "masks.size=32", "masks.train=4", "masks.eval_per_bin=1"]
            up.wait_for(up.run("prepare-masks", {"overrides": few}), "COMPLETED")
            for pid in family(up.process.pid):
                assert "hunter2" not in command_of(pid)
                if "worker start" in command_of(pid) or "mlflow" in command_of(pid):
                    assert b"hunter2" not in Path(f"/proc/{pid}/environ").read_bytes()
        assert not (root / "up" / "prefect.db").exists()
        written = [up.out, *up.home.glob("*.log")]
        assert not any(b"hunter2" in path.read_bytes() for path in written)
