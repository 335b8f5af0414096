"""`verify` names every damage in committed sets of images and masks."""

from __future__ import annotations

import io
import json
import posixpath
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import small_root

from data_prep.core.digest import sha256_bytes
from data_prep.core.manifest import FileRecord, content_digest
from data_prep.core.stage import Produced, Request, run_stage
from data_prep.core.storage.local import LocalStore
from data_prep.core.storage.open import open_store
from data_prep.images.settings import ImagesSettings
from data_prep.images.stage import prepare_images
from data_prep.masks.settings import MasksSettings
from data_prep.masks.stage import prepare_masks
from data_prep.shards.check_set import Depth, chosen, shards_of
from data_prep.shards.shards import write_file
from dpnet.pipeline.verification import Verification
from dpnet.pipeline.verify import verify

Row = dict[str, Any]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str, str]:
    """Make a root with two versions of images and with masks; return their folders.

    Of the 31 files of the second version, one is broken, one is a copy and one is not a photo. At
    least two shards are inherited.
    """
    top = tmp_path_factory.mktemp("built")
    store, photos = LocalStore(top / "root"), small_root.photographs(top / "photos", 24)
    (photos / "notes.txt").write_text("no picture")
    (photos / "broken.png").write_bytes((photos / "00.png").read_bytes()[:300])
    shutil.copyfile(photos / "01.png", photos / "copy.png")
    config = ImagesSettings(
        source=str(photos), name="small", size=32, shard_samples=4, val=0.2, test=0.2
    )
    first = prepare_images(config, store)
    for number in range(4):
        shutil.copyfile(photos / f"{number:02d}.png", photos / f"new{number}.png")
        with (photos / f"new{number}.png").open("ab") as file:
            file.write(b"other bytes")
    second = prepare_images(config, store)
    masks = MasksSettings(name="small", size=32, train=10, eval_per_bin=3, shard_samples=5)
    return store.folder, first.folder, second.folder, prepare_masks(masks, store).folder


@pytest.fixture
def root(built: tuple[Path, str, str, str], tmp_path: Path) -> LocalStore:
    shutil.copytree(built[0], tmp_path / "root")
    return LocalStore(tmp_path / "root")


@pytest.fixture
def first(built: tuple[Path, str, str, str]) -> str:
    return built[1]


@pytest.fixture
def child(built: tuple[Path, str, str, str]) -> str:
    return built[2]


@pytest.fixture
def masks(built: tuple[Path, str, str, str]) -> str:
    return built[3]


def reported(result: Verification, where: str, *words: str) -> bool:
    """Return whether a problem of `where` has all the words."""
    return any(
        p.where == where and all(word in p.problem for word in words) for p in result.problems
    )


def manifest_of(root: LocalStore, folder: str) -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads(root.read(f"{folder}/manifest.json"))
    return manifest


def change_manifest(root: LocalStore, folder: str, **changes: Any) -> None:
    """Change fields of a manifest and make its content digest fit again."""
    manifest = manifest_of(root, folder) | changes
    manifest["content_digest"] = content_digest(FileRecord(**f) for f in manifest["files"])
    root.write(f"{folder}/manifest.json", json.dumps(manifest).encode())


def rewrite(root: LocalStore, folder: str, path: str, data: bytes) -> None:
    """Write a file again and update the manifest, so that only the file's content can be wrong."""
    root.write(f"{folder}/{path}", data)
    files = manifest_of(root, folder)["files"]
    for file in files:
        if file["path"] == path:
            file |= {"size": len(data), "sha256": sha256_bytes(data)}
    change_manifest(root, folder, files=files)


def edit_table(
    root: LocalStore, folder: str, path: str, edit: Callable[[list[Row]], object]
) -> None:
    """Edit the rows of a parquet file and update the manifest."""
    table = pq.read_table(io.BytesIO(root.read(f"{folder}/{path}")))
    rows = table.to_pylist()
    edit(rows)
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), sink)
    rewrite(root, folder, path, sink.getvalue())


def own_shards(root: LocalStore, folder: str) -> list[str]:
    """Return the names of the shards in the folder itself."""
    paths = [f["path"] for f in manifest_of(root, folder)["files"]]
    return [p.removesuffix(".tar") for p in paths if p.endswith(".tar") and "/" not in p]


