"""Large datasets: how much of their manifests and old tars is in memory at a time."""

from __future__ import annotations

import io
import logging
from pathlib import Path
from typing import BinaryIO, cast

import pytest
from image_sets import crops, photograph, photographs

from data_prep.core.errors import PipelineError
from data_prep.core.manifest import StageRef, read_manifest
from data_prep.core.paths import MANIFEST
from data_prep.core.storage.local import LocalStore
from data_prep.images.next_version import look
from data_prep.images.settings import ImagesSettings
from data_prep.images.stage import prepare_images
from data_prep.images.versions import versions
from data_prep.inspection.find_set import find_set
from dpnet.pipeline.root_metrics import RootReader

PART = 2 << 10  # so that manifests of some shards are large


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LocalStore:
    monkeypatch.setattr("data_prep.core.manifest._PART", PART)
    return LocalStore(tmp_path / "root")


@pytest.fixture
def built(tmp_path: Path, store: LocalStore) -> tuple[ImagesSettings, list[StageRef]]:
    """Make three versions with many shards."""
    settings = crops(photographs(tmp_path / "photos", 40), shard_samples=1)
    refs = []
    for number in range(3):
        photograph(tmp_path / f"photos/new/{number}.png", 100 + number)
        refs.append(prepare_images(settings, store))
    for ref in refs:
        assert len(store.read(f"{ref.folder}/{MANIFEST}")) > 4 * PART
    return settings, refs


def test_a_look_reads_only_the_newest_manifest_whole(
    built: tuple[ImagesSettings, list[StageRef]],
    store: LocalStore,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings, refs = built
    whole: list[str] = []
    real = LocalStore.read

    def read(self: LocalStore, key: str) -> bytes:
        whole.append(key)
        return real(self, key)

    monkeypatch.setattr(LocalStore, "read", read)
    assert look(settings, store).new == 0
    newest = f"{refs[-1].folder}/{MANIFEST}"
    assert [key for key in whole if key.endswith(MANIFEST)] == [newest]
    whole.clear()
    assert [head.folder for head in versions(store, settings.name)] == [r.folder for r in refs]
    assert prepare_images(settings, store).skipped
    assert [key for key in whole if key.endswith(MANIFEST)] == [newest]
    whole.clear()
    assert find_set("images", settings.name, str(store.folder))[1] == refs[-1].folder
    RootReader(store).read(0.0)
    assert not [key for key in whole if key.endswith(MANIFEST)]


def spoil_files(store: LocalStore, ref: StageRef) -> None:
    """Damage the list of files of a manifest, but not its start and end."""
    key = f"{ref.folder}/{MANIFEST}"
    data = bytearray(store.read(key))
    data[len(data) // 2] = 0  # JSON holds no such byte
    store.write(key, bytes(data))
    with pytest.raises(PipelineError):
        read_manifest(store, ref.folder)


def test_a_version_is_not_built_on_a_manifest_with_a_damaged_list_of_files(
    built: tuple[ImagesSettings, list[StageRef]],
    store: LocalStore,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    settings, refs = built
    spoil_files(store, refs[2])
    photograph(tmp_path / "photos/new/9.png", 900)
    with caplog.at_level(logging.WARNING):
        made = prepare_images(settings, store)
    assert f"{refs[2].folder} is damaged" in caplog.text
    manifest = read_manifest(store, made.folder)
    assert manifest.inputs["parent"].folder == refs[1].folder
    assert manifest.summary["version"] == 4
    for ref in (*refs[:2], made):
        spoil_files(store, ref)
    with pytest.raises(PipelineError, match=r"no version of .* can be read"):
        prepare_images(settings, store)


def test_in_mode_keep_no_old_tar_is_held_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = LocalStore(tmp_path / "root")
    folder = photographs(tmp_path / "photos", 24)
    settings = crops(folder, mode="keep", val=0.2, test=0.2)
    first = prepare_images(settings, store)
    largest = max(path.stat().st_size for path in folder.rglob("*.png"))
    sizes: list[int] = []
    real = LocalStore.open

    def counted(self: LocalStore, key: str) -> BinaryIO:
        file = real(self, key)
        if not key.endswith(".tar"):
            return file

        class Counted(io.BufferedReader):
            def read(self, size: int | None = -1, /) -> bytes:
                sizes.append(len(data := super().read(size)))
                return data

        return cast(BinaryIO, Counted(cast(io.RawIOBase, file)))

    (folder / "trip 0/0.png").unlink()
    photograph(folder / "trip 1/1.png", 901)
    monkeypatch.setattr(LocalStore, "open", counted)
    second = prepare_images(settings, store)
    assert (second.summary["removed"], second.summary["changed"]) == (1, 1)
    tars = [f for f in read_manifest(store, first.folder).files if f.path.endswith(".tar")]
    assert sum(sizes) > largest  # the old tars were read
    assert max(sizes) <= largest < max(file.size for file in tars) / 4
