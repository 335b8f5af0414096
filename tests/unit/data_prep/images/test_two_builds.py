"""Two builds of one dataset at once: one version, or two with different numbers."""

from __future__ import annotations

import multiprocessing
import threading
import time
from collections.abc import Callable, Generator, Iterable
from pathlib import Path
from typing import Any

import pytest
from image_sets import crops, photograph, photographs

from data_prep.core.manifest import StageRef, read_manifest
from data_prep.core.pool import run_tasks
from data_prep.core.storage.local import LocalStore
from data_prep.core.storage.open import open_store
from data_prep.images.stage import prepare_images
from data_prep.images.versions import versions


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return photographs(tmp_path / "photos", 12)


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "root")


def two_at_once(
    folder: Path, store: LocalStore, caplog: pytest.LogCaptureFixture, meanwhile: Callable[[], None]
) -> tuple[StageRef, StageRef]:
    """Start a build while another one is preparing photos, and return the results of both.

    Args:
        folder: the photos.
        store: the root.
        caplog: the log, which says when the second build waits.
        meanwhile: called before the second build starts.
    """
    second: list[StageRef] = []
    other = threading.Thread(target=lambda: second.append(prepare_images(crops(folder), store)))

    def run(function: Any, tasks: Iterable[Any], workers: int) -> Generator[Any, None, None]:
        if function.__name__ == "build_shard" and other.ident is None:
            meanwhile()
            other.start()
            deadline = time.monotonic() + 60
            while "another runner" not in caplog.text and other.is_alive():
                assert time.monotonic() < deadline
                time.sleep(0.01)
        yield from run_tasks(function, tasks, workers)

    first = prepare_images(crops(folder), store, run)
    other.join(60)
    return first, second[0]


def test_with_other_photos_the_second_build_makes_the_following_version(
    folder: Path, store: LocalStore, caplog: pytest.LogCaptureFixture
) -> None:
    prepare_images(crops(folder), store)
    photograph(folder / "a.png", 100)
    first, second = two_at_once(
        folder, store, caplog, lambda: photograph(folder / "b.png", 101) and None
    )
    assert (first.summary["version"], second.summary["version"]) == (2, 3)
    assert second.summary["added"] == 1  # to the first one's photos
    assert read_manifest(store, second.folder).inputs["parent"].folder == first.folder


def test_with_the_same_photos_there_is_one_version(
    folder: Path, store: LocalStore, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = two_at_once(folder, store, caplog, lambda: None)
    assert (first.skipped, second.skipped) == (False, True)
    assert first.folder == second.folder
    assert [manifest.folder for manifest in versions(store, crops(folder).name)] == [first.folder]


def build_often(root: str, folder: Path, number: int) -> None:
    for repeat in range(2):
        photograph(folder / f"{number} {repeat}.png", 100 + 10 * number + repeat)
        prepare_images(crops(folder), open_store(root))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["folder", "s3"])
def test_processes_that_build_one_dataset_make_no_version_twice(
    folder: Path, tmp_path: Path, kind: str, request: pytest.FixtureRequest
) -> None:
    root = str(tmp_path / "root") if kind == "folder" else request.getfixturevalue("s3_root")
    context = multiprocessing.get_context("spawn")
    builders = [context.Process(target=build_often, args=(root, folder, n)) for n in range(3)]
    for builder in builders:
        builder.start()
    for builder in builders:
        builder.join(120)
    assert [builder.exitcode for builder in builders] == [0, 0, 0]
    store = open_store(root)
    made = versions(store, crops(folder).name)
    numbers = sorted(manifest.summary["version"] for manifest in made)
    assert numbers == list(range(1, len(made) + 1))
    newest = max(made, key=lambda manifest: int(manifest.summary["version"]))
    assert newest.summary["photographs"] == 12 + 6
