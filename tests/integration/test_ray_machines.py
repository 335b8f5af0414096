"""The pipeline on a Ray cluster of machines that share only a network and an S3 server.

Machines are network namespaces. One is cut off in the middle of training, and one in the middle of
sharding. The results are the bytes of an undisturbed run on one machine.
"""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from clusters import end_with_parent, family, wait_until
from machines import RAY_PORT, Machine, Network, forwarded, network
from PIL import Image
from servers import Server

from data_prep.core.storage.open import open_store
from data_prep.core.storage.store import Store
from dpnet.tracking.run_log import read_status

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.rotated(2)]

STEPS, EVERY, PHOTOS = 60, 10, 120
WAIT_S = 400.0  # far less on an idle machine
# A machine that does not answer is given up sooner than by default, one that starts later.
PATIENCE = {
    "RAY_raylet_start_wait_time_s": "120",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "4000",
    "RAY_health_check_failure_threshold": "3",
}


# A worker computes with the cores of its machine divided by the workers there, and the number of
# threads changes the last bits. So the two workers of the undisturbed run, which share a machine,
# see twice as many cores.
TWICE = "import os; cores = os.cpu_count(); os.cpu_count = lambda: 2 * cores"


@dataclass
class Setup:
    """The cluster of machines, and the same work done on this machine alone."""

    machines: Network
    server: Server  # as all machines reach it
    folder: Path  # files of the commands
    config: Path
    expected: dict[str, str]  # content digests of the undisturbed run, by stage

    def environment(self) -> dict[str, str]:
        token = self.machines.environment["RAY_AUTH_TOKEN"]
        return {**clean(), **self.server.environment(), "RAY_AUTH_TOKEN": token}

    def machine_of(self, pid: int) -> Machine:
        return next(m for m in self.machines.machines if m.process and pid in family(m.process.pid))


def clean() -> dict[str, str]:
    hidden = ("RAY_", "AWS_", "DPNET_", "PREFECT_", "MLFLOW_")
    return {k: v for k, v in os.environ.items() if not k.startswith(hidden)}


def dpnet(*words: str) -> list[str]:
    return [sys.executable, "-m", "dpnet", *words, "--json"]


def digests(out: str) -> dict[str, str]:
    """Return the content digests of the stages by their names."""
    stages = json.loads(out.splitlines()[-1])["stages"]
    return {each["stage"]: each["content_digest"] for each in stages}


