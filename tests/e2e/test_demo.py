"""The demo of a newcomer: it is killed and run again, and its model is used."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset as wds
from PIL import Image
from skimage import data

import dpnet

pytestmark = pytest.mark.e2e

SETTINGS = ("train.steps=60", "train.checkpoint_every=10", "train.validate_every=30")
STAGES = ["images", "masks", "train", "evaluate", "register"]


def command(*argv: str) -> list[str]:
    return [sys.executable, "-m", "dpnet", *argv]


def environment() -> dict[str, str]:
    """Return the user's environment without settings of Prefect, Ray and dpnet."""
    return {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "RAY_", "DPNET_"))}


def run(*argv: str, cwd: Path) -> dict[str, Any]:
    """Run a command with --json that must succeed, and return its object."""
    done = subprocess.run(
        command(*argv, "--json"),
        cwd=cwd,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return dict(json.loads(done.stdout.splitlines()[-1]))


def demo(cwd: Path, *more: str) -> dict[str, Any]:
    return run("demo", *(f"--set={setting}" for setting in SETTINGS), *more, cwd=cwd)


def processes_of(session: int) -> set[int]:
    """Return the running processes of a session."""
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue  # it has ended in the meantime
        if int(fields[3]) == session and fields[0] != "Z":
            found.add(int(folder.name))
    return found


def kill_tree(session: int) -> None:
    """Send SIGKILL to every process of a session until none is left."""
    while left := processes_of(session):
        for process in left:
            try:
                os.kill(process, signal.SIGKILL)
            except ProcessLookupError:
                pass
        time.sleep(0.1)


def checkpoints(cwd: Path) -> list[Path]:
    """Return the complete checkpoints; the newest may be incomplete."""
    return sorted(cwd.glob("dpnet-demo/runs/demo-*/step-*/"))[:-1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Kill a demo during training, after a complete checkpoint, and return its folder."""
    cwd = tmp_path_factory.mktemp("newcomer")
    argv = command("demo", *(f"--set={setting}" for setting in SETTINGS))
    process = subprocess.Popen(argv, cwd=cwd, env=environment(), start_new_session=True)
    deadline = time.monotonic() + 600
    while not checkpoints(cwd) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.2)
    assert process.poll() is None, "it ended before it could be killed"
    kill_tree(process.pid)
    assert process.wait() == -signal.SIGKILL
    assert checkpoints(cwd)
    return cwd


@pytest.fixture(scope="module")
def resumed(folder: Path) -> dict[str, Any]:
    return demo(folder)


def test_after_a_kill_the_same_command_resumes_from_the_last_checkpoint(
    resumed: dict[str, Any],
) -> None:
    stages = {stage["stage"]: stage for stage in resumed["stages"]}
    assert [name for name in STAGES if stages[name]["skipped"]] == ["images", "masks"]
    assert stages["train"]["summary"]["steps"] == 60
    assert 10 <= stages["train"]["summary"]["resumed_from"] < 60
    assert resumed["registered"]["alias"] == "champion"


def written(folder: Path) -> dict[Path, int]:
    """Return the times of the last write to every file of the stages."""
    tops = ("images", "masks", "runs", "evaluations", "registry")
    files = (path for top in tops for path in (folder / "dpnet-demo" / top).rglob("*"))
    return {path: path.stat().st_mtime_ns for path in files if path.is_file()}


def test_the_third_time_every_stage_is_skipped_and_nothing_is_written(
    folder: Path, resumed: dict[str, Any]
) -> None:
    before = written(folder)
    again = demo(folder)
    assert before
    assert written(folder) == before
    assert all(stage["skipped"] for stage in again["stages"])
    assert again["mean_over_bins"] == resumed["mean_over_bins"]


def test_the_shards_are_read_by_webdataset(folder: Path, resumed: dict[str, Any]) -> None:
    tars = sorted(str(path) for path in folder.glob("dpnet-demo/images/*/*/train-*.tar"))
    sample = next(iter(wds.WebDataset(tars, shardshuffle=False)))
    assert {"__key__", "png", "json"} <= set(sample)


def test_verify_finds_only_the_altered_file(
    folder: Path, resumed: dict[str, Any], tmp_path: Path
) -> None:
    assert run("verify", "dpnet-demo", cwd=folder)["problems"] == []
    shutil.copytree(folder / "dpnet-demo", tmp_path / "copy")
    shard = next((tmp_path / "copy").glob("images/*/*/train-000000.tar"))
    content = bytearray(shard.read_bytes())
    content[1000] ^= 1
    shard.write_bytes(content)
    done = subprocess.run(command("verify", str(tmp_path / "copy")), capture_output=True, text=True)
    assert done.returncode == 1
    assert "train-000000.tar: was altered" in done.stdout


def test_the_champion_fills_a_photo_of_any_size(
    folder: Path, resumed: dict[str, Any], tmp_path: Path
) -> None:
    photo = data.chelsea()[:211, :301]
    mask = np.zeros(photo.shape[:2], np.uint8)
    mask[40:90, 100:180] = 255
    Image.fromarray(photo).save(tmp_path / "photo.png")
    Image.fromarray(mask).save(tmp_path / "mask.png")
    names = [str(tmp_path / name) for name in ("photo.png", "mask.png")]
    run("inpaint", *names, "-o", str(tmp_path / "out.png"), "--root", "dpnet-demo", cwd=folder)
    filled = np.asarray(Image.open(tmp_path / "out.png"))
    assert filled.shape == photo.shape
    assert (filled[mask == 0] == photo[mask == 0]).all()
    hole = mask == 255
    own = dpnet.inpaint(photo, mask, root=str(folder / "dpnet-demo"))
    assert (filled == own).all()
    # Black, white or noise are wrong by 60 levels and more, one colour by 20.
    assert np.abs(filled[hole].astype(float) - photo[hole]).mean() < 35


def test_ctrl_c_ends_the_demo_with_one_sentence_and_leaves_no_process(tmp_path: Path) -> None:
    with subprocess.Popen(
        command("demo"),
        cwd=tmp_path,
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "prepare images: done" in line:
                break
        os.killpg(process.pid, signal.SIGINT)  # like a terminal
        rest = process.stderr.read()
    assert process.returncode == 130, rest
    assert rest.splitlines()[-1] == "dpnet: stopped; the same command resumes."
    assert "Traceback" not in rest
    deadline = time.monotonic() + 10
    while processes_of(process.pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert processes_of(process.pid) == set()


def test_fresh_starts_over(folder: Path, resumed: dict[str, Any]) -> None:
    small = ("masks.train=200", "masks.eval_per_bin=4", "train.steps=4", "train.checkpoint_every=4")
    again = demo(folder, "--fresh", *(f"--set={setting}" for setting in small))
    assert not any(stage["skipped"] for stage in again["stages"])
    assert again["registered"]["version"] == 1
