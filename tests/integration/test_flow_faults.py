"""Runs of deployments on a real `dpnet up` with a real Ray cluster, while parts of them die."""

from __future__ import annotations

import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import pytest
from clusters import alive, command_of, end_with_parent, family, send, wait_until
from PIL import Image
from platforms import ENDED, Platform, environment, platform
from sockets import interfaces, listening

pytestmark = [
    pytest.mark.integration,
    pytest.mark.slow,
    pytest.mark.rotated(4),
    pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc"),
]
CONFIG = """
name: faults
images: {{source: {photos}, name: k, size: 32, val: 0.2, test: 0.2, workers: 1}}
masks: {{name: k, size: 32, recipes: {{box-random: 1.0}}, train: 30, eval_per_bin: 2, workers: 1}}
model: {{preset: tiny}}
losses: {{adversarial: 0}}
train: {{steps: {steps}, batch_size: 1, warmup_steps: 2, checkpoint_every: 5,
  validate_every: 1000, validation_pairs: 1, workers: 1}}
evaluate: {{pictures: 1}}
register: {{promote: always}}
"""
STEPS = 600  # enough that a fast machine is still training when a fault happens
KEY, BLOCK = "a-key-that-nobody-may-see", "a-block-that-nobody-may-see"
PASSWORD = "admin:a-password-that-nobody-may-see"
SETS = ["watch=null", "retrain=null", "secrets.DPNET_TEST_SECRET=the-block"]
HIDE = """
import sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("flows", "dpnet", "data_prep"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Hidden())
"""
ON_RAY = {"launch": {"launcher": "ray-job"}}