@pytest.fixture(scope="module")
def setup(ceph: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setup]:
    folder = tmp_path_factory.mktemp("machines")
    photos = folder / "photos"
    photos.mkdir()
    random = np.random.default_rng(0)
    for number in range(PHOTOS):
        small = Image.fromarray(random.integers(0, 256, (6, 6, 3), dtype=np.uint8))
        small.resize((300, 280), Image.Resampling.BICUBIC).save(photos / f"{number:03}.png")
    config = {
        "name": "machines",
        "images": {
            "source": str(photos),
            "name": "t",
            "size": 32,
            "val": 0.1,
            "test": 0.2,
            "shard_samples": 4,
        },
        "masks": {"name": "t", "size": 32, "train": 100, "eval_per_bin": 2},
        "model": {"preset": "tiny"},
        "losses": {"adversarial": 0.01},
        "train": {
            "steps": STEPS,
            "batch_size": 4,
            "warmup_steps": 5,
            "checkpoint_every": EVERY,
            "validate_every": STEPS,
            "validation_pairs": 4,
            "workers": 2,
        },
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "twice").mkdir()
    (folder / "twice/sitecustomize.py").write_text(TWICE)
    paths = [str(folder / "twice"), os.environ.get("PYTHONPATH", "")]
    undisturbed = subprocess.run(
        dpnet("train", str(folder / "config.yaml"), "--root", str(folder / "undisturbed")),
        env={**clean(), "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        capture_output=True,
        text=True,
    )
    assert undisturbed.returncode == 0, undisturbed.stderr
    with ExitStack() as stack:
        hidden = Path(tempfile.mkdtemp(prefix="dpm", dir="/tmp"))
        token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        machines = stack.enter_context(network(hidden, {**clean(), **token, **PATIENCE}))
        port = int(ceph.endpoint.rpartition(":")[2])
        reached = stack.enter_context(forwarded(machines.here, port))
        server = Server(f"http://{machines.here}:{reached}", ceph.access_key, ceph.secret_key)
        machines.environment |= server.environment()
        machines.start_ray(0)
        for _ in range(2):
            machines.start_ray(1)
        expected = digests(undisturbed.stdout)
        yield Setup(machines, server, folder, folder / "config.yaml", expected)


@pytest.fixture
def store(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> Store:
    """Return an empty prefix on the S3 server."""
    setup.server.use(monkeypatch)
    return open_store(Server.fresh_root())


def wait(process: subprocess.Popen[str], log: Path, true: Any, what: str) -> None:
    """Wait until something is true while a command runs."""

    def reached() -> bool:
        assert process.poll() is None, log.read_text()
        return bool(true())

    wait_until(reached, f"{what}: {log}", WAIT_S)


def test_a_pipeline_survives_a_machine_that_is_cut_off_in_training(
    setup: Setup, store: Store
) -> None:
    words = ["pipeline", "run", str(setup.config), "--root", store.uri]
    words += ["--launcher", "ray-job", "--address", setup.machines.dashboard]
    words += ["--set", f"launch.python={sys.executable}"]
    words += ["--set", f"register.tracking_uri=sqlite:///{setup.folder}/mlflow.db"]
    log = setup.folder / "pipeline.log"
    with log.open("w") as err:
        process = subprocess.Popen(
            dpnet(*words),
            env=setup.environment(),
            stdout=subprocess.PIPE,
            stderr=err,
            text=True,
            preexec_fn=end_with_parent,
        )

    def run() -> str:
        keys = [entry.key for entry in store.list("runs") if entry.key.endswith("/checkpoint.json")]
        return "/".join(keys[-1].split("/")[:2]) if len(keys) > 1 else ""

    try:
        wait(process, log, run, "no second checkpoint")
        workers = read_status(store, run())["workers"]
        places = [setup.machine_of(worker["pid"]) for worker in workers]
        assert len({place.name for place in places}) == 2
        places[1].cut()
        wait(process, log, lambda: "workers died" in log.read_text(), "the cut is not noticed")
        setup.machines.start_ray(1)
        out, _ = process.communicate(timeout=WAIT_S)
    finally:
        process.kill()
    assert process.returncode == 0, log.read_text()
    made = digests(out)
    assert {stage: made[stage] for stage in setup.expected} == setup.expected
    summary = next(s for s in json.loads(out.splitlines()[-1])["stages"] if s["stage"] == "train")
    assert 2 * EVERY <= summary["summary"]["resumed_from"] < STEPS


def test_sharding_survives_a_machine_that_is_cut_off(setup: Setup, store: Store) -> None:
    photos = store.uri + "-photos"
    place = open_store(photos)
    for photo in sorted((setup.folder / "photos").iterdir()):
        place.write(photo.name, photo.read_bytes())
    head = setup.machines.machines[0]
    words = ["images", "build", str(setup.config), "--set", f"images.source={photos}"]
    words += ["--root", store.uri, "--ray", f"{head.address}:{RAY_PORT}"]
    log = setup.folder / "images.log"
    with log.open("w") as err:
        process = subprocess.Popen(
            setup.machines.command_on(head, dpnet(*words)),
            env=setup.environment(),
            stdout=subprocess.PIPE,
            stderr=err,
            text=True,
            preexec_fn=end_with_parent,
        )
    try:
        wait(process, log, lambda: done(store) >= 2, "no shard")
        before = done(store)
        at_work = [m for m in setup.machines.machines[1:] if m.process and busy(m)]
        at_work[0].cut()
        out, _ = process.communicate(timeout=WAIT_S)
    finally:
        process.kill()
    assert process.returncode == 0, log.read_text()
    assert before < PHOTOS // 4, "the machine was cut off too late"
    assert json.loads(out.splitlines()[-1])["content_digest"] == setup.expected["images"]


def done(store: Store) -> int:
    """Return the number of finished shards."""
    return sum(entry.key.endswith(".tar") for entry in store.list("images"))


def busy(machine: Machine) -> bool:
    """Return whether a task of Ray runs on a machine."""
    assert machine.process
    names = [Path(f"/proc/{pid}/cmdline") for pid in family(machine.process.pid)]
    return any(b"ray::_call" in path.read_bytes() for path in names if path.exists())
