"""Shards: deterministic tars, indexes with offsets into them, and lists of shards."""

from __future__ import annotations

import io
import shutil
import subprocess
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO, cast

import pytest

from data_prep.core.digest import sha256_bytes
from data_prep.core.errors import PipelineError
from data_prep.core.storage.local import LocalStore
from data_prep.shards.shards import (
    Folder,
    TarWriter,
    decode_table,
    encode_table,
    finished_shard,
    iterate_shard,
    read_index,
    split_shards,
    write_shard,
    write_urls,
)

SAMPLES = [
    ("b_1", {"png": b"first picture", "json": b'{"a":1}'}),
    ("a-2", {"png": b"", "json": b"{}"}),
    ("c", {"png": bytes(1024), "json": b'{"long":"' + b"x" * 600 + b'"}'}),
]
ROWED = [(key, files, {"width": 4, "bin": "0.1"}) for key, files in SAMPLES]


@pytest.fixture
def place(tmp_path: Path) -> Folder:
    return Folder(LocalStore(tmp_path), "images/x/0123")


def tar_of(samples: Iterable[tuple[str, dict[str, bytes]]]) -> tuple[bytes, list[int]]:
    """Return the bytes of a tar and the offset of the first file of each sample."""
    file = io.BytesIO()
    tar = TarWriter(file)
    offsets = [tar.add(key, files) for key, files in samples]
    assert tar.close() == sha256_bytes(file.getvalue())
    assert tar.size == len(file.getvalue())
    return file.getvalue(), offsets


def test_the_same_samples_give_the_same_tar_without_time_or_owner() -> None:
    tar, _ = tar_of(SAMPLES)
    assert tar_of(iter(SAMPLES))[0] == tar
    with tarfile.open(fileobj=io.BytesIO(tar)) as file:
        infos = file.getmembers()
    assert {(info.mtime, info.uid, info.gid, info.uname, info.mode) for info in infos} == {
        (0, 0, 0, "", 0o644)
    }
    assert [info.name for info in infos][:3] == ["b_1.png", "b_1.json", "a-2.png"]


def test_offsets_point_at_the_payloads_in_the_tar() -> None:
    tar, offsets = tar_of(SAMPLES)
    payloads = [next(iter(files.values())) for _, files in SAMPLES]
    assert [
        tar[at : at + len(data)] for at, data in zip(offsets, payloads, strict=True)
    ] == payloads


@pytest.mark.parametrize("key", ["a.b", "a/b", "../a", "", "a b", "ä", "x" * 81])
def test_a_key_that_a_reader_would_misread_is_refused(key: str) -> None:
    with pytest.raises(AssertionError):
        tar_of([(key, {"png": b""})])


def test_the_tar_program_lists_and_extracts_a_shard(place: Folder, tmp_path: Path) -> None:
    if shutil.which("tar") is None:
        pytest.skip("no tar program")
    write_shard(place, "train-000000", ROWED)
    tar = tmp_path / place.key("train-000000.tar")
    done = subprocess.run(["tar", "tf", tar], check=True, capture_output=True, text=True)
    names = [f"{key}.{extension}" for key, files in SAMPLES for extension in files]
    assert done.stdout.split() == names
    assert not done.stderr
    subprocess.run(["tar", "xf", tar, "-C", tmp_path], check=True)
    assert (tmp_path / "b_1.png").read_bytes() == b"first picture"


