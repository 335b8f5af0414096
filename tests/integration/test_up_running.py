"""`dpnet up` as a user runs it: what it starts, what it survives, what it leaves."""

from __future__ import annotations

import base64
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
from clusters import alive, command_of, end_with_parent, family, free_port, wait_until
from platforms import Platform, environment, platform

from flows.local_server.up import Running, running

pytestmark = [
    pytest.mark.integration,
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc"),
]
PASSWORD = "admin:correct-horse"
# What a user may have set for a Prefect and an MLflow of theirs. Nothing listens there.
THEIRS = {
    "PREFECT_API_URL": "http://127.0.0.1:9/api",
    "PREFECT_PROFILE": "none-such",
    "MLFLOW_TRACKING_URI": "http://127.0.0.1:9",
}
# A flow whose process has a child in a session of its own, as a training has.
FLOW = """
import subprocess, time
from pathlib import Path
from prefect import flow

@flow
def sleeper(told: str):
    child = subprocess.Popen(["sleep", "601"], start_new_session=True)
    Path(told).write_text(str(child.pid))
    time.sleep(600)
"""
DEPLOY = """
import sys
from prefect import flow
from prefect.deployments import run_deployment

source = flow.from_source(source=sys.argv[1], entrypoint="sleeping.py:sleeper")
source.deploy(name="test", work_pool_name="dpnet", print_next_steps=False)
run_deployment("sleeper/test", parameters={"told": sys.argv[2]}, timeout=0)
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


def command(*options: str) -> list[str]:
    return [sys.executable, "-m", "dpnet", "up", *options]


def started(root: Path, *options: str, **more: str) -> AbstractContextManager[Platform]:
    return platform(root, *options, **THEIRS, **more)


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    with started(tmp_path_factory.mktemp("up") / "root") as found:
        yield found


def ask(url: str, password: str = "", body: Any = None, **headers: str) -> Any:
    """The answer's JSON, or its text where it is none."""
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


def answers(url: str) -> bool:
    try:
        ask(url)
    except OSError:
        return False
    return True


def status_of(url: str) -> int:
    """The HTTP status with which it is refused."""
    with pytest.raises(urllib.error.HTTPError) as caught:
        ask(url)
    return caught.value.code


def online(told: Running, password: str = "") -> list[str]:
    """Workers of the pool that are online."""
    workers = ask(f"{told.api_url}/work_pools/dpnet/workers/filter", password, {})
    return [worker["name"] for worker in workers if worker["status"] == "ONLINE"]


def run_sleeper(up: Platform, folder: Path) -> tuple[int, int]:
    """Run the flow through the worker; the processes of the flow and of its child."""
    (folder / "sleeping.py").write_text(FLOW)
    told = folder / "told"
    subprocess.run(
        [sys.executable, "-c", DEPLOY, str(folder), str(told)],
        env=environment({"PREFECT_API_URL": up.told.api_url, "PREFECT_HOME": str(folder)}),
        cwd=folder,
        check=True,
        capture_output=True,
    )
    wait_until(lambda: told.exists() and told.read_text(), "the flow does not run", 180)
    child = int(told.read_text())
    stat = Path(f"/proc/{child}/stat").read_text()
    return int(stat.rpartition(")")[2].split()[1]), child


