"""A full temporary folder is reported as such, and not as a full root."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import Any, BinaryIO

import pytest
from image_sets import crops, photographs
from small_shards import Far, stage_of

from data_prep.core.errors import StorageError
from data_prep.core.storage.local import LocalStore
from data_prep.images.stage import prepare_images
from data_prep.masks.settings import MasksSettings
from data_prep.masks.stage import prepare_masks
from dpnet.cli import main as cli
from dpnet.cli.commands import pipeline
from dpnet.loading.shard_files import ShardFiles, find_shards

FULL = Path("/dev/full")  # every write to it fails like on a full disk
pytestmark = pytest.mark.skipif(not FULL.exists(), reason="needs /dev/full")


@pytest.fixture
def reported(monkeypatch: pytest.MonkeyPatch) -> str:
    """Fill the temporary folder, and return the pattern of the message."""

    def full(**_: Any) -> BinaryIO:
        return FULL.open("w+b")

    folder = tempfile.gettempdir()
    monkeypatch.setattr(tempfile, "NamedTemporaryFile", full)
    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    return (
        f"^cannot use the temporary folder {re.escape(folder)}: no space left on device\\. Free"
        " some space there, or set TMPDIR to another folder, and run the same command again"
    )


def test_a_build_of_images_names_it(tmp_path: Path, reported: str) -> None:
    folder = photographs(tmp_path / "photos")
    with pytest.raises(StorageError, match=reported):
        prepare_images(crops(folder), LocalStore(tmp_path / "root"))


def test_a_table_that_does_not_fit_names_it(
    tmp_path: Path, reported: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = tempfile._TemporaryFileWrapper  # the shards fit, the tables do not
    full = tempfile.NamedTemporaryFile

    def only_tables(prefix: str, **_: Any) -> Any:
        if prefix == "dpnet-table-":
            return full()
        path = tmp_path / prefix
        return real(path.open("w+b"), str(path))

    monkeypatch.setattr(tempfile, "NamedTemporaryFile", only_tables)
    folder = photographs(tmp_path / "photos")
    with pytest.raises(StorageError, match=reported):
        prepare_images(crops(folder), LocalStore(tmp_path / "root"))


def test_a_build_of_masks_names_it(tmp_path: Path, reported: str) -> None:
    settings = MasksSettings(size=32, train=4, eval_per_bin=1)
    with pytest.raises(StorageError, match=reported):
        prepare_masks(settings, LocalStore(tmp_path / "root"))


def test_a_shard_that_training_fetches_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    store = LocalStore(tmp_path)
    ref = stage_of(store, "images", [[bytes(20)]])
    shard = find_shards(store, ref, "train").shards[0]
    reported = request.getfixturevalue("reported")
    with pytest.raises(StorageError, match=reported):
        ShardFiles(Far(store), None).open(shard)


def test_a_full_disk_of_unknown_place_is_not_said_to_be_the_storage(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(args: Any) -> Any:
        with FULL.open("wb") as file:
            file.write(b"x")

    monkeypatch.setattr(pipeline, "stage", full)
    assert cli.main(["train", "demo"]) == 1
    err = capsys.readouterr().err
    assert "cannot use the root or the temporary folder /" in err
    assert ": the disk is full. Free some space" in err
