"""`dpnet images build` killed at any moment and run again: the same bytes as without a kill."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from image_sets import files_of, table
from PIL import Image

from data_prep.core.manifest import StageRef, load_reference
from data_prep.core.storage.local import LocalStore
from data_prep.core.storage.open import open_store
from dpnet.pipeline.verify import verify

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

PHOTOS = 600
MOMENTS = 20


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make photos, some of them twice or broken, so that every step has work."""
    folder = tmp_path_factory.mktemp("photos")
    random_numbers = np.random.Generator(np.random.Philox(0))
    for number in range(PHOTOS):
        small = random_numbers.integers(0, 256, (12, 12, 3), dtype=np.uint8)
        image = Image.fromarray(small).resize((300, 300), Image.Resampling.BICUBIC)
        image.save(folder / f"{number:03d}.jpg", quality=90)
    for number in range(0, PHOTOS, 50):
        (folder / f"copy {number}.jpg").write_bytes((folder / f"{number:03d}.jpg").read_bytes())
    (folder / "broken.jpg").write_bytes(b"broken")
    (folder / "notes.txt").write_text("notes")
    return folder


def start(photos: Path, root: Path) -> subprocess.Popen[str]:
    settings = ["images.shard_samples=15", "images.workers=2", "images.quality=90"]
    command = [sys.executable, "-m", "dpnet", "images", "build", str(photos), "--name", "killed"]
    command += ["--size", "128", "--root", str(root), "--json"]
    command += [f"--set={setting}" for setting in settings]
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("DPNET_", "AWS_"))}
    return subprocess.Popen(
        command,
        cwd=root.parent,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # its own process group, which is killed as a whole
    )


def finish(process: subprocess.Popen[str]) -> StageRef:
    out, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    result = json.loads(out.splitlines()[-1])
    return load_reference(open_store(result["root"]), result["folder"])


def living(group: int) -> bool:
    """Return whether any process of the group is alive."""
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[2]) == group and fields[0] not in "ZX":
            return True
    return False


def kill_group(process: subprocess.Popen[str]) -> bool:
    """Kill the command and its workers; return whether the command was still running."""
    was_running = process.poll() is None
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.communicate(timeout=20)
    deadline = time.monotonic() + 20
    while living(process.pid):
        assert time.monotonic() < deadline, "processes survived"
        time.sleep(0.01)
    return was_running


@pytest.fixture(scope="module")
def undisturbed(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """Return the folder of a build without interruption, and its seconds."""
    root = tmp_path_factory.mktemp("undisturbed") / "root"
    begun = time.monotonic()
    ref = finish(start(photos, root))
    seconds = time.monotonic() - begun
    assert ref.summary["photographs"] == PHOTOS
    assert ref.summary["duplicates"] == PHOTOS // 50
    assert sum(figures["shards"] for figures in ref.summary["splits"].values()) > 35
    return root / ref.folder, seconds


def hashes(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every shard and index in a version's folder."""
    paths = [p for p in folder.iterdir() if p.name.startswith(("train-", "val-", "test-"))]
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in paths}


def test_a_build_killed_at_any_moment_resumes_to_the_same_shards(
    photos: Path, undisturbed: tuple[Path, float], tmp_path: Path
) -> None:
    expected, seconds = hashes(undisturbed[0]), undisturbed[1]
    whole = LocalStore(undisturbed[0].parents[2])
    own = load_reference(whole, f"images/killed/{undisturbed[0].name}")
    moments = random.Random(0)
    killed = committed = begun = 0
    for number in range(MOMENTS):
        # One moment in each twentieth of the time, so that every phase is hit.
        after = seconds * (number + moments.random()) / MOMENTS
        root = tmp_path / f"root {number}"
        process = start(photos, root)
        time.sleep(after)
        killed += kill_group(process)
        begun += any(root.rglob("*.tar"))
        committed += any(root.rglob("manifest.json"))
        ref = finish(start(photos, root))
        store = LocalStore(root)
        assert hashes(root / ref.folder) == expected, f"killed after {after:.2f} s"
        assert ref.content_digest == own.content_digest
        assert files_of(store, ref) == files_of(whole, own)
        assert table(store, ref, "sources") == table(whole, own, "sources")
        assert verify(store).problems == []
    # Most moments must hit a build that has started and is not finished.
    assert killed >= MOMENTS // 2
    assert begun - committed >= MOMENTS // 5


def test_a_build_killed_several_times_resumes_to_the_same_shards(
    photos: Path, undisturbed: tuple[Path, float], tmp_path: Path
) -> None:
    expected, seconds = hashes(undisturbed[0]), undisturbed[1]
    moments = random.Random(1)
    root = tmp_path / "root"
    done = 0
    for _ in range(5):
        process = start(photos, root)
        time.sleep(seconds * moments.uniform(0.5, 0.7))
        if not kill_group(process):
            break
        if any(root.rglob("manifest.json")):  # committed, although the process has not ended yet
            break
        records = len(list(root.rglob("work/*.parquet")))
        assert records >= done  # finished shards are never lost
        done = records
    ref = finish(start(photos, root))
    assert hashes(root / ref.folder) == expected
    assert verify(LocalStore(root)).problems == []