def sources(root: LocalStore, folder: str) -> list[Row]:
    rows: list[Row] = pq.read_table(io.BytesIO(root.read(f"{folder}/sources.parquet"))).to_pylist()
    return rows


def test_whole_sets_are_clean_and_everything_is_read(root: LocalStore, child: str) -> None:
    result = verify(root)
    assert result.problems == []
    assert result.notes == []
    assert (result.stages, result.unread) == (3, 0)
    assert len(sources(root, child)) == 31
    paths = [f["path"] for f in manifest_of(root, child)["files"]]
    assert sum(p.startswith("../") and p.endswith(".tar") for p in paths) >= 2
    tars = sum(entry.key.endswith(".tar") for entry in root.list())
    assert (result.shards, result.tars, result.indexes) == (tars, tars, tars)  # each once
    files = [e for e in root.list() if not e.key.endswith(("lease.json", "manifest.json"))]
    assert result.bytes == sum(entry.size for entry in files)


@pytest.mark.parametrize("seed", range(16))
def test_a_byte_flipped_anywhere_names_the_file(root: LocalStore, seed: int) -> None:
    rng = random.Random(seed)
    keys = [e.key for e in root.list() if not e.key.endswith("lease.json")]
    key = rng.choice([k for k in keys if not k.endswith("manifest.json")])
    data = bytearray(root.read(key))
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    root.write(key, bytes(data))
    assert key in {problem.where for problem in verify(root).problems}


@pytest.mark.parametrize("seed", range(16))
def test_a_flipped_byte_of_a_manifest_is_reported_or_changes_an_unchecked_field(
    root: LocalStore, child: str, seed: int
) -> None:
    rng, key = random.Random(seed), f"{child}/manifest.json"
    data = bytearray(root.read(key))
    before = json.loads(data)
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    root.write(key, bytes(data))
    result = verify(root)
    try:
        after = json.loads(data)
    except ValueError:
        after = None
    if after is None or not unchecked(before, after):
        # An optional field whose name was altered is an unknown one, which a newer version may add.
        renamed = [note for note in result.notes if "does not know" in note]
        assert not result.ok or renamed


def unchecked(before: dict[str, Any], after: dict[str, Any]) -> bool:
    """Return whether two manifests differ only in fields that `verify` cannot check.

    These are the times, the counts of changes, and names of fields that nobody reads.
    """
    parts = {k: after.get(k) for k in before}
    parts |= {k: before[k] for k in ("created", "seconds", "name")}
    summary = dict(parts["summary"] or {})
    for name in ("version", "added", "removed", "changed", "near_duplicates"):
        summary[name] = before["summary"][name]
    free = {"version", "added", "removed", "changed", "near_duplicates"}
    parts["summary"] = {k: summary.get(k) for k in before["summary"] if k not in free}
    wanted = {k: v for k, v in before["summary"].items() if k not in free}
    return parts == before | {"summary": wanted}


def test_a_flipped_byte_names_the_sample(root: LocalStore, first: str, masks: str) -> None:
    for folder in (first, masks):
        name = own_shards(root, folder)[0]
        rows = pq.read_table(io.BytesIO(root.read(f"{folder}/{name}.parquet"))).to_pylist()
        data = bytearray(root.read(f"{folder}/{name}.tar"))
        data[rows[1]["offset"] + 30] ^= 1
        root.write(f"{folder}/{name}.tar", bytes(data))
        assert reported(verify(root, folder), f"{folder}/{name}.tar", f"sample {rows[1]['key']}: ")


def test_the_size_of_the_photo_in_a_sidecar_is_compared_with_the_table(
    root: LocalStore, first: str
) -> None:
    key = f"{first}/{own_shards(root, first)[0]}.tar"
    data = root.read(key)
    assert data.count(b'"original_width":48') > 1
    root.write(key, data.replace(b'"original_width":48', b'"original_width":49', 1))
    assert reported(verify(root), key, ".json has another size of the original")


