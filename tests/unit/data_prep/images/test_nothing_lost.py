"""Odd sources: no photo of them is lost, and what is not used has a reason."""

from __future__ import annotations

import io
import tarfile
import zipfile
from pathlib import Path

import pytest
from image_sets import crops, homes, photograph, photographs, picture, reasons

from data_prep.core.errors import PipelineError
from data_prep.core.manifest import StageRef
from data_prep.core.storage.local import LocalStore
from data_prep.core.storage.open import open_store
from data_prep.images.next_version import look
from data_prep.images.stage import prepare_images
from data_prep.pictures.formats import LOOK, looks_like_photo


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "root")


def jpeg(seed: int) -> bytes:
    file = io.BytesIO()
    picture(seed).save(file, "JPEG")
    return file.getvalue()


def build(source: object, store: LocalStore) -> StageRef:
    """Build, and check that every listed item is counted once."""
    ref = prepare_images(crops(source, val=0.2, test=0.2), store)
    kinds = ("photographs", "failed", "ignored", "duplicates")
    assert sum(ref.summary[kind] for kind in kinds) == ref.summary["listed"]
    return ref


def put(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("kind", ["zip", "tar", "tgz"])
def test_all_members_with_one_name_are_stored(tmp_path: Path, store: LocalStore, kind: str) -> None:
    path = tmp_path / f"camera.{kind}"
    names = [f"{number % 8}.JPG" for number in range(32)]
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as packed:
            for seed, name in enumerate(names):
                packed.writestr(name, jpeg(seed))
    else:
        with tarfile.open(path, "w:gz" if kind == "tgz" else "w") as archive:
            for seed, name in enumerate(names):
                put(archive, name, jpeg(seed))
    ref = build(path, store)
    assert ref.summary["photographs"] == 32
    assert {"0.JPG", "0#2.JPG", "0#3.JPG", "0#4.JPG"} < set(homes(store, ref))


def test_members_that_an_earlier_release_lost_are_found_in_the_next_version(
    tmp_path: Path, store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    with tarfile.open(tmp_path / "camera.tar", "w") as archive:
        for seed in range(12):
            put(archive, f"{seed % 6}.jpg", jpeg(seed))
    with monkeypatch.context() as earlier:
        earlier.setattr("data_prep.raw.folders._numbered", "{}#{}.txt".format)
        earlier.setattr("data_prep.images.tables.RULES", 1)
        first = build(tmp_path / "camera.tar", store)
        assert first.summary["ignored"] == 6
    second = build(tmp_path / "camera.tar", store)
    assert (second.summary["photographs"], second.summary["ignored"]) == (12, 0)
    assert build(tmp_path / "camera.tar", store).folder == second.folder


@pytest.mark.parametrize(
    ("names", "held_out"),
    [(("Train.zip", "Test.zip"), "test"), (("TRAIN-0.ZIP", "VAL-0.ZIP"), "val")],
)
def test_archives_named_after_splits_are_splits_in_capitals_too(
    tmp_path: Path, store: LocalStore, names: tuple[str, str], held_out: str
) -> None:
    for at, name in enumerate(names):
        (tmp_path / "in").mkdir(exist_ok=True)
        with zipfile.ZipFile(tmp_path / "in" / name, "w") as archive:
            for seed in range(10 * at, 10 * at + 10):
                archive.writestr(f"{seed}.jpg", jpeg(seed))
    found = homes(store, build(tmp_path / "in", store))
    assert {key for key, split in found.items() if split == held_out} == {
        f"{names[1]}/{seed}.jpg" for seed in range(10, 20)
    }


def test_a_table_in_capitals_is_a_table(tmp_path: Path, store: LocalStore) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = {"image": [jpeg(seed) for seed in range(9)], "id": [f"{n}.x" for n in range(9)]}
    (tmp_path / "in").mkdir()
    pq.write_table(pa.table(rows), tmp_path / "in/T.PARQUET")
    for source in (tmp_path / "in", tmp_path / "in/T.PARQUET"):
        assert build(source, store).summary["photographs"] == 9


def test_a_source_with_splits_that_are_not_clear_is_refused(
    tmp_path: Path, store: LocalStore
) -> None:
    photographs(tmp_path / "in")
    for seed in range(20, 24):
        photograph(tmp_path / f"in/test/{seed}.png", seed)
    with pytest.raises(PipelineError, match=r"look like splits \(test\).*images\.layout=files"):
        build(tmp_path / "in", store)
    with pytest.raises(PipelineError, match="look like splits"):
        look(crops(tmp_path / "in"), store)
    ref = prepare_images(crops(tmp_path / "in", layout="files"), store)
    assert ref.summary["photographs"] == 16


def test_text_in_folders_named_after_splits_is_no_split(tmp_path: Path, store: LocalStore) -> None:
    photographs(tmp_path / "in")
    (tmp_path / "in/test").mkdir()
    (tmp_path / "in/test/notes.txt").write_text("text")
    assert build(tmp_path / "in", store).summary["photographs"] == 12


ODD = ["a.jpg?w=640", "b.jpg_large", "c.mpo", "2021-07-14 12.30.45", "d.png.part", "e.foo"]


def put_all(folder: Path, kind: str, files: dict[str, bytes]) -> Path:
    """Write files into a folder or an archive, and return its path."""
    folder.mkdir()
    if kind == "folder":
        for name, data in files.items():
            (folder / name).write_bytes(data)
        return folder
    path = folder / f"set.{kind}"
    if kind == "zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
            for name, data in files.items():
                packed.writestr(name, data)
    else:
        with tarfile.open(path, "w:gz" if kind == "tgz" else "w") as archive:
            for name, data in files.items():
                put(archive, name, data)
    return path


@pytest.mark.parametrize("kind", ["folder", "zip", "tar", "tgz"])
@pytest.mark.parametrize("whole", [True, False])
def test_names_that_downloaders_make_are_looked_at(
    tmp_path: Path, store: LocalStore, kind: str, whole: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data_prep.images.read_ahead._WHOLE", 1 << 16 if whole else 0)
    files = {f"{seed}.jpg": jpeg(seed) for seed in range(9)}
    files |= {name: jpeg(20 + seed) for seed, name in enumerate(ODD)}
    files |= {"f.bar": b"no image", "empty.baz": b"", "x.json": b"{}", "phone.heic_2": HEIC}
    ref = build(put_all(tmp_path / "in", kind, files), store)
    assert set(ODD) < set(homes(store, ref))
    assert reasons(store, ref) == {
        "f.bar": "not an image: extension .bar, and not the content of one",
        "empty.baz": "not an image: extension .baz, and not the content of one",
        "x.json": "not an image: extension .json",
        "phone.heic_2": "it is not an image, or of an unknown format",
    }
    assert ref.summary["failed"] == 1


HEIC = b"\0\0\0\x18ftypheic" + bytes(200)


def test_broken_pictures_under_odd_names_count_toward_the_limit(
    tmp_path: Path, store: LocalStore
) -> None:
    files = {f"{seed}.jpg": jpeg(seed) for seed in range(9)}
    files |= {f"{seed}.jpg_large": jpeg(seed)[:300] for seed in range(9)}
    with pytest.raises(PipelineError, match=r"image files .* cannot be used"):
        build(put_all(tmp_path / "in", "folder", files), store)


def test_a_source_of_odd_names_only_is_read(tmp_path: Path, store: LocalStore) -> None:
    files = {f"{seed}.jpg?w=640": jpeg(seed) for seed in range(9)} | {"only.jpg": jpeg(20)}
    ref = build(put_all(tmp_path / "in", "folder", files), store)
    assert ref.summary["photographs"] == 10


def test_a_look_is_one_small_request(
    moto_root: str, store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    from data_prep.core.storage.s3 import S3Store

    remote, large = open_store(moto_root), bytes(1 << 20)
    for seed in range(5):
        remote.write(f"{seed}.jpg", jpeg(seed))
    remote.write("a.jpg_large", jpeg(9) + large)
    remote.write("model.foo", large)
    remote.write("film.mp4", large)
    asked: list[tuple[str, int]] = []
    real = S3Store.read_range

    def read_range(self: S3Store, key: str, offset: int, size: int) -> bytes:
        asked.append((key, size))
        return real(self, key, offset, size)

    monkeypatch.setattr(S3Store, "read_range", read_range)
    ref = prepare_images(crops(moto_root, val=0.2, test=0.2), store)
    assert ref.summary["photographs"] == 6
    assert [size for key, size in asked if key == "model.foo"] == [LOOK]
    assert [size == LOOK for key, size in asked if key == "a.jpg_large"] == [True, False]
    assert not any(key == "film.mp4" for key, _ in asked)


@pytest.mark.parametrize("data", [b"\xff\xd8\xff", HEIC[:32], b"8BPS\0\1", b"\xff\x0a"])
def test_first_bytes_of_pictures_are_known(data: bytes) -> None:
    assert looks_like_photo(data)
    assert not looks_like_photo(b"x" + data)


def test_a_webdataset_sample_with_an_odd_name_is_looked_at(
    tmp_path: Path, store: LocalStore
) -> None:
    files: dict[str, bytes] = {}
    for seed in range(9):
        files |= {f"{seed}.jpg": jpeg(seed), f"{seed}.json": b"{}"}
    files |= {"9.jpg_large": jpeg(9), "9.json": b"{}", "x.json": b"{}", "y.HEIC": HEIC}
    ref = build(put_all(tmp_path / "in", "tar", files), store)
    assert "9.jpg_large" in homes(store, ref)
    assert set(reasons(store, ref)) == {"x.json", "y.HEIC"}
