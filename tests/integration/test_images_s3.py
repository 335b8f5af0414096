"""Image shards on a real S3 server (Ceph): the same bytes as in a folder, also after a kill."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from image_sets import (
    crops,
    files_of,
    homes,
    photograph,
    photographs,
    picture,
    reasons,
    shards_of,
    table,
)

from data_prep.core.manifest import StageRef
from data_prep.core.pool import run_tasks
from data_prep.core.storage.local import LocalStore
from data_prep.core.storage.open import open_store
from data_prep.core.storage.s3 import S3Store
from data_prep.core.storage.store import Store
from data_prep.images import shard_task as image_shards
from data_prep.images.settings import ImagesSettings
from data_prep.images.stage import prepare_images
from data_prep.shards.shards import split_shards, write_shard
from dpnet.pipeline.verify import verify

pytestmark = [pytest.mark.integration, pytest.mark.slow]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    photographs(tmp_path / "photos", 40)
    (tmp_path / "photos/copy.png").write_bytes((tmp_path / "photos/trip 1/4.png").read_bytes())
    (tmp_path / "photos/broken.jpg").write_bytes(b"broken")
    return tmp_path / "photos"


def small(source: object) -> ImagesSettings:
    return crops(source, shard_samples=6, val=0.1, test=0.1)


def put(folder: Path, prefix: str) -> str:
    """Upload a folder, and return the prefix."""
    store = open_store(prefix)
    for path in folder.rglob("*"):
        if path.is_file():
            store.write(str(path.relative_to(folder)), path.read_bytes())
    return prefix


def content(store: Store, ref: StageRef) -> tuple[str, dict[str, str]]:
    return ref.content_digest, files_of(store, ref)


def objects(store: Store, ref: StageRef) -> dict[str, str]:
    """Return the ETag of every object of a version."""
    return {entry.key: entry.fingerprint for entry in store.list(ref.folder)}


def test_a_root_on_s3_gets_the_same_bytes_as_a_local_root_from_a_folder_and_a_prefix(
    folder: Path, s3_root: str, tmp_path: Path
) -> None:
    local = LocalStore(tmp_path / "root")
    expected = prepare_images(small(folder), local)
    prefix = put(folder, f"{s3_root}/photos")
    for number, source in enumerate((str(folder), prefix)):
        remote = open_store(f"{s3_root}/root {number}")
        ref = prepare_images(small(source), remote)
        assert content(remote, ref) == content(local, expected)
        assert ref.summary == expected.summary
        assert reasons(remote, ref) == reasons(local, expected)
        assert verify(remote).problems == []
    again = LocalStore(tmp_path / "root of a prefix")
    assert content(again, prepare_images(small(prefix), again)) == content(local, expected)


def test_an_unchanged_prefix_is_not_read_again(
    folder: Path, s3_root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefix, remote = put(folder, f"{s3_root}/photos"), open_store(f"{s3_root}/root")
    first = prepare_images(small(prefix), remote)
    before = objects(remote, first)
    assert not any("/work/" in key for key in before)
    real = S3Store.read_range

    def read_range(store: S3Store, key: str, offset: int, size: int) -> bytes:
        assert store.uri != prefix, f"{key} was read"
        return real(store, key, offset, size)

    monkeypatch.setattr(S3Store, "read_range", read_range)
    again = prepare_images(small(prefix), remote)
    assert again.skipped
    assert again.folder == first.folder
    assert objects(remote, first) == before


def test_more_photos_make_only_new_shards(folder: Path, s3_root: str) -> None:
    prefix, remote = put(folder, f"{s3_root}/photos"), open_store(f"{s3_root}/root")
    first = prepare_images(small(prefix), remote)
    before = objects(remote, first)
    store = open_store(prefix)
    for number in range(20):
        file = io.BytesIO()
        picture(500 + number).save(file, "png")
        store.write(f"new/{number}.png", file.getvalue())
    second = prepare_images(small(prefix), remote)
    assert (second.summary["added"], second.summary["changed"]) == (20, 0)
    assert objects(remote, first) == before
    assert shards_of(remote, first).items() <= shards_of(remote, second).items()
    own = {row["shard"] for row in table(remote, second, "sources") if row["key"][:4] == "new/"}
    tars = [key for key in objects(remote, second) if key.endswith(".tar")]
    assert {Path(key).stem for key in tars} == own
    assert len(homes(remote, second)) == 60
    assert verify(remote).problems == []


def test_an_archive_on_s3_gives_the_same_bytes_as_on_disk(
    folder: Path, s3_root: str, tmp_path: Path
) -> None:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for path in sorted(folder.rglob("*.png")):
            archive.write(path, path.relative_to(folder))
        archive.writestr("new\nline é 漢.png", (folder / "trip 2/5.png").read_bytes() + b"!")
    open_store(s3_root).write("p/photos.zip", packed.getvalue())
    (tmp_path / "photos.zip").write_bytes(packed.getvalue())
    local, remote = LocalStore(tmp_path / "root"), open_store(f"{s3_root}/root")
    refs = [
        prepare_images(small(tmp_path / "photos.zip"), local),
        prepare_images(small(f"{s3_root}/p/photos.zip"), remote),
    ]
    assert content(local, refs[0]) == content(remote, refs[1])
    assert "new\nline é 漢.png" in homes(remote, refs[1])


def test_objects_with_unusual_names_are_read(s3_root: str, tmp_path: Path) -> None:
    names = ["new\nline", "a b+c%20", "漢😀", "q?x#y&z=1", "tab\t", "'\"<&>", " lead", *"abcdef"]
    store = open_store(f"{s3_root}/photos")
    for number, name in enumerate(names):
        file = io.BytesIO()
        picture(number).save(file, "jpeg")
        store.write(f"{name}.jpg", file.getvalue())
    root = LocalStore(tmp_path / "root")
    ref = prepare_images(small(f"{s3_root}/photos"), root)
    assert {f"{name}.jpg" for name in names} == set(homes(root, ref))


def test_a_build_interrupted_at_any_shard_resumes(
    folder: Path, s3_root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = LocalStore(tmp_path / "root")
    expected = content(local, prepare_images(small(folder), local))
    for most in (0, 3, 6):
        remote = open_store(f"{s3_root}/root {most}")
        written: list[str] = []

        def write(place, name, samples, written=written, most=most):  # type: ignore[no-untyped-def]
            if len(written) == most:
                raise KeyboardInterrupt
            written.append(name)
            return write_shard(place, name, samples)

        with monkeypatch.context() as patch:
            patch.setattr(image_shards, "write_shard", write)
            patch.setattr("data_prep.images.build.run_apart", run_tasks)  # in this process
            with pytest.raises(KeyboardInterrupt):
                prepare_images(small(folder), remote)
        begun = {e.key: e.fingerprint for e in remote.list() if e.key.endswith(".tar")}
        ref = prepare_images(small(folder), remote)
        assert content(remote, ref) == expected
        now = objects(remote, ref)
        assert sum(now.get(key) == tag for key, tag in begun.items()) >= len(begun) - 1


# The command; before it writes its fourth shard, it says so and waits for its end.
HELD = """
import sys, time
from data_prep.core.pool import run_tasks
from data_prep.images import build, shard_task
from dpnet.cli.main import main
real, written = shard_task.write_shard, []
def write(place, name, samples):
    if len(written) == 3:
        print("held", flush=True)
        time.sleep(600)
    written.append(name)
    return real(place, name, samples)
