"""From new photos to a retrained model, with a real Prefect server, real Ray and real MLflow.

A small pipeline makes version 1 and a champion. Then new photos arrive.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from image_sets import photograph

from data_prep.core.manifest import read_manifest
from data_prep.core.storage.local import LocalStore
from dpnet.model_store.records import find_record
from dpnet.pipeline.verify import verify

pytestmark = [pytest.mark.integration, pytest.mark.slow]

SETS = [
    "images.tile=32", "images.size=32", "images.max_tiles=8", "masks.size=32", "masks.train=32",
    "masks.eval_per_bin=2", "train.steps=4", "train.batch_size=4", "train.warmup_steps=1",
    "train.validate_every=2", "train.validation_pairs=6", "train.checkpoint_every=2",
    "train.workers=1", "evaluate.pictures=1",
    "register.promote=always",  # four steps need not pass the gate
]  # fmt: skip
FLOW = """
import json, sys
from flows import new_data
state = getattr(new_data, sys.argv[1])(**json.loads(sys.argv[2]), return_state=True)
found = {"name": state.name, "message": state.message, "result": state.result(False)}
print(json.dumps(found, default=str))
"""


@dataclass(frozen=True)
class Setup:
    """A root with its photos, and the server that runs its flows."""

    photos: Path
    root: Path
    api: str
    home: Path

    @property
    def store(self) -> LocalStore:
        return LocalStore(self.root)

    @property
    def sets(self) -> list[str]:
        return [f"images.source={self.photos}", *SETS]

    def start(self, *argv: str) -> subprocess.Popen[str]:
        clean = ("PREFECT_", "RAY_", "DPNET_")
        env = {k: v for k, v in os.environ.items() if not k.startswith(clean)}
        env |= {"PREFECT_API_URL": self.api, "PREFECT_HOME": str(self.home)}
        return subprocess.Popen(
            [sys.executable, *argv],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def start_flow(self, name: str, **parameters: Any) -> subprocess.Popen[str]:
        values = {"config": "demo", "root": str(self.root), "overrides": self.sets, **parameters}
        return self.start("-c", FLOW, name, json.dumps(values))

    def dpnet(self, *words: str) -> dict[str, Any]:
        sets = [word for each in self.sets for word in ("--set", each)]
        at = ["--root", str(self.root), *sets, "--json"]
        return finish(self.start("-m", "dpnet", *words, "demo", *at))

    def post(self, path: str, body: Any) -> Any:
        request = urllib.request.Request(
            f"{self.api}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)

    def events(self, name: str, count: int) -> list[dict[str, Any]]:
        """Wait until there are `count` events of a name: the server stores them in batches."""
        deadline = time.monotonic() + 60
        while True:
            page = self.post("/events/filter", {"filter": {"event": {"name": [name]}}})
            if len(page["events"]) >= count or time.monotonic() > deadline:
                return list(page["events"])
            time.sleep(0.5)


def finish(process: subprocess.Popen[str]) -> dict[str, Any]:
    out, err = process.communicate(timeout=500)
    assert process.returncode == 0, err
    return dict(json.loads(out.splitlines()[-1]))


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """Run a full Prefect server, with the services that store events."""
    home = tmp_path_factory.mktemp("prefect")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    env = {k: v for k, v in os.environ.items() if not k.startswith("PREFECT_")}
    env |= {"PREFECT_HOME": str(home), "PREFECT_SERVER_ANALYTICS_ENABLED": "false"}
    url = f"http://127.0.0.1:{port}/api"
    command = ["-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    with (home / "server.log").open("wb") as log:
        server = subprocess.Popen([sys.executable, *command], env=env, stdout=log, stderr=log)
        try:
            wait_until_healthy(url, server, home / "server.log")
            yield url, home
        finally:
            server.terminate()
            server.wait(30)


def wait_until_healthy(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 180
    while server.poll() is None and time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=10):
                return
        except OSError:
            time.sleep(0.3)
    pytest.fail(f"Prefect's server did not start: {log.read_text()[-2000:]}")


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory, api: tuple[str, Path]) -> Setup:
    folder = tmp_path_factory.mktemp("new-data")
    for number in range(5):
        photograph(folder / "photos" / f"m{number}.png", number, 96, 96)
    made = Setup(folder / "photos", folder / "root", *api)
    assert made.dpnet("pipeline", "run")["registered"]["version"] == 1
    return made


def test_new_photos_start_one_retrain_and_the_better_model_is_champion(setup: Setup) -> None:
    """Run all parts in one test: each part needs the results of the part before it."""
    seen = finish(setup.start_flow("watch_raw_data"))
    assert (seen["name"], seen["result"]["reason"]) == ("Skipped", "Nothing is new.")
    nothing = finish(setup.start_flow("retrain"))
    assert nothing["name"] == "Skipped"
    assert "version 1, was trained on exactly these images" in nothing["message"]

    for number in range(3):
        photograph(setup.photos / f"new{number}.png", 100 + number, 96, 96)
    announced = setup.dpnet("notify")
    assert (announced["announced"], announced["new"], announced["version"]) == (True, 3, 1)
    again = finish(setup.start_flow("watch_raw_data"))
    assert again["result"]["reason"] == "It was announced before."
    (event,) = setup.events("dpnet.raw-data.changed", 1)
    assert event["payload"]["digest"] == announced["digest"]

    champion = find_record(setup.store)
    both = [setup.start_flow("retrain", event=event["payload"]) for _ in range(2)]
    done = sorted((finish(process) for process in both), key=lambda state: state["name"])
    assert [state["name"] for state in done] == ["Completed", "Skipped"]
    summary = done[0]["result"]
    assert summary["images"]["version"] == 2
    assert summary["images"]["added"] == 3
    assert summary["started_from"] == 1

    folder = summary["folder"]
    made = json.loads(setup.store.read(f"{folder}/retrain.json"))["made"]
    run = read_manifest(setup.store, made["run"])
    assert run.inputs["init"].folder == champion["run"]["folder"]
    runs = [e.key for e in setup.store.list("runs") if e.key.endswith("/manifest.json")]
    assert len(runs) == 2
    new, old = (
        read_manifest(setup.store, made[role]).summary for role in ("evaluation", "against")
    )
    assert new["pairs_digest"] == old["pairs_digest"] != champion["pairs_digest"]
    assert summary["promoted"]
    assert summary["reason"] == "register.promote is always."
    assert find_record(setup.store)["version"] == 2
    promoted = [each["payload"]["version"] for each in setup.events("dpnet.model.promoted", 2)]
    assert sorted(promoted) == [1, 2]  # the pipeline's model, and then this one
    artifact = {"artifacts": {"key": {"any_": ["retrain"]}}}
    assert summary["reason"] in setup.post("/artifacts/filter", artifact)[0]["data"]

    third = finish(setup.start_flow("retrain"))
    assert third["name"] == "Skipped"
    assert third["result"]["folder"] == folder
    assert len([e for e in setup.store.list("runs") if e.key.endswith("/manifest.json")]) == 2
    assert verify(setup.store).problems == []
