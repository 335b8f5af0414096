"""Bad input: every item is counted and named, the build continues, nothing is written outside."""

from __future__ import annotations

import io
import json
import os
import stat
import struct
import tarfile
import threading
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import other_formats
import pytest
from image_sets import (
    SPLITS,
    all_samples,
    crops,
    homes,
    outcomes,
    photograph,
    photographs,
    picture,
    reasons,
    record,
    table,
)
from servers import Server

from data_prep.core.errors import ConfigError, PipelineError
from data_prep.core.manifest import StageRef
from data_prep.core.storage.local import LocalStore
from data_prep.core.storage.open import open_store
from data_prep.images.stage import prepare_images
from data_prep.raw.local_files import LocalFiles
from dpnet.pipeline.verify import verify


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return photographs(tmp_path / "photos", 12)


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "root")


def build(source: object, store: LocalStore) -> StageRef:
    """Run a build that accepts any failures, verify it, and check that all items are counted."""
    ref = prepare_images(crops(source, max_failure_ratio=1, val=0.2, test=0.2), store)
    assert verify(store).problems == []
    outside = {str(path.relative_to(store.folder)).split("/")[0] for path in store.folder.iterdir()}
    assert outside == {"images"}
    kinds = ("photographs", "failed", "ignored", "duplicates")
    assert sum(ref.summary[kind] for kind in kinds) == ref.summary["listed"]
    assert len(homes(store, ref)) == ref.summary["photographs"]
    return ref