def test_webdataset_reads_a_shard(place: Folder, tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    write_shard(place, "train-000000", ROWED)
    urls = [str(tmp_path / place.key("train-000000.tar"))]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == [key for key, _ in SAMPLES]
    assert samples[0]["png"] == b"first picture"
    assert samples[0]["json"] == b'{"a":1}'


def test_with_the_index_any_sample_is_one_range_read(place: Folder) -> None:
    write_shard(place, "train-000000", ROWED)
    tar = place.key("train-000000.tar")
    rows = read_index(place.store, tar)
    assert [row["key"] for row in rows] == ["b_1", "a-2", "c"]
    assert rows[0]["width"] == 4
    assert rows[0]["bin"] == "0.1"
    for row, (_, files) in zip(rows, SAMPLES, strict=True):
        data = place.store.read_range(tar, row["offset"], row["size"])
        assert data == files["png"]
        assert sha256_bytes(data) == row["sha256"]


def test_iterating_gives_the_samples_in_order(place: Folder) -> None:
    write_shard(place, "train-000000", ROWED)
    assert list(iterate_shard(place.store, place.key("train-000000.tar"))) == SAMPLES


class CountingFile(io.RawIOBase):
    """A file that records the size of each read."""

    def __init__(self, file: BinaryIO, sizes: list[int]) -> None:
        self._file, self._sizes = file, sizes

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def read(self, size: int = -1, /) -> bytes:
        data = self._file.read(size)
        self._sizes.append(len(data))
        return data

    def close(self) -> None:
        self._file.close()
        super().close()


class CountingStore(LocalStore):
    """A folder store that records the size of each read."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.sizes: list[int] = []

    def open(self, key: str) -> BinaryIO:
        return cast(BinaryIO, CountingFile(super().open(key), self.sizes))


def test_iterating_a_shard_holds_one_sample_in_memory_not_the_whole_tar(tmp_path: Path) -> None:
    store = CountingStore(tmp_path)
    place, largest = Folder(store, "images/x/0123"), 50_000
    samples = [(f"s{n}", {"png": bytes(largest), "json": b"{}"}, {}) for n in range(40)]
    write_shard(place, "train-000000", samples)
    store.sizes.clear()
    iterated = iterate_shard(store, place.key("train-000000.tar"))
    assert next(iterated) == samples[0][:2]
    assert sum(store.sizes) < 3 * largest  # the tar is read while it is iterated
    assert [key for key, _ in iterated] == [key for key, _, _ in samples[1:]]
    assert max(store.sizes) == largest


def test_the_index_which_marks_a_finished_shard_is_written_last(
    place: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[str] = []
    for name in ("write", "upload"):
        real = getattr(LocalStore, name)

        def record(self: LocalStore, key: str, *rest: Any, real: Any = real) -> Any:
            written.append(key.rpartition("/")[2])
            return real(self, key, *rest)

        monkeypatch.setattr(LocalStore, name, record)
    write_shard(place, "train-000000", ROWED)
    assert written == ["train-000000.tar", "train-000000.parquet"]


def test_two_samples_of_one_key_are_refused(place: Folder) -> None:
    with pytest.raises(AssertionError, match="two samples have the key b_1"):
        write_shard(place, "train-000000", [ROWED[0]] * 2)


def test_a_finished_shard_is_recognised_with_the_same_records(place: Folder) -> None:
    records = write_shard(place, "train-000000", ROWED)
    assert finished_shard(place, "train-000000") == records
    assert [record.path for record in records] == ["train-000000.tar", "train-000000.parquet"]


def test_the_record_of_a_tar_has_its_number_of_samples(place: Folder) -> None:
    tar, index = write_shard(place, "train-000000", ROWED)
    assert (tar.samples, index.samples) == (3, None)
    found = finished_shard(place, "train-000000")
    assert found is not None
    assert [record.samples for record in found] == [3, None]


@pytest.mark.parametrize("harm", ["no tar", "no index", "altered tar", "cut index"])
def test_an_incomplete_shard_is_not_reused(place: Folder, harm: str) -> None:
    write_shard(place, "train-000000", ROWED)
    tar, index = place.key("train-000000.tar"), place.key("train-000000.parquet")
    if harm == "no tar":
        place.store.delete(tar)
    elif harm == "no index":
        place.store.delete(index)
    elif harm == "altered tar":
        place.store.write(tar, place.store.read(tar)[:-1] + b"x")
    else:
        place.store.write(index, place.store.read(index)[:-20])
    assert finished_shard(place, "train-000000") is None


def test_the_list_of_a_split_may_name_shards_of_another_version(place: Folder) -> None:
    write_urls(place, "val", ["val-000000", "../4567/val-000003"])
    assert split_shards(place.store, place.folder, "val") == [
        "images/x/0123/val-000000.tar",
        "images/x/4567/val-000003.tar",
    ]


def test_a_missing_split_is_named(place: Folder) -> None:
    with pytest.raises(PipelineError, match=r"images/x/0123 has no split 'tset'"):
        split_shards(place.store, place.folder, "tset")


def test_a_table_is_decoded_unchanged_even_without_rows() -> None:
    rows: list[dict[str, object]] = [{"key": "a", "width": 3}, {"key": "b", "width": None}]
    columns = {"key": "string", "width": "int32"}
    assert decode_table(encode_table(rows, columns)) == rows
    assert encode_table(rows, columns) == encode_table(rows, columns)
    assert decode_table(encode_table([], columns)) == []