def test_a_missing_tar_and_a_missing_index_are_named(root: LocalStore, first: str) -> None:
    one, other = own_shards(root, first)[:2]
    root.delete(f"{first}/{one}.tar")
    root.delete(f"{first}/{other}.parquet")
    result = verify(root)
    assert reported(result, f"{first}/{one}.tar", "is missing")
    assert reported(result, f"{first}/{other}.parquet", "is missing")
    assert len(result.problems) <= 20


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda lines: lines[1:], "does not name"),
        (
            lambda lines: [*lines, "train-000099.tar"],
            "names 'train-000099.tar', which is not",
        ),
        (lambda lines: [*lines, lines[0]], "names a shard twice"),
        (lambda lines: lines[::-1], "names the shards in another order"),
        (lambda lines: [*lines, "../../../../etc/passwd"], "which is not a shard"),
        (lambda lines: [*lines, "val-000000.tar"], "which is not a shard of this split"),
    ],
)
def test_a_list_that_disagrees_with_the_manifest_is_named(
    root: LocalStore, child: str, edit: Callable[[list[str]], list[str]], words: str
) -> None:
    lines = root.read(f"{child}/train.urls").decode().splitlines()
    data = "".join(f"{line}\n" for line in edit(lines)).encode()
    rewrite(root, child, "train.urls", data)
    (problem,) = {p.problem for p in verify(root).problems if p.where == f"{child}/train.urls"}
    assert words in problem


def item(rows: list[Row], outcome: str) -> Row:
    return next(row for row in rows if row["outcome"] == outcome)


def lose_item(rows: list[Row]) -> None:
    rows.remove(item(rows, "sample"))


def move_item(rows: list[Row]) -> None:
    row = item(rows, "sample")
    others = {r["shard"] for r in rows} - {row["shard"], None}
    row["shard"] = sorted(others)[0]


def unshard_item(rows: list[Row]) -> None:
    item(rows, "sample")["shard"] = None


def other_bytes(rows: list[Row]) -> None:
    item(rows, "sample")["sha256"] = "0" * 64


def other_split(rows: list[Row]) -> None:
    row = item(rows, "sample")
    row["split"] = "val" if row["split"] != "val" else "test"


def another_item(rows: list[Row]) -> None:
    rows.append({**item(rows, "failed"), "key": "zzz"})


def failed_now(rows: list[Row]) -> None:
    item(rows, "sample").update(outcome="failed", shard=None)


def more_samples(rows: list[Row]) -> None:
    item(rows, "sample")["samples"] = 2


def out_of_order(rows: list[Row]) -> None:
    rows.reverse()


def twice(rows: list[Row]) -> None:
    rows.insert(1, rows[0])


def strange_outcome(rows: list[Row]) -> None:
    rows[0]["outcome"] = "lost"


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lose_item, "has no item '00.png', which is in shard val-"),
        (move_item, "has another shard of item '00.png' than the index of val-"),
        (unshard_item, "item '00.png' is a sample and names the shard None"),
        (other_bytes, "has another sha256 of item '00.png' than the index of val-"),
        (other_split, "has another split of item '00.png' than the index of val-"),
        (another_item, "item 'zzz' is not in its place (failed)"),
        (failed_now, "its summary has photographs "),
        (more_samples, "has another number of samples of item '00.png' than the index of"),
        (out_of_order, "row 1 is out of order"),
        (twice, "row 1 is out of order"),
        (strange_outcome, "has the outcome 'lost'"),
    ],
)
def test_a_table_of_sources_that_disagrees_with_the_shards_is_reported(
    root: LocalStore, child: str, edit: Callable[[list[Row]], None], words: str
) -> None:
    edit_table(root, child, "sources.parquet", edit)
    for depth in (Depth(), Depth(index_only=True)):
        result = verify(root, child, depth)
        assert any(words in p.problem for p in result.problems), result.problems
        assert all(p.where.startswith(child) for p in result.problems)


