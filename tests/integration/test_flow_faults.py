"""Runs of deployments on a real `dpnet up` with a real Ray cluster, of which parts die."""

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
from clusters import alive, command_of, end_with_parent, send, wait_until
from PIL import Image
from platforms import Platform, environment, platform

pytestmark = [
    pytest.mark.integration,
    pytest.mark.slow,
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
"""
STEPS = 300  # so many that a quick machine is still at it when a fault comes
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
class Place:
    """The platform and the config that its runs share. Each test trains with a seed of its own, so
    all have the same shards and none the same training."""

    up: Platform
    config: Path
    told: list[str] = field(default_factory=list)  # what alerts say

    def run(self, seed: int, *overrides: str, flow: str = "train", **more: Any) -> str:
        parameters = {
            "config": str(self.config),
            "overrides": [f"train.seed={seed}", *overrides],
            **more,
        }
        return self.up.run(flow, parameters)

    def training(self, seed: int) -> Path | None:
        """The folder of the one training with this seed, if it has begun."""
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
        """Until training is there, while the run goes on."""

        def there() -> bool:
            self.up.wait_for(run, "SCHEDULED", "PENDING", "RUNNING")
            return int(self.status(seed).get("step", 0)) >= step

        wait_until(there, "training does not move", 240)

    def quicken(self, automation: str, seconds: float) -> None:
        """Let an automation of ours wait so long."""
        everything = self.up.ask("/automations/filter", {"limit": 200})
        (found,) = [each for each in everything if each["name"] == f"dpnet: {automation}"]
        kept = ("name", "description", "enabled", "trigger", "actions")
        body = {each: found[each] for each in kept}
        body["trigger"]["within"] = seconds
        self.up.ask(f"/automations/{found['id']}", body, "PUT")

    def wait_for_alert(self, of: str, text: str) -> str:
        def found() -> list[str]:
            return [each for each in self.told if f"dpnet: {of}" in each and text in each]

        wait_until(found, f"nobody is told: {self.told}", 120)
        return found()[0]

    def resumed_from(self, seed: int) -> int:
        folder = self.training(seed)
        assert folder
        return int(json.loads((folder / "manifest.json").read_text())["summary"]["resumed_from"])

    def jobs(self, seed: int) -> dict[str, str]:
        """Jobs on the cluster for this training, and their states."""
        folder = self.training(seed)
        with urllib.request.urlopen(f"{self.up.running.ray_url}/api/jobs/", timeout=60) as answer:
            jobs = json.load(answer)
        mine = [each for each in jobs if folder and folder.name in each["entrypoint"]]
        return {each["submission_id"].rpartition("-")[2]: each["status"] for each in mine}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("faults")
    config = folder / "faults.yaml"
    config.write_text(CONFIG.format(photos=photographs(folder), steps=STEPS))
    secrets = {"AWS_SECRET_ACCESS_KEY": KEY, "PREFECT_API_AUTH_STRING": PASSWORD}
    with platform(folder / "root", "--ray", **secrets) as up, hook() as (url, told):
        block = {"name": "the-block", "data": {"value": BLOCK}}
        (kind,) = up.ask("/block_types/filter", {"block_types": {"slug": {"any_": ["secret"]}}})
        (schema,) = up.ask(
            "/block_schemas/filter",
            {"block_schemas": {"block_type_id": {"any_": [kind["id"]]}}, "limit": 1},
        )
        ids = {"block_type_id": kind["id"], "block_schema_id": schema["id"]}
        up.ask("/block_documents/", {**block, **ids})
        up.deploy(*SETS, DPNET_ALERT_URL=url)
        yield Place(up, config, told)


@contextmanager
def another_worker(place: Place, home: Path, **more: str) -> Iterator[None]:
    """A worker as on another machine in the place of the platform's own, which stands still."""
    own = place.up.child("worker start")
    env = environment(
        {
            "PREFECT_API_URL": place.up.running.api_url,
            "PREFECT_API_AUTH_STRING": place.up.password,
            "PREFECT_HOME": str(home),
            "DPNET_ROOT": str(place.up.root),
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
            worker.wait(60)
    finally:
        send(own, signal.SIGCONT)


@contextmanager
def hook() -> Iterator[tuple[str, list[str]]]:
    """A server that alerts are posted to: its address, and what it was sent."""
    told: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            told.append(self.rfile.read(int(self.headers["Content-Length"])).decode())
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/hook", told
        server.shutdown()


def photographs(folder: Path) -> Path:
    photos = folder / "photos"
    photos.mkdir()
    rng = np.random.default_rng(0)
    for number in range(20):
        small = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(small).resize((40, 40)).save(photos / f"{number}.png")
    return photos


@pytest.mark.parametrize(("seed", "number"), [(1, signal.SIGKILL), (2, signal.SIGTERM)])
def test_a_flow_process_that_ends_leaves_its_job_and_the_retry_attaches_to_it(
    place: Place, seed: int, number: int
) -> None:
    run = place.run(seed, **ON_RAY)
    place.wait_for_step(run, seed, 6)
    place.up.end(run, number)
    assert place.jobs(seed) == {"1": "RUNNING"}
    place.up.retry(run)
    place.up.wait_for(run, "COMPLETED")
    assert place.jobs(seed) == {"1": "SUCCEEDED"}
    assert place.resumed_from(seed) == 0


def test_a_cancelled_run_stops_its_job_and_a_new_one_resumes_it(place: Place) -> None:
    run = place.run(3, **ON_RAY)
    place.wait_for_step(run, 3, 6)
    place.up.set_state(run, type="CANCELLING")
    wait_until(lambda: place.jobs(3) == {"1": "STOPPED"}, "the job goes on", 30)
    place.up.wait_for(run, "CANCELLED")
    assert "CRASHED" not in place.up.states(run)
    again = place.run(3, **ON_RAY)
    place.up.wait_for(again, "COMPLETED")
    assert place.jobs(3) == {"1": "STOPPED", "2": "SUCCEEDED"}
    assert place.resumed_from(3) >= 5
    assert place.up.tasks(again)["prepare images"] == "Skipped"


def test_a_cancelled_run_on_this_machine_leaves_no_process_of_ray(place: Place) -> None:
    run = place.run(4)
    place.wait_for_step(run, 4, 6)
    own = place.up.processes_of(run)
    commands = " ".join(map(command_of, own))
    assert "raylet" in commands
    (scratch,) = set(re.findall(r"/tmp/dpnet-ray-\w+", commands))
    place.up.set_state(run, type="CANCELLING")
    place.up.wait_for(run, "CANCELLED", seconds=60)
    wait_until(lambda: not any(map(alive, own)), "processes are left", 30)
    # It ended by itself: one that is killed, as after half a minute, leaves its folder.
    assert not Path(scratch).exists()
    again = place.run(4)
    place.up.wait_for(again, "COMPLETED")
    assert place.resumed_from(4) >= 5


def test_a_dead_worker_takes_no_run_along(place: Place) -> None:
    run = place.run(5)
    place.wait_for_step(run, 5, 6)
    send(place.up.child("worker start"), signal.SIGKILL)
    place.up.wait_for(run, "COMPLETED")
    assert place.resumed_from(5) == 0


def test_a_run_whose_process_and_worker_are_dead_is_told_to_be_crashed_and_goes_on_by_retry(
    place: Place,
) -> None:
    place.quicken("a run without heartbeat has crashed", 35)  # 120 s as deployed
    run = place.run(6)
    place.wait_for_step(run, 6, 6)
    dead = [place.up.child("worker start"), *place.up.processes_of(run)]
    for pid in dead:
        send(pid, signal.SIGKILL)
    state = place.up.wait_for(run, "CRASHED")
    assert state["message"] == "Its process is gone: Retry goes on where it stopped."
    place.up.retry(run)
    place.up.wait_for(run, "COMPLETED")
    assert place.resumed_from(6) >= 5
    assert place.up.tasks(run)["prepare images"] == "Skipped"


def test_a_server_that_dies_and_comes_again_takes_no_run_along(place: Place) -> None:
    run = place.run(7)
    place.wait_for_step(run, 7, 6)
    send(place.up.child("flows.local_server.server"), signal.SIGKILL)
    place.up.wait_for(run, "COMPLETED")
    assert place.resumed_from(7) == 0


def test_two_pipelines_at_once_are_both_done(place: Place) -> None:
    runs = [place.run(seed, "train.steps=10") for seed in (8, 9)]
    for run in runs:
        place.up.wait_for(run, "COMPLETED")


def test_the_same_pipeline_twice_at_once_is_done_once(place: Place) -> None:
    runs = [place.run(10, "train.steps=10") for _ in range(2)]
    for run in runs:
        place.up.wait_for(run, "COMPLETED")
    names = [place.up.tasks(run)["train"] for run in runs]
    assert sorted(names) == ["Completed", "Skipped"]
    folder = place.training(10)
    assert folder
    with sqlite3.connect(place.up.root / "mlflow.db") as database:
        (count,) = database.execute(
            "select count(distinct run_uuid) from tags where value like ?", (f"%{folder.name}%",)
        ).fetchone()
    assert count == 1


def test_what_failed_is_retried_by_a_worker_that_knows_nothing_of_it(
    place: Place, tmp_path: Path
) -> None:
    blocked = place.up.root / "evaluations"
    aside = blocked.rename(place.up.root / "aside") if blocked.exists() else None
    blocked.write_text("no folder")
    run = place.run(11, "train.steps=10", flow="dpnet-pipeline")
    failed = place.up.wait_for(run, "FAILED")
    name = place.up.ask(f"/flow_runs/{run}")["name"]
    blocked.unlink()
    if aside:
        aside.rename(blocked)
    with another_worker(place, tmp_path):
        place.up.retry(run)
        place.up.wait_for(run, "COMPLETED")
    tasks = place.up.tasks(run)
    assert [tasks[each] for each in ("prepare images", "prepare masks", "train")] == [
        "Skipped",
        "Skipped",
        "Skipped",
    ]
    assert (tasks["evaluate"], tasks["register"]) == ("Completed", "Completed")
    alert = place.wait_for_alert("failed runs", name)
    assert "evaluations" in failed["message"]
    assert failed["message"].rpartition(": ")[2][:40] in alert


def test_a_run_on_a_worker_without_the_package_crashes_and_its_log_names_what_is_missing(
    place: Place, tmp_path: Path
) -> None:
    (tmp_path / "sitecustomize.py").write_text(HIDE)
    with another_worker(place, tmp_path, PYTHONPATH=str(tmp_path)):
        run = place.run(12)
        place.up.wait_for(run, "CRASHED")
        missing = "No module named 'flows"
        wait_until(lambda: missing in place.up.log_of(run), "the log does not tell it", 60)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"train": {"steps": 0}}, "steps"),
        ({"train": {"no_such": 1}}, "no_such"),
        ({"no_such": 1}, "no_such"),
    ],
)
def test_parameters_that_cannot_be_are_refused_before_anything_starts(
    place: Place, wrong: dict[str, Any], told: str
) -> None:
    with pytest.raises(urllib.error.HTTPError) as caught:
        place.run(13, **wrong)
    assert caught.value.code in (409, 422)
    assert told in caught.value.read().decode()