def refused(root: Path, *options: str, **more: str) -> str:
    """The one sentence of one that does not start."""
    done = subprocess.run(
        command("--root", str(root), *options),
        env=environment({**THEIRS, **more}),
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
    told = up.told
    assert ask(f"{told.api_url}/health") is True
    assert "<html" in ask(told.ui_url)
    assert ask(f"{told.ui_url}/ui-settings")["api_url"] == told.api_url
    assert "<html" in ask(told.mlflow_url)
    assert len(online(told)) == 1
    assert ask(f"{told.api_url}/work_pools/dpnet")["type"] == "process"
    assert told.ray_url is None


def test_mlflow_takes_what_a_browser_sends_from_its_own_pages(up: Platform) -> None:
    search = f"{up.told.mlflow_url}/ajax-api/2.0/mlflow/experiments/search"
    found = ask(search, body={"max_results": 5}, Origin=up.told.mlflow_url)
    assert found["experiments"][0]["name"] == "Default"


def test_mlflow_refuses_what_another_site_sends(up: Platform) -> None:
    search = f"{up.told.mlflow_url}/ajax-api/2.0/mlflow/experiments/search"
    with pytest.raises(urllib.error.HTTPError) as caught:
        ask(search, body={"max_results": 5}, Origin="http://evil.example")
    assert caught.value.code == 403


def test_a_model_of_a_local_root_is_registered_through_the_server(
    up: Platform, tmp_path: Path
) -> None:
    unit = str(Path(__file__).parents[1] / "support")
    path = os.pathsep.join([unit, os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", REGISTER, str(tmp_path)],
        env=environment({"MLFLOW_TRACKING_URI": up.told.mlflow_url, "PYTHONPATH": path}),
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (0, "champion\n"), done.stderr
    search = f"{up.told.mlflow_url}/api/2.0/mlflow/registered-models/search"
    (model,) = ask(search)["registered_models"]
    assert model["name"] == "through-up"
    assert model["aliases"] == [{"alias": "champion", "version": "1"}]


def test_a_second_one_tells_the_same_addresses_and_ends(up: Platform) -> None:
    root = str(up.home.parent)
    done = subprocess.run(
        command("--root", root, "--json"), env=environment(THEIRS), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"ok": True, "attached": True, **up.told.to_json()}
    assert running(root) == up.told


def test_a_second_one_that_asks_for_more_is_told_to_stop_the_first(up: Platform) -> None:
    assert "without Ray: stop it" in refused(up.home.parent, "--ray")
    assert f"at {up.told.ui_url}: stop it" in refused(up.home.parent, f"--port={free_port()}")


def test_a_port_that_is_taken_is_one_sentence(up: Platform, tmp_path: Path) -> None:
    port = up.told.ui_url.rpartition(":")[2]
    assert f"port {port} is taken: choose another --port" in refused(tmp_path, f"--port={port}")


def test_two_roots_are_up_side_by_side(up: Platform, tmp_path: Path) -> None:
    with started(tmp_path / "other") as other:
        assert len({*up.told.to_json().values(), *other.told.to_json().values()}) == 13
        assert online(other.told)


def test_of_a_schedule_runs_are_made(up: Platform) -> None:
    up.deploy("watch=0 0 1 1 *", "retrain=null")
    (flow,) = up.ask("/flows/filter", {"flows": {"name": {"any_": ["watch-raw-data"]}}})
    asked = {"flow_runs": {"state": {"type": {"any_": ["SCHEDULED"]}}}}
    asked["flows"] = {"id": {"any_": [flow["id"]]}}
    wait_until(lambda: up.ask("/flow_runs/filter", asked), "the scheduler makes none", 120)
    at = {run["expected_start_time"][4:10] for run in up.ask("/flow_runs/filter", asked)}
    assert at == {"-01-01"}
    assert "Traceback" not in (up.home / "server.log").read_text()


def test_a_server_that_is_killed_comes_back_at_its_port(up: Platform) -> None:
    killed = up.child("flows.local_server.server")
    os.kill(killed, signal.SIGKILL)
    wait_until(lambda: not alive(killed), "it lives")
    wait_until(lambda: answers(f"{up.told.api_url}/health"), "no server", 180)
    assert up.child("flows.local_server.server") != killed
    assert "Prefect's server has died" in up.out.read_text()


def test_a_worker_that_is_killed_comes_back_and_its_flow_run_goes_on(
    up: Platform, tmp_path: Path
) -> None:
    flow, child = run_sleeper(up, tmp_path)
    killed = up.child("worker start")
    os.kill(killed, signal.SIGKILL)
    wait_until(lambda: "the worker has died" in up.out.read_text(), "it is not told")
    wait_until(
        lambda: [p for p in family(up.process.pid) if "worker start" in command_of(p)], "no worker"
    )
    assert up.child("worker start") != killed
    assert alive(flow)
    assert alive(child)
    assert child in family(up.process.pid)  # so that it ends with all the rest, at the latest


def test_killed_it_leaves_nothing_behind(up: Platform, tmp_path: Path) -> None:
    # The last test on the shared one: also the orphans of the killed worker must end.
    flow, child = run_sleeper(up, tmp_path)
    mine = family(up.process.pid)
    assert {flow, child} <= set(mine)
    os.kill(up.process.pid, signal.SIGKILL)
    wait_until(lambda: not [pid for pid in mine if alive(pid)], "some are left", 45)
    assert running(str(up.home.parent)) is None


def test_ctrl_c_stops_everything_and_what_was_done_is_kept(tmp_path: Path) -> None:
    root = tmp_path / "root"
    scratch = set(Path("/tmp").glob("dpnet-ray-up-*"))
    with started(root, "--ray") as up:
        assert "<html" in ask(str(up.told.ray_url))
        assert ask(f"{up.told.ray_url}/api/jobs/") == []
        run_sleeper(up, tmp_path)
        mine = family(up.process.pid)
        begun = time.monotonic()
        up.process.send_signal(signal.SIGINT)
        assert up.process.wait(60) == 130
        assert time.monotonic() - begun < 45
        assert not [pid for pid in mine if alive(pid)]
    assert not set(Path("/tmp").glob("dpnet-ray-up-*")) - scratch
    assert not (root / "up" / "up.json").exists()
    with sqlite3.connect(root / "up" / "prefect.db") as database:
        assert database.execute("select name from deployment").fetchall() == [("test",)]
        ((state,),) = database.execute("select state_type from flow_run").fetchall()
    assert state == "CRASHED"  # its last words reached the server


def test_ctrl_c_while_it_starts_leaves_nothing(tmp_path: Path) -> None:
    process = subprocess.Popen(
        command("--root", str(tmp_path)),
        env=environment(THEIRS),
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=end_with_parent,
    )
    assert process.stderr is not None
    assert process.stderr.readline() == "starting Prefect's server\n"
    wait_until(lambda: len(family(process.pid)) > 2, "no server")
    mine = family(process.pid)
    process.send_signal(signal.SIGINT)
    assert "stopped" in process.stderr.read()
    assert process.wait(45) == 130
    assert not [pid for pid in mine if alive(pid)]


def test_with_a_password_nobody_gets_in_without_it_and_the_worker_does(tmp_path: Path) -> None:
    root = tmp_path / "root"
    with started(root, PREFECT_API_AUTH_STRING=PASSWORD) as up:
        assert status_of(f"{up.told.api_url}/work_pools/dpnet") == 401
        assert ask(f"{up.told.api_url}/work_pools/dpnet", PASSWORD)["name"] == "dpnet"
        assert len(online(up.told, PASSWORD)) == 1
        assert ask(f"{up.told.ui_url}/ui-settings")["auth"] == "BASIC"
    written = [up.out, *up.home.glob("*.log"), up.home / "up.json"]
    assert not any(b"correct-horse" in path.read_bytes() for path in written if path.exists())


def old_database(root: Path) -> None:
    (root / "up").mkdir(parents=True)
    (root / "up" / "created").touch()
    with sqlite3.connect(root / "up" / "prefect.db") as database:
        database.execute("create table alembic_version (version_num varchar(32) not null)")
        database.execute("insert into alembic_version values ('0123456789ab')")


def test_a_database_of_another_prefect_is_one_sentence(tmp_path: Path) -> None:
    old_database(tmp_path)
    line = refused(tmp_path)
    assert f"{tmp_path}/up/prefect.db belongs to another version of Prefect" in line


def test_a_damaged_database_is_one_sentence_and_is_not_touched(tmp_path: Path) -> None:
    old_database(tmp_path)
    (tmp_path / "up" / "prefect.db").write_bytes(b"no database" * 1000)
    assert f"{tmp_path}/up/prefect.db is damaged: move it away" in refused(tmp_path)
    assert (tmp_path / "up" / "prefect.db").read_bytes() == b"no database" * 1000


def test_a_database_out_of_reach_is_one_sentence_without_its_password(tmp_path: Path) -> None:
    place = f"127.0.0.1:{free_port()}/prefect"
    line = refused(tmp_path, "--database", f"postgresql+asyncpg://me:hunter2@{place}")
    assert f"postgresql+asyncpg://{place} cannot be reached: start it" in line
    assert b"hunter2" not in (tmp_path / "up" / "server.log").read_bytes()


@contextmanager
def postgres() -> Iterator[int]:
    """A PostgreSQL with the user and database `dpnet`, password `hunter2`; its port."""
    programs = {name: shutil.which(name) for name in ("initdb", "postgres", "psql")}
    for found in sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True):
        programs |= {k: str(found / k) for k, v in programs.items() if v is None}
    if missing := [k for k, v in programs.items() if v is None or not Path(v).exists()]:
        pytest.skip(f"PostgreSQL is not installed ({', '.join(missing)})")
    as_other = ["runuser", "-u", "nobody", "--"] if os.getuid() == 0 else []
    folder = Path(tempfile.mkdtemp(prefix="dpnet-pg-", dir="/tmp"))
    if as_other:
        shutil.chown(folder, "nobody")
    port = free_port()
    (folder / "password").write_text("hunter2")
    (folder / "password").chmod(0o644)
    make = [
        str(programs["initdb"]),
        "-D",
        str(folder / "data"),
        "-U",
        "dpnet",
        "-A",
        "scram-sha-256",
    ]
    make += [f"--pwfile={folder}/password", "-E", "UTF8", "--locale=C", "--no-sync"]
    subprocess.run([*as_other, *make], check=True, capture_output=True, cwd=folder)
    serve = [str(programs["postgres"]), "-D", str(folder / "data"), "-p", str(port)]
    serve += ["-k", str(folder), "-h", "127.0.0.1"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [*as_other, *serve], stdout=log, stderr=log, cwd=folder, preexec_fn=end_with_parent
        )
    create = [str(programs["psql"]), "-h", "127.0.0.1", "-p", str(port), "-U", "dpnet"]
    create += ["-d", "postgres", "-c", "create database dpnet"]

    def created() -> bool:
        assert process.poll() is None, (folder / "log").read_text()
        env = {**os.environ, "PGPASSWORD": "hunter2"}
        return subprocess.run(create, env=env, capture_output=True).returncode == 0

    try:
        wait_until(created, f"no database: {folder}")
        yield port
    finally:
        for pid in reversed(family(process.pid)):
            os.kill(pid, signal.SIGINT) if alive(pid) else None
        process.wait(30)
        shutil.rmtree(folder, ignore_errors=True)


def test_postgres_by_url_holds_everything_and_its_password_is_nowhere(tmp_path: Path) -> None:
    with postgres() as port:
        at = f"127.0.0.1:{port}/dpnet"
        line = refused(tmp_path, "--database", f"postgresql+asyncpg://dpnet:wrong@{at}")
        assert f"postgresql+asyncpg://{at} refuses the user or the password" in line
        assert "wrong" not in line
        root = tmp_path / "root"
        url = f"postgresql+asyncpg://dpnet:hunter2@{at}"
        with started(root, PREFECT_SERVER_DATABASE_CONNECTION_URL=url) as up:
            assert online(up.told)
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