@pytest.mark.parametrize(
    ("table", "edit", "words"),
    [
        ("failures", lambda rows: rows.pop(), "is not in its place"),
        ("failures", lambda rows: rows.append(rows[0]), "is in more than one place"),
        ("failures", lambda rows: rows[0].update(kind="ignored"), "sources.parquet has failed"),
        ("failures", lambda rows: rows[0].update(kind=None), "sources.parquet has failed"),
        ("failures", lambda rows: rows[0].update(key="nobody"), "item 'nobody' is not in"),
        ("failures", lambda rows: rows[0].update(sha256="0" * 64), "has another sha256"),
        ("failures", lambda rows: rows[0].update(key="00.png"), "sources.parquet has sample"),
        ("duplicates", lambda rows: rows.clear(), "'copy.png' is not in its place"),
        ("duplicates", lambda rows: rows[0].update(kept="nobody"), "the kept item 'nobody'"),
    ],
)
def test_tables_that_disagree_are_reported(
    root: LocalStore, child: str, table: str, edit: Callable[[list[Row]], object], words: str
) -> None:
    edit_table(root, child, f"{table}.parquet", edit)
    result = verify(root, child, Depth(index_only=True))
    assert any(words in p.problem for p in result.problems), result.problems


@pytest.mark.parametrize(
    ("path", "words"),
    [
        (("listed",), "its summary has listed 999, its tables 31"),
        (("failed",), "its summary has failed 999, its tables 1"),
        (("splits", "train", "shards"), "its summary has 999 shards of train"),
        (("splits", "val", "samples"), "its summary has 999 samples of val"),
    ],
)
def test_a_summary_that_disagrees_is_reported(
    root: LocalStore, child: str, path: tuple[str, ...], words: str
) -> None:
    summary = manifest_of(root, child)["summary"]
    at = summary
    for name in path[:-1]:
        at = at[name]
    at[path[-1]] = 999
    change_manifest(root, child, summary=summary)
    assert reported(verify(root), f"{child}/manifest.json", words)


@pytest.mark.parametrize("summary", [{}, [], None, {"splits": 3}, {"splits": {"train": None}}])
def test_a_malformed_summary_is_reported(root: LocalStore, masks: str, summary: object) -> None:
    change_manifest(root, masks, summary=summary)
    words = "its summary" if isinstance(summary, dict) else "it is not a whole manifest"
    assert reported(verify(root), f"{masks}/manifest.json", words)


def test_the_bins_of_masks_are_counted(root: LocalStore, masks: str) -> None:
    summary = manifest_of(root, masks)["summary"]
    name = next(iter(summary["bins"]))
    summary["bins"][name] += 1
    change_manifest(root, masks, summary=summary)
    assert reported(verify(root), f"{masks}/manifest.json", f"4 evaluation masks with {name} hole")


@pytest.mark.parametrize("table", ["sources", "failures", "duplicates"])
@pytest.mark.parametrize("seed", range(4))
def test_a_damaged_table_is_named_without_a_traceback(
    root: LocalStore, child: str, table: str, seed: int
) -> None:
    rng, path = random.Random(seed), f"{table}.parquet"
    data = bytearray(root.read(f"{child}/{path}"))
    for _ in range(rng.choice((1, 5, 50))):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    rewrite(root, child, path, bytes(data))
    for problem in verify(root).problems:
        assert "/" in problem.where


@pytest.mark.parametrize("table", ["sources", "failures", "duplicates"])
def test_a_table_with_columns_of_other_types_is_named(
    root: LocalStore, child: str, table: str
) -> None:
    sink = io.BytesIO()
    names = ("key", "sha256", "kind", "kept", "split", "shard", "outcome", "samples")
    names = (*names, "width", "height")
    pq.write_table(pa.table({name: [[1.5]] for name in names}), sink)
    rewrite(root, child, f"{table}.parquet", sink.getvalue())
    assert reported(verify(root), f"{child}/{table}.parquet", "has a column 'key' of the type list")


def test_an_old_table_of_sources_is_noted_and_the_rest_is_checked(
    root: LocalStore, child: str
) -> None:
    table = pq.read_table(io.BytesIO(root.read(f"{child}/sources.parquet")))
    sink = io.BytesIO()
    pq.write_table(table.drop_columns(["shard", "outcome", "samples"]), sink)
    rewrite(root, child, "sources.parquet", sink.getvalue())
    result = verify(root)
    assert result.ok
    (note,) = result.notes
    assert note.startswith(f"{child}/sources.parquet was written by an earlier version of dpnet")