def test_without_the_password_one_sentence_tells_what_to_set(place: Place) -> None:
    done = place.up.dpnet("deploy", PREFECT_API_AUTH_STRING="admin:wrong")
    assert done.returncode == 1
    assert "set PREFECT_API_AUTH_STRING to its user:password." in done.stderr
    assert "Traceback" not in done.stderr


def test_a_promotion_is_told(place: Place) -> None:
    event = {
        "occurred": datetime.now(UTC).isoformat(),
        "event": "dpnet.model.promoted",
        "resource": {"prefect.resource.id": "dpnet.model.faults"},
        "payload": {"reason": "It is better by 0.3 dB."},
        "id": str(uuid4()),
    }
    place.up.ask("/events", [event])
    place.wait_for_alert("promotions", "It is better by 0.3 dB.")


def test_a_run_without_progress_is_told(place: Place) -> None:
    place.quicken("tell of stuck runs", 10)  # 30 min as deployed
    run = place.run(14)
    place.wait_for_step(run, 14, 1)
    own = place.up.processes_of(run)
    for pid in own:
        send(pid, signal.SIGSTOP)
    try:
        place.wait_for_alert("stuck runs", place.up.ask(f"/flow_runs/{run}")["name"])
    finally:
        for pid in own:
            send(pid, signal.SIGCONT)
    place.up.set_state(run, type="CANCELLING")
    place.up.wait_for(run, "CANCELLED")


