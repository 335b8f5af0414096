"""`dpnet train`, killed at any step and run again, ends with the weights of an undisturbed run."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from servers import Server

from data_prep.core.storage.open import open_store

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.rotated(4)]

STEPS = 24
CONFIG = """
name: killed
images: {{source: {photos}, name: k, size: 32, val: 0.2, test: 0.2, workers: 1}}
masks: {{name: k, size: 32, recipes: {{box-random: 1.0}}, train: 30, eval_per_bin: 2, workers: 1}}
model: {{preset: tiny}}
losses: {{adversarial: 0.01}}
train: {{steps: {steps}, batch_size: 6, learning_rate: 1.0e-3, warmup_steps: 2, adversarial_from: 4,
  checkpoint_every: 3, validate_every: 8, ema_decay: 0.9, workers: {workers}}}
"""


def environment(more: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the user's environment without settings of another Ray or root."""
    hidden = ("PREFECT_", "RAY_", "DPNET_", "AWS_")
    return {k: v for k, v in os.environ.items() if not k.startswith(hidden)} | dict(more or {})


def config(folder: Path, workers: int) -> Path:
    photos = folder / "photos"
    photos.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number in range(40):
        small = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(small).resize((40, 40)).save(photos / f"{number}.png")
    file = folder / "killed.yaml"
    file.write_text(CONFIG.format(photos=photos, steps=STEPS, workers=workers))
    return file


def command(file: Path, root: str) -> list[str]:
    return [sys.executable, "-m", "dpnet", "train", str(file), "--root", root, "--json"]


def trained(file: Path, root: str, env: Mapping[str, str]) -> dict[str, Any]:
    """Run the command and return the train stage from its output."""
    done = subprocess.run(
        command(file, root), env=env, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout.splitlines()[-1])["stages"][-1])


def processes_of(session: int) -> set[int]:
    """Return the running processes of a session."""
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue  # it has ended meanwhile
        if int(fields[3]) == session and fields[0] != "Z":
            found.add(int(folder.name))
    return found


def killed_at(step: int, file: Path, root: str, env: Mapping[str, str]) -> None:
    """Run the command, and kill -9 all its processes after `step`."""
    process = subprocess.Popen(
        command(file, root),
        env=env,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + 300
    while status(root).get("step", 0) < step:
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.05)
    while left := processes_of(process.pid):
        for each in left:
            try:
                os.kill(each, signal.SIGKILL)
            except ProcessLookupError:
                pass
        time.sleep(0.05)
    process.wait()


def status(root: str) -> dict[str, Any]:
    store = open_store(root)
    found = [e.key for e in store.list("runs") if e.key.endswith("/status.json")]
    try:
        return dict(json.loads(store.read(found[0]))) if found else {}
    except (FileNotFoundError, ValueError):
        return {}


def validations(root: str, folder: str) -> list[dict[str, Any]]:
    lines = open_store(root).read(f"{folder}/log.jsonl").splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == "validation"]


@pytest.mark.parametrize("workers", [2, 3])
def test_killed_at_random_steps_it_ends_bit_identical(workers: int, tmp_path: Path) -> None:
    file, env = config(tmp_path, workers), environment()
    whole, broken = str(tmp_path / "whole"), str(tmp_path / "broken")
    undisturbed = trained(file, whole, env)
    for part in ("images", "masks"):
        shutil.copytree(Path(whole, part), Path(broken, part))
    draw = random.Random(workers)
    for step in sorted(draw.sample(range(4, STEPS - 4), 2)):
        killed_at(step, file, broken, env)
    resumed = trained(file, broken, env)
    assert 0 < resumed["summary"]["resumed_from"] < STEPS
    assert undisturbed["summary"]["resumed_from"] == 0
    assert resumed["content_digest"] == undisturbed["content_digest"]
    mine, its = validations(broken, resumed["folder"]), validations(whole, undisturbed["folder"])
    assert [record["step"] for record in mine] == [0, 8, 16, 24]
    assert mine == its


def losses(root: str, folder: str) -> dict[int, dict[str, float]]:
    """Return the losses by the last step of their record."""
    lines = open_store(root).read(f"{folder}/log.jsonl").splitlines()
    return {r["step"]: r["losses"] for r in map(json.loads, lines) if r["kind"] == "train"}


def test_another_number_of_workers_changes_the_next_steps_only_by_rounding(
    tmp_path: Path,
) -> None:
    file, env = config(tmp_path, 2), environment()
    # Small steps: with large ones, a rounding difference can cross a kink of this small network
    # and then grow a thousand times within two steps.
    file.write_text(file.read_text().replace("learning_rate: 1.0e-3", "learning_rate: 1.0e-4"))
    whole, broken = str(tmp_path / "whole"), str(tmp_path / "broken")
    undisturbed = trained(file, whole, env)
    for part in ("images", "masks"):
        shutil.copytree(Path(whole, part), Path(broken, part))
    killed_at(8, file, broken, env)
    # Four workers share six samples unevenly.
    file.write_text(file.read_text().replace("workers: 2", "workers: 4"))
    resumed = trained(file, broken, env)
    start = resumed["summary"]["resumed_from"]
    assert 0 < start < STEPS  # it may have saved once more before it died
    mine, its = losses(broken, resumed["folder"]), losses(whole, undisturbed["folder"])
    assert mine.keys() == its.keys()
    for step in [step for step in its if start < step <= start + 10]:
        assert mine[step] == pytest.approx(its[step], rel=3e-5)


def test_a_killed_training_resumes_with_shards_and_checkpoints_on_s3(
    ceph: Server, tmp_path: Path, s3_root: str
) -> None:
    file, env = config(tmp_path, 2), environment(ceph.environment())
    killed_at(10, file, s3_root, env)
    resumed = trained(file, s3_root, env)
    assert 0 < resumed["summary"]["resumed_from"] < STEPS
    here = trained(file, str(tmp_path / "here"), env)
    assert resumed["content_digest"] == here["content_digest"]