def test_a_missing_parent_is_reported(root: LocalStore, first: str, child: str) -> None:
    root.delete(f"{first}/manifest.json")
    result = verify(root, child)
    assert reported(result, f"{child}/manifest.json", "its input 'parent' does not exist")


def test_a_damaged_or_missing_inherited_shard_is_named(
    root: LocalStore, first: str, child: str
) -> None:
    paths = [f["path"] for f in manifest_of(root, child)["files"]]
    one, other = [p[3:] for p in paths if p.startswith("../") and p.endswith(".tar")][:2]
    top = child.rpartition("/")[0]
    data = bytearray(root.read(f"{top}/{one}"))
    data[700] ^= 1
    root.write(f"{top}/{one}", bytes(data))
    root.delete(f"{top}/{other}")
    result = verify(root, child)
    assert reported(result, f"{top}/{one}", "was altered: another sha256")
    assert reported(result, f"{top}/{other}", "is missing")


def test_an_inherited_shard_with_another_hash_than_in_its_own_version_is_reported(
    root: LocalStore, child: str
) -> None:
    files = manifest_of(root, child)["files"]
    file = next(f for f in files if f["path"].startswith("../"))
    file["sha256"] = "0" * 64
    change_manifest(root, child, files=files)
    words = f"names {file['path']}, but the version that made it differs"
    assert reported(verify(root), f"{child}/manifest.json", words)


def test_a_file_of_a_version_that_is_not_an_ancestor_is_reported(
    root: LocalStore, child: str, masks: str
) -> None:
    files = manifest_of(root, child)["files"]
    name = own_shards(root, masks)[0]
    stranger = next(f for f in manifest_of(root, masks)["files"] if f["path"] == f"{name}.tar")
    path = f"../../../{masks}/{name}.tar"
    change_manifest(root, child, files=[*files, stranger | {"path": path}])
    words = f"names {path}, but no ancestor made {masks}"
    assert reported(verify(root), f"{child}/manifest.json", words)


@pytest.mark.parametrize(
    "path",
    ["../../../../outside.tar", "/etc/passwd", "../../..", "a\\..\\b.tar", "x\0.tar", "..", ""],
)
def test_a_path_in_a_manifest_cannot_leave_the_root(
    root: LocalStore, child: str, path: str
) -> None:
    (root.folder.parent / "outside.tar").write_bytes(b"secret")
    files = manifest_of(root, child)["files"]
    record = {"path": path, "size": 6, "sha256": sha256_bytes(b"secret"), "content": False}
    change_manifest(root, child, files=[*files, record])
    result = verify(root)
    where = posixpath.dirname(child) if path == ".." else child if path == "" else ""
    assert reported(result, f"{child}/manifest.json", "was altered", "is not inside") or reported(
        result, where, "is missing"
    )


@pytest.mark.parametrize(
    "change",
    [
        {"path": 3},
        {"size": "6"},
        {"size": True},
        {"sha256": None},
        {"sha256": "../x"},
        {"content": "yes"},
        {"path": None},
    ],
)
def test_a_damaged_file_record_in_a_manifest_is_reported(
    root: LocalStore, child: str, change: Row
) -> None:
    manifest = manifest_of(root, child)
    manifest["files"][0] |= change
    root.write(f"{child}/manifest.json", json.dumps(manifest).encode())
    assert reported(verify(root), f"{child}/manifest.json", "was altered: it ")


def test_a_share_reads_the_same_shards_every_time_and_reports_the_unread_ones(
    root: LocalStore, masks: str
) -> None:
    result = verify(root, masks, Depth(share=0.3))
    total = len(own_shards(root, masks))
    assert (result.shards, result.tars, result.indexes) == (total, 2, 2)
    assert result.unread == 2 * (total - 2)
    assert result.ok
    text = result.as_text()
    assert "with the indexes of 2 and the tars of 2 of 6 shards; the other 8 files were" in text
    records = {f"{masks}/{n}.tar": FileRecord(f"{n}.tar", 1, "") for n in own_shards(root, masks)}
    read = {shard.tar for shard in chosen(shards_of(records), 0.3)}
    for key in records:
        data = bytearray(root.read(key))
        data[600] ^= 1
        root.write(key, bytes(data))
    found = {p.where for p in verify(root, masks, Depth(share=0.3)).problems}
    assert found == read
    assert chosen(shards_of(records), 0.6)[:2] == chosen(shards_of(records), 0.3)