def test_no_secret_is_kept_or_served_anywhere(place: Place) -> None:
    run = place.run(15, "train.steps=10", **ON_RAY)
    process = place.up.flow_process(run)
    given = Path(f"/proc/{process}/environ").read_bytes()
    assert all(secret.encode() in given for secret in (KEY, BLOCK, PASSWORD))
    place.up.wait_for(run, "COMPLETED")
    for secret in (KEY, BLOCK, PASSWORD.partition(":")[2]):
        holders = [
            str(path)
            for path in place.up.root.rglob("*")
            if path.is_file() and secret.encode() in path.read_bytes()
        ]
        assert holders == []
        served = [place.up.log_of(run), json.dumps(place.up.ask("/artifacts/filter", {}))]
        served += [json.dumps(place.up.ask(f"/flow_runs/{run}")), *place.told]
        assert not any(secret in each for each in served)


def test_new_photographs_are_announced_retrained_on_once_and_the_better_model_stays(
    place: Place,
) -> None:
    place.up.deploy(*SETS, f"config={place.config}", "overrides=[train.steps=10]")
    place.up.wait_for(place.up.run("dpnet-pipeline", {}), "COMPLETED")
    photos = place.config.parent / "photos"
    for number in range(20, 26):
        Image.new("RGB", (40, 40), (9 * number, 90, 200 - number)).save(photos / f"{number}.png")

    looked = place.up.run("watch-raw-data", {})
    assert place.up.wait_for(looked, "COMPLETED")["name"] == "Completed"
    of_retrain = {"flows": {"name": {"any_": ["retrain"]}}}
    wait_until(lambda: place.up.ask("/flow_runs/filter", of_retrain), "nothing is retrained")
    (run,) = place.up.ask("/flow_runs/filter", of_retrain)
    assert run["parameters"]["event"]["new"] == 6
    place.up.wait_for(run["id"], "COMPLETED")
    tasks = place.up.tasks(run["id"])
    assert tasks["train"] == tasks["evaluate the champion"] == tasks["register"] == "Completed"
    artifacts = {
        "flow_runs": {"id": {"any_": [run["id"]]}},
        "artifacts": {"key": {"any_": ["retrain"]}},
    }
    (told,) = place.up.ask("/artifacts/filter", artifacts)
    assert "previous champion" in told["data"]
    assert "Its hole PSNR of" in told["data"]

    again = [place.up.run("watch-raw-data", {}), *(place.up.run("retrain", {}) for _ in range(2))]
    assert {place.up.wait_for(each, "COMPLETED")["name"] for each in again} == {"Skipped"}