def encoded(kind: str, seed: int = 0, width: int = 80, height: int = 64) -> bytes:
    file = io.BytesIO()
    picture(seed, width, height).save(file, kind)
    return file.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bomb(path: Path, side: int = 50_000) -> None:
    """Write a black RGB PNG of side x side pixels: 7.5 GB in a file of some megabytes."""
    pack = zlib.compressobj(9)
    packed = [pack.compress(bytes(3 * side + 1)) for _ in range(side // 10)]
    # A tenth of the rows: a decoder that trusts the header fails before it misses the rest.
    data = b"".join([*packed, pack.flush()])
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    ending = chunk(b"IDAT", data) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + ending)


def test_damaged_images_and_other_files_fail_with_a_reason(folder: Path, store: LocalStore) -> None:
    jpeg, png = encoded("jpeg"), bytearray(encoded("png"))
    (folder / "truncated.jpg").write_bytes(jpeg[: len(jpeg) // 2])
    (folder / "header only.jpg").write_bytes(jpeg[:30])
    png[len(png) // 2] ^= 0x55
    (folder / "corrupt.png").write_bytes(png)
    (folder / "zero bytes.jpg").write_bytes(b"")
    (folder / "text.jpg").write_text("this is text")
    (folder / "zeros.png").write_bytes(bytes(10_000))
    (folder / "page.webp").write_text("<html>404</html>")
    (folder / "png as.jpg").write_bytes(encoded("png", 20))
    (folder / "jpeg as.png").write_bytes(encoded("jpeg", 21))
    ref = build(folder, store)
    failed = reasons(store, ref)
    assert set(failed) == {
        "truncated.jpg", "header only.jpg", "corrupt.png", "zero bytes.jpg", "text.jpg",
        "zeros.png", "page.webp",
    }  # fmt: skip
    assert all(reason and "\n" not in reason for reason in failed.values())
    assert failed["zero bytes.jpg"] == "it is empty"
    assert {"png as.jpg", "jpeg as.png"} < set(homes(store, ref))


def test_other_formats_that_pillow_knows_are_refused_and_start_no_program(
    folder: Path, store: LocalStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = other_formats.trap_ghostscript(tmp_path / "bin", monkeypatch)
    names = other_formats.write_all(folder)
    ref = build(folder, store)
    assert reasons(store, ref) == dict.fromkeys(names, other_formats.REASON)
    assert not started.exists()


def test_a_decompression_bomb_is_refused_from_its_header(folder: Path, store: LocalStore) -> None:
    import resource

    bomb(folder / "bomb.png")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    ref = build(folder, store)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before  # KiB
    assert "50000x50000 pixels" in reasons(store, ref)["bomb.png"]
    assert grown < 200 << 10


def test_a_zip_bomb_fails_and_its_neighbours_are_stored(tmp_path: Path, store: LocalStore) -> None:
    path = tmp_path / "photos.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for number in range(6):
            archive.writestr(f"{number}.jpg", encoded("jpeg", number))
        with archive.open("bomb.png", "w", force_zip64=True) as member:
            for _ in range(200):
                member.write(bytes(1 << 20))
    assert path.stat().st_size < 1 << 20
    ref = build(path, store)
    assert reasons(store, ref) == {"bomb.png": "it is larger than 128000000 bytes"}
    assert ref.summary["photographs"] == 6


def test_a_member_with_a_false_size_is_not_expanded(tmp_path: Path, store: LocalStore) -> None:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for number in range(12):
            archive.writestr(f"{number}.jpg", encoded("jpeg", number))
        archive.writestr("liar.png", bytes(150 << 20))
    data = file.getvalue().replace(struct.pack("<I", 150 << 20), struct.pack("<I", 1000))
    (tmp_path / "photos.zip").write_bytes(data)
    ref = build(tmp_path / "photos.zip", store)
    assert set(reasons(store, ref)) == {"liar.png"}


NAMES = [
    "a b.jpg", " lead.jpg", "trail .jpg", "new\nline.jpg", "tab\t.jpg", "quo\"te'.jpg", "é.jpg",
    "e\u0301.jpg", "漢字😀.jpg", "a\\b.jpg", "$(x);`y`.jpg", "-rf.jpg", "x" * 200 + ".jpg",
    "%2e.jpg",    "a#b?c&d.jpg", "dir.jpg/inner.jpg", "a..b.jpg", "UPPER.JPG", "two.tar.gz.jpg",
]  # fmt: skip


def test_unusual_names_are_kept_in_tables_and_plain_in_tars(
    folder: Path, store: LocalStore
) -> None:
    for number, name in enumerate(NAMES):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(encoded("jpeg", 100 + number))
    undecoded = os.fsencode(folder) + b"/\xff\xfe.jpg"
    Path(os.fsdecode(undecoded)).write_bytes(encoded("jpeg", 99))
    ref = build(folder, store)
    assert ref.summary["failed"] == 0
    assert {*NAMES, "\\xff\\xfe.jpg"} <= set(homes(store, ref))
    keys = [key for key, _ in all_samples(store, ref)]
    assert len(set(keys)) == len(keys)
    assert all(key.isascii() and key.replace("_", "").replace("-", "").isalnum() for key in keys)


def test_items_with_the_same_stem_become_different_samples(folder: Path, store: LocalStore) -> None:
    for seed, kind in enumerate(("jpeg", "png", "bmp", "webp")):
        (folder / f"same.{kind}").write_bytes(encoded(kind, 30 + seed))
    (folder / "same.jpg").write_bytes(encoded("jpeg", 40))
    (folder / "deeper").mkdir()
    (folder / "deeper/same.jpg").write_bytes(encoded("jpeg", 41))
    ref = build(folder, store)
    assert ref.summary["photographs"] == 18
    assert len({key for key, _ in all_samples(store, ref)}) == 18


ESCAPES = ["../up.jpg", "/abs.jpg", "a/../../up.jpg", "..", "C:\\x.jpg", "..\\up.jpg"]


def zipped(path: Path, names: list[str]) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for number, name in enumerate(names):
            archive.writestr(name, encoded("jpeg", number))


def tarred(path: Path, names: list[str]) -> None:
    with tarfile.open(path, "w:gz" if path.name.endswith("gz") else "w") as archive:
        for number, name in enumerate(names):
            data = encoded("jpeg", number)
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


@pytest.mark.parametrize(
    ("name", "pack"), [("p.zip", zipped), ("p.tar", tarred), ("p.tar.gz", tarred)]
)
def test_members_with_names_outside_the_archive_fail_and_write_nothing_outside(
    tmp_path: Path, store: LocalStore, name: str, pack: Callable[[Path, list[str]], None]
) -> None:
    inside = tmp_path / "in"
    inside.mkdir()
    good = [f"{n}.jpg" for n in range(6)]
    pack(inside / name, [*ESCAPES, *good, "new\nline é.jpg"])
    before = sorted(tmp_path.rglob("*"))
    for source in (inside / name, inside):
        ref = build(source, store)
        failed = reasons(store, ref)
        assert len(failed) >= len(ESCAPES) - 1  # an archive may drop ".."
        shown = [reason for key, reason in failed.items() if not key.endswith("..")]
        assert all("leads out of the archive" in reason for reason in shown)
        assert {key.rpartition("/")[2] for key in homes(store, ref)} == {*good, "new\nline é.jpg"}
    now = [path for path in tmp_path.rglob("*") if store.folder not in path.parents]
    assert sorted(set(now) - {store.folder}) == before
    assert not Path("/abs.jpg").exists()


@pytest.mark.parametrize("name", ["p.zip", "p.tar", "p.tar.gz", "p.parquet"])
@pytest.mark.parametrize("how", ["cut off", "empty", "zeros", "text"])
def test_a_broken_archive_next_to_photos_is_one_failure_or_refused(
    folder: Path, store: LocalStore, name: str, how: str
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = folder / name
    names = [f"{n}.jpg" for n in range(6)]
    if name == "p.parquet":
        photos = [encoded("jpeg", 10 + n) for n in range(6)]
        pq.write_table(pa.table({"image": pa.array(photos, pa.binary())}), path)
    else:
        (zipped if name == "p.zip" else tarred)(path, names)
    data = path.read_bytes()
    harmed = {"cut off": data[: len(data) // 2], "empty": b"", "text": b"not an archive at all"}
    path.write_bytes(harmed.get(how, bytes(20_000)))
    if how == "cut off":  # the members after the cut are unknown
        with pytest.raises(PipelineError, match=r"cut off.*Give the complete archive"):
            build(folder, store)
        return
    ref = build(folder, store)
    assert ref.summary["photographs"] >= 12
    if not (how in ("zeros", "empty") and name == "p.tar"):  # an empty tar is zeros
        assert any(key.startswith(name) and reason for key, reason in reasons(store, ref).items())


def test_links_and_devices_in_a_tar_are_not_followed(tmp_path: Path, store: LocalStore) -> None:
    secret = photograph(tmp_path / "secret.jpg", 90)
    path = tmp_path / "p.tar"
    tarred(path, [f"{n}.jpg" for n in range(6)])
    with tarfile.open(path, "a") as archive:
        for number, kind in enumerate((tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE)):
            info = tarfile.TarInfo(f"link {number}.jpg")
            info.type, info.linkname = kind, str(secret)
            archive.addfile(info)
    ref = build(path, store)
    assert ref.summary["photographs"] == 6
    assert not any("link" in key for key in homes(store, ref))


def test_pipes_and_broken_links_in_a_folder_do_not_block_the_build(
    folder: Path, store: LocalStore
) -> None:
    os.mkfifo(folder / "pipe.jpg")
    (folder / "dangling.jpg").symlink_to(folder / "nowhere.jpg")
    (folder / "loop").symlink_to(folder)
    (folder / "itself.jpg").symlink_to(folder / "itself.jpg")
    ref = build(folder, store)
    assert ref.summary["photographs"] == 12
    assert reasons(store, ref)["dangling.jpg"] == "it is a link to a file that does not exist"


def test_missing_files_of_a_list_are_counted_as_failed(folder: Path, store: LocalStore) -> None:
    keys = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.png"))
    (folder / "list.txt").write_text("\n".join([*keys, "missing.jpg", "../up/missing.jpg", ""]))
    ref = build(folder / "list.txt", store)
    assert (ref.summary["photographs"], ref.summary["failed"]) == (12, 2)
    assert all("missing" in reason for reason in reasons(store, ref).values())
    assert build(folder / "list.txt", store).folder == ref.folder


def test_an_unknown_split_in_a_list_is_refused_with_its_line_number(
    folder: Path, store: LocalStore
) -> None:
    (folder / "list.csv").write_text("path,split\ntrip 0/0.png,train\ntrip 0/3.png,half\n")
    with pytest.raises(ConfigError, match=r"line 3 of .*list\.csv: the split 'half' is unknown"):
        build(folder / "list.csv", store)


def between(monkeypatch: pytest.MonkeyPatch, happens: Callable[[], object]) -> None:
    """Call `happens` after the listing, before the first photo is read."""
    real, done = LocalFiles.read, threading.Event()

    def read(files: LocalFiles, key: str, limit: int) -> bytes:
        if not done.is_set():
            done.set()
            happens()
        return real(files, key, limit)

    monkeypatch.setattr(LocalFiles, "read", read)


def test_a_file_deleted_after_the_listing_is_a_failure(
    folder: Path, store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    between(monkeypatch, (folder / "trip 1/4.png").unlink)
    ref = build(folder, store)
    assert reasons(store, ref) == {"trip 1/4.png": "it is gone since it was listed"}
    second = build(folder, store)
    assert (second.summary["listed"], second.summary["removed"]) == (11, 1)


def test_a_file_changed_after_the_listing_is_stored_as_it_was_read(
    folder: Path, store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    from data_prep.core.digest import sha256_bytes

    path = folder / "trip 1/4.png"
    between(monkeypatch, lambda: photograph(path, 77))
    ref = build(folder, store)
    (row,) = (r for r in table(store, ref, "sources") if r["key"] == "trip 1/4.png")
    assert row["sha256"] == sha256_bytes(path.read_bytes())
    assert build(folder, store).folder == ref.folder  # the build has already read it so
    photograph(path, 78)
    third = build(folder, store)
    (row,) = (r for r in table(store, third, "sources") if r["key"] == "trip 1/4.png")
    assert row["sha256"] == sha256_bytes(path.read_bytes())


def test_an_archive_changed_after_the_listing_stops_the_build_and_the_next_build_is_right(
    tmp_path: Path, store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    from data_prep.images import shard_task as image_shards

    path = tmp_path / "p.zip"
    zipped(path, [f"{n}.jpg" for n in range(8)])
    real = image_shards.build_shard

    def change_first(task: image_shards.ShardTask) -> image_shards.ShardResult:
        zipped(path, [f"{n}.jpg" for n in range(20)][::-1])
        return real(task)

    monkeypatch.setattr("data_prep.images.build.build_shard", change_first)
    with pytest.raises(
        PipelineError, match=r"p\.zip has changed since it was listed\. Run the same"
    ):
        build(path, store)
    monkeypatch.undo()
    assert build(path, store).summary["photographs"] == 20


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_read_permission_stops_the_build_with_one_sentence(
    folder: Path, store: LocalStore
) -> None:
    path = folder / "trip 1/4.png"
    path.chmod(0)
    with pytest.raises(PipelineError, match=r"cannot read .*4\.png"):
        build(folder, store)
    path.chmod(stat.S_IRUSR)
    assert build(folder, store).summary["failed"] == 0


def test_a_disk_error_stops_the_build_and_is_not_a_failed_photo(
    folder: Path, store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_open = open

    def broken_disk(path: object, *rest: object, **more: object) -> object:
        if str(path).endswith("4.png"):
            raise OSError(5, "Input/output error")
        return real_open(path, *rest, **more)  # type: ignore[call-overload]

    monkeypatch.setattr("data_prep.raw.local_files.open", broken_disk, raising=False)
    with pytest.raises(PipelineError, match=r"cannot read .*4\.png: Input/output error"):
        build(folder, store)
    assert not any(entry.key.endswith("manifest.json") for entry in store.list())
    monkeypatch.undo()
    assert build(folder, store).summary["failed"] == 0


def test_a_missing_bucket_is_reported_in_one_sentence(
    moto: Server, monkeypatch: pytest.MonkeyPatch, store: LocalStore, folder: Path
) -> None:
    moto.use(monkeypatch)
    for act in (
        lambda: prepare_images(crops("s3://no-such-bucket/photos"), store),
        lambda: prepare_images(crops(folder), open_store("s3://no-such-bucket/root")),
    ):
        with pytest.raises(PipelineError, match="no-such-bucket") as caught:
            act()
        assert "\n" not in str(caught.value)


def test_an_empty_prefix_is_reported_in_one_sentence(moto_root: str, store: LocalStore) -> None:
    with pytest.raises(PipelineError, match=f"there is nothing at {moto_root}"):
        prepare_images(crops(moto_root), store)


def test_unusual_and_broken_objects_of_a_bucket_are_counted(
    moto_root: str, store: LocalStore
) -> None:
    remote = open_store(moto_root)
    for number in range(6):
        remote.write(f"{number}.jpg", encoded("jpeg", number))
    odd = ["a b+c%20.jpg", "漢😀.jpg", "q?x#y&z=1.jpg"]
    for number, name in enumerate(odd, 10):
        remote.write(name, encoded("jpeg", number))
    remote.write("empty.jpg", b"")
    remote.write("folder/", b"")
    remote.write("text.jpg", b"text")
    ref = build(moto_root, store)
    assert {*odd} < set(homes(store, ref))
    assert {"empty.jpg", "text.jpg"} <= {
        k for k, o in outcomes(store, ref).items() if o == "failed"
    }
    assert ref.summary["photographs"] == 9
    assert {record(files)["split"] for _, files in all_samples(store, ref)} == set(SPLITS)


def test_many_photos_outside_the_split_folders_are_refused(
    tmp_path: Path, store: LocalStore
) -> None:
    for number in range(6):
        photograph(tmp_path / f"photos/train/{number}.jpg", number)
        photograph(tmp_path / f"photos/val/{number}.jpg", 10 + number)
        photograph(tmp_path / f"photos/more/{number}.jpg", 20 + number)
    source = tmp_path / "photos"
    with pytest.raises(PipelineError, match=r"6 photos .* are outside .* \(first more/0.jpg\)"):
        prepare_images(crops(source), store)
    assert prepare_images(crops(source, layout="files"), store).summary["photographs"] == 18


def test_photos_of_unsupported_formats_fail_and_are_not_ignored(
    folder: Path, store: LocalStore
) -> None:
    (folder / "phone.HEIC").write_bytes(b"\0\0\0\x18ftypheic" + bytes(2000))
    assert build(folder, store).summary["failed"] == 1


def test_a_build_that_stops_because_of_broken_files_lists_all_of_them(
    folder: Path, store: LocalStore
) -> None:
    for number in range(9):
        (folder / f"broken {number}.jpg").write_bytes(b"\xff\xd8\xff not an image")
    with pytest.raises(PipelineError, match="cannot be used") as caught:
        prepare_images(crops(folder), store)
    (listed,) = Path(store.folder).rglob("failures.jsonl")
    assert str(listed) in str(caught.value)
    keys = {json.loads(line)["key"] for line in listed.read_text().splitlines()}
    assert len(keys) > 1
    assert keys <= {f"broken {number}.jpg" for number in range(9)}


@pytest.mark.parametrize(
    ("options", "advice"),
    [
        ({"size": 512}, "lower --size (images.size), or set images.min_side (--set min_side=N)"),
        ({"size": 32, "min_side": 512}, "lower images.min_side (--set min_side=N)"),
        ({"mode": "tiles", "tile": [512]}, "lower the smallest side in images.tile"),
    ],
)
def test_the_advice_about_small_photos_names_the_options_that_refuse_them(
    folder: Path,
    store: LocalStore,
    options: dict[str, object],
    advice: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")
    with pytest.raises(PipelineError) as caught:
        prepare_images(crops(folder, **options), store)
    assert f"To use them, {advice}" in str(caught.value)
    for seed, split in enumerate(SPLITS):
        photograph(folder / "more" / split / "large.png", seed, 600, 600)
    photograph(folder / "more" / "train" / "small.png", 9)
    prepare_images(crops(folder / "more", max_failure_ratio=1, **options), store)
    assert f"its shorter side needs 512. To use them, {advice}" in caplog.text


def test_the_advice_about_a_table_of_several_columns_names_them_and_the_name_to_give(
    folder: Path, store: LocalStore
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({"before": [b"1"], "after": [b"2"]})
    pq.write_table(table, folder / "two.parquet")
    sentences = []
    for source in (folder / "two.parquet", folder):
        for photo in folder.rglob("*.png") if source == folder else ():
            photo.unlink()
        with pytest.raises(PipelineError) as caught:
            prepare_images(crops(source), store)
        sentences.append(str(caught.value))
    for sentence in sentences:
        assert "none is called image: 'before', 'after'" in sentence
        assert "ename the column of the images to image" in sentence