def test_presence_and_size_of_unread_shards_are_checked(root: LocalStore, first: str) -> None:
    names = own_shards(root, first)
    root.delete(f"{first}/{names[0]}.tar")
    root.write(f"{first}/{names[1]}.tar", b"short")
    root.delete(f"{first}/{names[2]}.parquet")
    for depth in (Depth(share=1e-9), Depth(index_only=True)):
        result = verify(root, first, depth)
        assert reported(result, f"{first}/{names[0]}.tar", "is missing")
        assert reported(result, f"{first}/{names[1]}.tar", "it has 5 bytes, not")
        assert reported(result, f"{first}/{names[2]}.parquet", "is missing")


def test_index_only_reads_no_tar(root: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    real = LocalStore.open

    def recorded(self: LocalStore, key: str) -> Any:
        opened.append(key)
        return real(self, key)

    monkeypatch.setattr(LocalStore, "open", recorded)
    result = verify(root, depth=Depth(index_only=True))
    assert result.ok
    assert result.tars == 0
    assert result.indexes == result.shards
    assert opened
    assert not [key for key in opened if key.endswith(".tar")]


def edit_index(change: Row) -> Callable[[list[Row]], None]:
    return lambda rows: rows[1].update(change)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"offset": 513}, "its index has an offset that no sample can have"),
        ({"size": 1 << 40}, "its index"),
        ({"split": "val"}, "is of another split than its shard"),
        ({"relative_key": "nobody"}, "has no item 'nobody'"),
        ({"source_sha256": "0" * 64}, "has another sha256 of item"),
    ],
)
def test_an_impossible_index_is_reported_without_reading_the_tar(
    root: LocalStore, child: str, change: Row, words: str
) -> None:
    name = next(name for name in own_shards(root, child) if name.startswith("train"))
    edit_table(root, child, f"{name}.parquet", edit_index(change))
    result = verify(root, child, Depth(index_only=True))
    assert any(words in p.problem for p in result.problems), result.problems


def test_an_index_of_another_tar_is_reported_without_reading_the_tar(
    root: LocalStore, masks: str
) -> None:
    first, second = own_shards(root, masks)[:2]
    rewrite(root, masks, f"{first}.parquet", root.read(f"{masks}/{second}.parquet"))
    result = verify(root, masks, Depth(index_only=True))
    assert reported(result, f"{masks}/{first}.tar", "has another sha256 than its index says")


def test_two_shards_with_one_name_are_reported(root: LocalStore, masks: str) -> None:
    files = manifest_of(root, masks)["files"]
    file = next(f for f in files if f["path"] == "train-000000.tar")
    root.write(f"{masks}/more/train-000000.tar", root.read(f"{masks}/train-000000.tar"))
    change_manifest(root, masks, files=[*files, file | {"path": "more/train-000000.tar"}])
    assert reported(verify(root), f"{masks}/manifest.json", "names 2 shards train-000000")


def test_a_stage_without_whole_shards_is_reported(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)

    def build(work: Any) -> Produced:
        return Produced([write_file(work, "train-000000.tar", b"no tar")], {})

    run_stage(store, Request("images", "x", "images/x", {}), build)
    problems = {problem.problem for problem in verify(store).problems}
    assert {"its index is not in the manifest", "its index is missing"} <= problems
    assert "its summary does not name the splits" in problems


def test_sets_on_s3_are_checked_too(root: LocalStore, masks: str, moto_root: str) -> None:
    far = open_store(moto_root)
    for entry in root.list():
        far.write(entry.key, root.read(entry.key))
    assert verify(far).problems == []
    key = f"{masks}/eval-000000.tar"
    data = bytearray(far.read(key))
    data[550] ^= 1
    far.write(key, bytes(data))
    assert reported(verify(far), key, "sample eval-00000000: eval-00000000.png has another sha256")
    far.write(key, bytes(data[:-700]))
    assert reported(verify(far), key, "is truncated")
    far.delete(key)
    assert reported(verify(far), key, "is missing")