@dataclass
class Faults:
    """The platform and the config of all runs.

    Each test trains with its own seed, so the tests share the shards but no training.
    """

    up: Platform
    config: Path
    alerts: list[str] = field(default_factory=list)  # the bodies of the alerts sent
    started: list[str] = field(default_factory=list)  # the flow runs of this test

    def run(self, seed: int, *overrides: str, flow: str = "train", **more: Any) -> str:
        parameters = {
            "config": str(self.config),
            "overrides": [f"train.seed={seed}", *overrides],
            **more,
        }
        self.started.append(self.up.run(flow, parameters))
        return self.started[-1]

    def end_runs(self) -> None:
        """Cancel the runs that a failed test has left: they would slow down the next test."""
        for run in self.started:
            match self.up.state(run)["type"]:
                case "RUNNING":
                    self.up.set_state(run, type="CANCELLING")
                    self.up.wait_for(run, *ENDED)
                case "SCHEDULED" | "PENDING":
                    self.up.set_state(run, type="CANCELLED")
        self.started.clear()

    def training(self, seed: int) -> Path | None:
        """Return the folder of the training with this seed, or None if it has not begun."""
        found = [
            each.parent
            for each in self.up.root.glob("runs/*/resolved-config.yaml")
            if f"seed: {seed}\n" in each.read_text()
        ]
        assert len(found) <= 1
        return found[0] if found else None

    def status(self, seed: int) -> dict[str, Any]:
        folder = self.training(seed)
        try:
            return dict(json.loads((folder / "status.json").read_text())) if folder else {}
        except FileNotFoundError:
            return {}

    def wait_for_step(self, run: str, seed: int, step: int) -> None:
        """Wait until training has reached a step, while the run is running."""

        def is_reached() -> bool:
            self.up.wait_for(run, "SCHEDULED", "PENDING", "RUNNING")
            return int(self.status(seed).get("step", 0)) >= step

        wait_until(is_reached, "training makes no progress", 240)

    @contextmanager
    def waiting_time(self, automation: str, seconds: float) -> Iterator[None]:
        """Change the waiting time of an automation of ours while in the block."""
        before = self._set_waiting_time(automation, seconds)
        assert before > seconds
        try:
            yield
        finally:
            self._set_waiting_time(automation, before)

    def _set_waiting_time(self, automation: str, seconds: float) -> float:
        """Set a waiting time; return the one before."""
        automations = self.up.ask("/automations/filter", {"limit": 200})
        (found,) = [each for each in automations if each["name"] == f"dpnet: {automation}"]
        fields = ("name", "description", "enabled", "trigger", "actions")
        body = {each: found[each] for each in fields}
        before = float(body["trigger"]["within"])
        body["trigger"]["within"] = seconds
        self.up.ask(f"/automations/{found['id']}", body, "PUT")
        return before

    def wait_for_alert(self, about: str, text: str) -> str:
        """Wait for an alert with `text`, and return its body."""

        def found() -> list[str]:
            return [each for each in self.alerts if f"dpnet: {about}" in each and text in each]

        wait_until(found, f"the alert is not sent: {self.alerts}", 120)
        return found()[0]

    def resumed_from(self, seed: int) -> int:
        folder = self.training(seed)
        assert folder
        return int(json.loads((folder / "manifest.json").read_text())["summary"]["resumed_from"])

    def jobs(self, seed: int) -> dict[str, str]:
        """Return the states of the cluster's jobs for this training, by attempt."""
        folder = self.training(seed)
        token = Path(str(self.up.running.ray_token)).read_text()
        request = urllib.request.Request(
            f"{self.up.running.ray_url}/api/jobs/", headers={"Authorization": f"Bearer {token}"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            jobs = json.load(answer)
        mine = [each for each in jobs if folder and folder.name in each["entrypoint"]]
        return {each["submission_id"].rpartition("-")[2]: each["status"] for each in mine}


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Faults]:
    folder = tmp_path_factory.mktemp("faults")
    config = folder / "faults.yaml"
    config.write_text(CONFIG.format(photos=make_photos(folder), steps=STEPS))
    secrets = {"AWS_SECRET_ACCESS_KEY": KEY, "PREFECT_API_AUTH_STRING": PASSWORD}
    with platform(folder / "root", "--ray", **secrets) as up, alert_server() as (url, alerts):
        block = {"name": "the-block", "data": {"value": BLOCK}}
        (kind,) = up.ask("/block_types/filter", {"block_types": {"slug": {"any_": ["secret"]}}})
        (schema,) = up.ask(
            "/block_schemas/filter",
            {"block_schemas": {"block_type_id": {"any_": [kind["id"]]}}, "limit": 1},
        )
        ids = {"block_type_id": kind["id"], "block_schema_id": schema["id"]}
        up.ask("/block_documents/", {**block, **ids})
        up.deploy(*SETS, DPNET_ALERT_URL=url)
        yield Faults(up, config, alerts)


@pytest.fixture(autouse=True)
def no_runs_stay(faults: Faults) -> Iterator[None]:
    """End the runs of each test."""
    yield
    faults.end_runs()


@contextmanager
def another_worker(faults: Faults, home: Path, **more: str) -> Iterator[None]:
    """Run a worker like one of another machine, while the platform's own worker is paused."""
    own = faults.up.child("worker start")
    env = environment(
        {
            "PREFECT_API_URL": faults.up.running.api_url,
            "PREFECT_API_AUTH_STRING": faults.up.password,
            "PREFECT_HOME": str(home),
            "DPNET_ROOT": str(faults.up.root),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            **more,
        }
    )
    command = [sys.executable, "-m", "prefect", "worker", "start", "--pool", "dpnet"]
    send(own, signal.SIGSTOP)
    try:
        with (home / "worker.log").open("wb") as log:
            worker = subprocess.Popen(
                [*command, "--name", "another"], env=env, cwd=home, stdout=log, stderr=log,
                preexec_fn=end_with_parent,
            )  # fmt: skip
        try:
            yield
        finally:
            worker.terminate()
            try:
                worker.wait(20)
            except subprocess.TimeoutExpired:
                worker.kill()  # Prefect's worker hangs if the process of a run is just ending
                worker.wait(20)
    finally:
        send(own, signal.SIGCONT)


@contextmanager
def alert_server() -> Iterator[tuple[str, list[str]]]:
    """Run a server that receives alerts. Yield its address and the bodies of the alerts."""
    alerts: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            alerts.append(self.rfile.read(int(self.headers["Content-Length"])).decode())
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/hook", alerts
        server.shutdown()


def make_photos(folder: Path) -> Path:
    photos = folder / "photos"
    photos.mkdir()
    rng = np.random.default_rng(0)
    for number in range(20):
        small = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(small).resize((40, 40)).save(photos / f"{number}.png")
    return photos


@pytest.mark.parametrize(("seed", "number"), [(1, signal.SIGKILL), (2, signal.SIGTERM)])
def test_the_job_of_a_dead_flow_process_keeps_running_and_the_retry_attaches_to_it(
    faults: Faults, seed: int, number: int
) -> None:
    run = faults.run(seed, **ON_RAY)
    faults.wait_for_step(run, seed, 6)
    faults.up.end(run, number)
    assert faults.jobs(seed) == {"1": "RUNNING"}
    faults.up.retry(run)
    faults.up.wait_for(run, "COMPLETED")
    assert faults.jobs(seed) == {"1": "SUCCEEDED"}
    assert faults.resumed_from(seed) == 0


def test_a_cancelled_run_stops_its_job_and_a_new_run_resumes_the_training(faults: Faults) -> None:
    run = faults.run(3, **ON_RAY)
    faults.wait_for_step(run, 3, 6)
    faults.up.set_state(run, type="CANCELLING")
    wait_until(lambda: faults.jobs(3) == {"1": "STOPPED"}, "the job keeps running", 30)
    faults.up.wait_for(run, "CANCELLED")
    assert "CRASHED" not in faults.up.states(run)
    again = faults.run(3, **ON_RAY)
    faults.up.wait_for(again, "COMPLETED")
    assert faults.jobs(3) == {"1": "STOPPED", "2": "SUCCEEDED"}
    assert faults.resumed_from(3) >= 5
    assert faults.up.tasks(again)["prepare images"] == "Skipped"


def test_everything_listens_on_loopback_while_a_job_trains(faults: Faults) -> None:
    run = faults.run(16, **ON_RAY)
    faults.wait_for_step(run, 16, 6)
    (worker,) = faults.status(16)["workers"]
    assert worker["pid"] in family(faults.up.process.pid)
    assert listening([worker["pid"]])
    assert interfaces(family(faults.up.process.pid)) == {"127.0.0.1"}
    faults.up.set_state(run, type="CANCELLING")
    faults.up.wait_for(run, "CANCELLED")


def test_a_cancelled_run_on_this_machine_leaves_no_ray_process_behind(faults: Faults) -> None:
    run = faults.run(4)
    faults.wait_for_step(run, 4, 6)
    own = faults.up.processes_of(run)
    commands = " ".join(map(command_of, own))
    assert "raylet" in commands
    (scratch,) = set(re.findall(r"/tmp/dpnet-ray-\w+", commands))
    faults.up.set_state(run, type="CANCELLING")
    faults.up.wait_for(run, "CANCELLED", seconds=60)
    wait_until(lambda: not any(map(alive, own)), "processes remain", 30)
    # The run ended by itself: a run that is killed, after half a minute, leaves its folder.
    assert not Path(scratch).exists()
    again = faults.run(4)
    faults.up.wait_for(again, "COMPLETED")
    assert faults.resumed_from(4) >= 5


def test_a_run_survives_the_death_of_its_worker(faults: Faults) -> None:
    run = faults.run(5)
    faults.wait_for_step(run, 5, 6)
    send(faults.up.child("worker start"), signal.SIGKILL)
    faults.up.wait_for(run, "COMPLETED")
    assert faults.resumed_from(5) == 0


def test_a_run_without_process_and_worker_is_marked_crashed_and_resumes_on_retry(
    faults: Faults,
) -> None:
    # 120 s as deployed. Later tests need that: on a busy machine their heartbeats are late. It is
    # changed before the run, because a change forgets the heartbeats that were seen before.
    with faults.waiting_time("a run without heartbeat has crashed", 35):
        run = faults.run(6)
        faults.wait_for_step(run, 6, 6)
        for pid in [faults.up.child("worker start"), *faults.up.processes_of(run)]:
            send(pid, signal.SIGKILL)
        state = faults.up.wait_for(run, "CRASHED")
    assert state["message"] == ("The process of this run is gone. Retry resumes where it stopped.")
    faults.up.retry(run)
    faults.up.wait_for(run, "COMPLETED")
    assert faults.resumed_from(6) >= 5
    assert faults.up.tasks(run)["prepare images"] == "Skipped"


def test_a_run_survives_a_restart_of_the_server(faults: Faults) -> None:
    run = faults.run(7)
    faults.wait_for_step(run, 7, 6)
    send(faults.up.child("flows.local_server.server"), signal.SIGKILL)
    faults.up.wait_for(run, "COMPLETED")
    assert faults.resumed_from(7) == 0


def test_two_pipelines_can_run_at_the_same_time(faults: Faults) -> None:
    runs = {seed: faults.run(seed) for seed in (8, 9)}
    for seed, run in runs.items():
        faults.wait_for_step(run, seed, 1)
    assert all(0 < faults.status(seed)["step"] < STEPS for seed in runs)
    for run in runs.values():
        assert faults.up.wait_for(run, "RUNNING")
    for run in runs.values():
        faults.up.wait_for(run, "COMPLETED")


def test_the_same_pipeline_started_twice_trains_once(faults: Faults) -> None:
    runs = [faults.run(10, "train.steps=10") for _ in range(2)]
    for run in runs:
        faults.up.wait_for(run, "COMPLETED")
    names = [faults.up.tasks(run)["train"] for run in runs]
    assert sorted(names) == ["Completed", "Skipped"]
    folder = faults.training(10)
    assert folder
    with sqlite3.connect(faults.up.root / "mlflow.db") as database:
        (count,) = database.execute(
            "select count(distinct run_uuid) from tags where value like ?", (f"%{folder.name}%",)
        ).fetchone()
    assert count == 1


def test_another_worker_retries_a_failed_run_and_skips_its_finished_stages(
    faults: Faults, tmp_path: Path
) -> None:
    blocked = faults.up.root / "evaluations"
    aside = blocked.rename(faults.up.root / "aside") if blocked.exists() else None
    blocked.write_text("not a folder")
    run = faults.run(11, "train.steps=10", flow="dpnet-pipeline")
    failed = faults.up.wait_for(run, "FAILED")
    name = faults.up.ask(f"/flow_runs/{run}")["name"]
    blocked.unlink()
    if aside:
        aside.rename(blocked)
    with another_worker(faults, tmp_path):
        faults.up.retry(run)
        faults.up.wait_for(run, "COMPLETED")
    tasks = faults.up.tasks(run)
    assert [tasks[each] for each in ("prepare images", "prepare masks", "train")] == [
        "Skipped",
        "Skipped",
        "Skipped",
    ]
    assert (tasks["evaluate"], tasks["register"]) == ("Completed", "Completed")
    alert = faults.wait_for_alert("failed runs", name)
    assert "evaluations" in failed["message"]
    assert failed["message"].rpartition(": ")[2][:40] in alert


def test_a_run_on_a_worker_without_the_package_crashes_and_its_log_names_the_missing_module(
    faults: Faults, tmp_path: Path
) -> None:
    (tmp_path / "sitecustomize.py").write_text(HIDE)
    with another_worker(faults, tmp_path, PYTHONPATH=str(tmp_path)):
        run = faults.run(12)
        faults.up.wait_for(run, "CRASHED")
        missing = "No module named 'flows"
        wait_until(lambda: missing in faults.up.log_of(run), "the log does not name it", 60)


@pytest.mark.parametrize(
    ("wrong", "name"),
    [
        ({"train": {"steps": 0}}, "steps"),
        ({"train": {"no_such": 1}}, "no_such"),
        ({"no_such": 1}, "no_such"),
    ],
)
def test_wrong_parameters_are_refused_before_anything_starts(
    faults: Faults, wrong: dict[str, Any], name: str
) -> None:
    with pytest.raises(urllib.error.HTTPError) as caught:
        faults.run(13, **wrong)
    assert caught.value.code in (409, 422)
    assert name in caught.value.read().decode()


def test_a_wrong_password_is_one_sentence_that_says_what_to_set(faults: Faults) -> None:
    done = faults.up.dpnet("deploy", PREFECT_API_AUTH_STRING="admin:wrong")
    assert done.returncode == 1
    assert "Set PREFECT_API_AUTH_STRING to its user:password." in done.stderr
    assert "Traceback" not in done.stderr


def test_a_promotion_sends_an_alert(faults: Faults) -> None:
    event = {
        "occurred": datetime.now(UTC).isoformat(),
        "event": "dpnet.model.promoted",
        "resource": {"prefect.resource.id": "dpnet.model.faults"},
        "payload": {"reason": "It is better by 0.3 dB."},
        "id": str(uuid4()),
    }
    faults.up.ask("/events", [event])
    faults.wait_for_alert("promotions", "It is better by 0.3 dB.")


def test_a_run_without_progress_sends_an_alert(faults: Faults) -> None:
    with faults.waiting_time("alert about stuck runs", 10):  # 30 min as deployed
        run = faults.run(14)
        faults.wait_for_step(run, 14, 1)
        own = faults.up.processes_of(run)
        for pid in own:
            send(pid, signal.SIGSTOP)
        try:
            faults.wait_for_alert("stuck runs", faults.up.ask(f"/flow_runs/{run}")["name"])
        finally:
            for pid in own:
                send(pid, signal.SIGCONT)
    faults.up.set_state(run, type="CANCELLING")
    faults.up.wait_for(run, "CANCELLED")


def test_no_secret_is_stored_or_served(faults: Faults) -> None:
    run = faults.run(15, "train.steps=10", **ON_RAY)
    process = faults.up.flow_process(run)
    given = Path(f"/proc/{process}/environ").read_bytes()
    assert all(secret.encode() in given for secret in (KEY, BLOCK, PASSWORD))
    faults.up.wait_for(run, "COMPLETED")
    for secret in (KEY, BLOCK, PASSWORD.partition(":")[2]):
        holders = [
            str(path)
            for path in faults.up.root.rglob("*")
            if path.is_file() and secret.encode() in path.read_bytes()
        ]
        assert holders == []
        served = [faults.up.log_of(run), json.dumps(faults.up.ask("/artifacts/filter", {}))]
        served += [json.dumps(faults.up.ask(f"/flow_runs/{run}")), *faults.alerts]
        assert not any(secret in each for each in served)


def test_new_photos_are_announced_and_start_one_retrain(
    faults: Faults,
) -> None:
    faults.up.deploy(*SETS, f"config={faults.config}", "overrides=[train.steps=10]")
    faults.up.wait_for(faults.up.run("dpnet-pipeline", {}), "COMPLETED")
    photos = faults.config.parent / "photos"
    for number in range(20, 26):
        Image.new("RGB", (40, 40), (9 * number, 90, 200 - number)).save(photos / f"{number}.png")

    watched = faults.up.run("watch-raw-data", {})
    assert faults.up.wait_for(watched, "COMPLETED")["name"] == "Completed"
    of_retrain = {"flows": {"name": {"any_": ["retrain"]}}}
    wait_until(lambda: faults.up.ask("/flow_runs/filter", of_retrain), "no retrain is started")
    (run,) = faults.up.ask("/flow_runs/filter", of_retrain)
    assert run["parameters"]["event"]["new"] == 6
    faults.up.wait_for(run["id"], "COMPLETED")
    tasks = faults.up.tasks(run["id"])
    assert tasks["train"] == tasks["evaluate the champion"] == tasks["register"] == "Completed"
    artifacts = {
        "flow_runs": {"id": {"any_": [run["id"]]}},
        "artifacts": {"key": {"any_": ["retrain"]}},
    }
    (artifact,) = faults.up.ask("/artifacts/filter", artifacts)
    assert "previous champion" in artifact["data"]
    assert "register.promote is always" in artifact["data"]

    again = [faults.up.run("watch-raw-data", {}), *(faults.up.run("retrain", {}) for _ in range(2))]
    assert {faults.up.wait_for(each, "COMPLETED")["name"] for each in again} == {"Skipped"}