shard_task.write_shard = write
build.run_apart = run_tasks  # in this process
sys.exit(main())
"""


def command(source: object, root: str, *, held: bool = False) -> subprocess.Popen[str]:
    argv = [sys.executable, *(["-c", HELD] if held else ["-m", "dpnet"]), "images", "build"]
    argv += [str(source), "--name", "x", "--json", "--size", "32", "--root", root]
    argv += ["--set=images.shard_samples=6", "--set=images.workers=1"]
    return subprocess.Popen(
        argv,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={k: v for k, v in os.environ.items() if not k.startswith("DPNET_")},
    )


def test_a_killed_build_resumes_and_no_output_contains_the_credentials(
    folder: Path, s3_root: str, tmp_path: Path
) -> None:
    prefix = put(folder, f"{s3_root}/photos")
    store = open_store(f"{s3_root}/root")
    process = command(prefix, f"{s3_root}/root", held=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    os.killpg(process.pid, signal.SIGKILL)
    out, errors = process.communicate(timeout=20)
    begun = {e.key: e.fingerprint for e in store.list() if e.key.endswith(".tar")}
    assert len(begun) == 3
    assert not any(entry.key.endswith("/manifest.json") for entry in store.list())
    again = command(prefix, f"{s3_root}/root")
    more, more_errors = again.communicate(timeout=120)
    assert again.returncode == 0, more_errors
    result = json.loads(more.splitlines()[-1])
    now = {entry.key: entry.fingerprint for entry in store.list()}
    # One of them holds a duplicate, which is known only at the end: it is written again.
    assert sum(now.get(key) == tag for key, tag in begun.items()) >= len(begun) - 1
    local = LocalStore(tmp_path / "root")
    done = command(prefix, str(local.folder)).communicate(timeout=120)
    assert json.loads(done[0].splitlines()[-1])["content_digest"] == result["content_digest"]
    assert verify(store).problems == []
    for secret in (os.environ["AWS_SECRET_ACCESS_KEY"], os.environ["AWS_ACCESS_KEY_ID"]):
        assert not any(secret in text for text in (out, errors, more, more_errors, *done))
        assert not any(secret.encode() in store.read(entry.key) for entry in store.list("images"))


def test_verify_finds_a_changed_byte_and_names_its_shard(folder: Path, s3_root: str) -> None:
    remote = open_store(f"{s3_root}/root")
    ref = prepare_images(small(folder), remote)
    tar = split_shards(remote, ref.folder, "train")[1]
    data = bytearray(remote.read(tar))
    data[1500] ^= 1
    remote.write(tar, bytes(data))
    problems = verify(remote, ref.folder).problems
    assert problems
    assert {problem.where for problem in problems} == {tar}


def test_wrong_credentials_are_reported_without_showing_them(
    folder: Path, s3_root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    photograph(folder / "one more.png", 700)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-the-secret")
    process = command(folder, f"{s3_root}/denied")
    out, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "Traceback" not in errors
    assert "s3://" in errors + out
    assert "not-the-secret" not in errors + out
