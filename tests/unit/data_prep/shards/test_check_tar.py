"""Checks of a shard find every kind of damage, at seeded random places."""

from __future__ import annotations

import io
import json
import random
import tarfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import small_root

from data_prep.core.manifest import FileRecord, read_manifest
from data_prep.core.storage.local import LocalStore
from data_prep.shards.check_tar import MOST, check_shard
from data_prep.shards.shards import Folder, TarWriter, encode_table, write_shard

BLOCK = 512
SEEDS = range(6)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[LocalStore, str, str]:
    """Make a root with real images and masks; return their folders."""
    store = LocalStore(tmp_path_factory.mktemp("built"))
    images, masks = small_root.real_data(store)
    return store, images.folder, masks.folder


class Shard:
    """A copy of a committed shard that a test may damage."""

    def __init__(self, store: LocalStore, folder: str, name: str, to: LocalStore) -> None:
        self.store, self.key = to, f"{folder}/{name}.tar"
        self.index_key = f"{folder}/{name}.parquet"
        for key in (self.key, self.index_key):
            to.write(key, store.read(key))
        files = read_manifest(store, folder).files
        self.record = next(f for f in files if f.path == f"{name}.tar")

    def check(self) -> list[str]:
        return check_shard(self.store, self.key, self.record)

    def plain(self) -> list[str]:
        """Return the problems without a manifest."""
        return check_shard(self.store, self.key)

    @property
    def data(self) -> bytes:
        return self.store.read(self.key)

    @data.setter
    def data(self, data: bytes) -> None:
        self.store.write(self.key, data)

    def members(self) -> list[tarfile.TarInfo]:
        with tarfile.open(fileobj=io.BytesIO(self.data)) as tar:
            return tar.getmembers()

    def pieces(self) -> list[bytes]:
        """Return the members with their headers, in the order of the tar."""
        return [
            self.data[m.offset : m.offset_data + m.size + -m.size % BLOCK] for m in self.members()
        ]

    def join(self, pieces: list[bytes]) -> None:
        self.data = b"".join(pieces) + bytes(2 * BLOCK)

    def index(self) -> pa.Table:
        return pq.read_table(io.BytesIO(self.store.read(self.index_key)))

    def write_index(self, rows: list[dict[str, object]]) -> None:
        old = self.index().schema
        columns = {field.name: str(field.type) for field in old}
        self.store.write(self.index_key, encode_table(rows, columns, old.metadata))

    def flip(self, at: int, bit: int = 0) -> None:
        data = bytearray(self.data)
        data[at] ^= 1 << bit
        self.data = bytes(data)


@pytest.fixture(params=["images", "masks"])
def shard(
    request: pytest.FixtureRequest, built: tuple[LocalStore, str, str], tmp_path: Path
) -> Shard:
    """Return a shard with at least four samples."""
    store, images, masks = built
    if request.param == "images":
        return Shard(store, images, "train-000000", LocalStore(tmp_path))
    return Shard(store, masks, "eval-000000", LocalStore(tmp_path))


def key_of(member: tarfile.TarInfo) -> str:
    return member.name.partition(".")[0]


def reported(problems: list[str], *words: str) -> bool:
    """Return whether one of the problems has all the words."""
    return any(all(word in problem for word in words) for problem in problems)


def test_a_whole_shard_is_clean_with_and_without_a_manifest(shard: Shard) -> None:
    assert len(shard.members()) >= 8
    assert shard.check() == []
    assert shard.plain() == []


@pytest.mark.parametrize("seed", SEEDS)
def test_a_byte_flipped_in_a_payload_names_the_sample_and_its_file(shard: Shard, seed: int) -> None:
    rng = random.Random(seed)
    member = rng.choice([m for m in shard.members() if not m.name.endswith(".json")])
    shard.flip(member.offset_data + rng.randrange(member.size), rng.randrange(8))
    first, *rest = shard.check()
    assert first == "was altered: another sha256"
    assert rest == [
        "has another sha256 than its index says",
        f"sample {key_of(member)}: {member.name} has another sha256 than its index says",
    ]
    assert shard.plain() == rest


@pytest.mark.parametrize("seed", range(12))
def test_a_byte_flipped_in_a_sidecar_names_the_sample_and_its_file(shard: Shard, seed: int) -> None:
    rng = random.Random(seed)
    member = rng.choice([m for m in shard.members() if m.name.endswith(".json")])
    start = member.offset_data
    sidecar = json.loads(shard.data[start : start + member.size])
    before = (sidecar.get("original_width", 0), sidecar.get("original_height", 0))
    shard.flip(start + rng.randrange(member.size), rng.randrange(8))
    problems = check_shard(
        shard.store, shard.key, shard.record, lambda key: before if before[0] else None
    )
    assert reported(problems, f"sample {key_of(member)}: {member.name} ")
    assert len(problems) <= 5


@pytest.mark.parametrize("seed", range(12))
def test_a_byte_flipped_in_a_header_names_the_sample_and_nothing_else(
    shard: Shard, seed: int
) -> None:
    rng = random.Random(seed)
    member = rng.choice(shard.members())
    shard.flip(member.offset + rng.randrange(BLOCK), rng.randrange(8))
    what = member.name if member.name.endswith(".json") else "payload"
    assert shard.plain() == [
        "has another sha256 than its index says",
        f"sample {key_of(member)}: bad header of its {what}, at byte {member.offset}",
    ]


@pytest.mark.parametrize("seed", range(12))
def test_any_flipped_byte_of_the_tar_is_noticed(shard: Shard, seed: int) -> None:
    rng = random.Random(seed)
    shard.flip(rng.randrange(len(shard.data)), rng.randrange(8))
    assert len(shard.plain()) >= 2  # the hash, and the place if it is known


def test_a_changed_byte_of_padding_names_the_member_before_it(shard: Shard) -> None:
    member = next(m for m in shard.members() if m.size % BLOCK)
    shard.flip(member.offset_data + member.size)
    assert reported(shard.check(), f"sample {key_of(member)}: the padding after", member.name)


def test_a_header_of_zeros_is_a_bad_header_and_not_the_end(shard: Shard) -> None:
    member = shard.members()[2]
    data = shard.data
    shard.data = data[: member.offset] + bytes(BLOCK) + data[member.offset_data :]
    assert shard.plain()[1:] == [
        f"sample {key_of(member)}: bad header of its payload, at byte {member.offset}"
    ]


@pytest.mark.parametrize("seed", SEEDS)
def test_a_truncated_tar_is_reported_with_its_missing_samples(shard: Shard, seed: int) -> None:
    rng = random.Random(seed)
    member = rng.choice(shard.members()[:-2])
    cut = member.offset_data + rng.randrange(member.size)
    shard.data = shard.data[:cut]
    problems = shard.check()
    assert problems[0] == f"was altered: it has {cut} bytes, not {shard.record.size}"
    name = f"inside {member.name} of sample {key_of(member)}"
    assert f"is truncated: it ends at byte {cut}, {name}" in problems
    assert reported(problems, "samples of the index are missing")


@pytest.mark.parametrize("cut", [BLOCK, 2 * BLOCK, 100])
def test_a_truncated_end_mark_is_reported(shard: Shard, cut: int) -> None:
    shard.data = shard.data[:-cut]
    problems = shard.plain()
    assert reported(problems, "is truncated")
    assert len(problems) == 3


@pytest.mark.parametrize("seed", SEEDS)
def test_a_missing_sample_is_named(shard: Shard, seed: int) -> None:
    number = random.Random(seed).randrange(len(shard.members()) // 2)
    key = key_of(shard.members()[2 * number])
    pieces = shard.pieces()
    shard.join(pieces[: 2 * number] + pieces[2 * number + 2 :])
    assert reported(shard.plain(), f"1 samples of the index are missing: {key}")


@pytest.mark.parametrize("seed", SEEDS)
def test_a_missing_member_is_named_and_the_following_ones_are_not(shard: Shard, seed: int) -> None:
    number = random.Random(seed).randrange(len(shard.members()))
    member = shard.members()[number]
    pieces = shard.pieces()
    shard.join(pieces[:number] + pieces[number + 1 :])
    problems = shard.check()
    what = member.name if member.name.endswith(".json") else "its payload"
    assert f"sample {key_of(member)}: {what} is missing" in problems
    assert len(problems) <= 5


@pytest.mark.parametrize("seed", SEEDS)
def test_an_extra_member_is_named(shard: Shard, seed: int) -> None:
    number = random.Random(seed).randrange(len(shard.members()) // 2)
    key = key_of(shard.members()[2 * number])
    file = io.BytesIO()
    TarWriter(file).add(key, {"txt": b"more"})
    pieces = shard.pieces()
    shard.join([*pieces[: 2 * number + 2], file.getvalue(), *pieces[2 * number + 2 :]])
    assert f"sample {key}: {key}.txt is not a member of a sample" in shard.plain()


def test_an_extra_sample_is_named(shard: Shard) -> None:
    file = io.BytesIO()
    TarWriter(file).add("stranger", {"jpg": b"x", "json": b"{}"})
    shard.join([*shard.pieces()[:4], file.getvalue(), *shard.pieces()[4:]])
    assert "sample stranger is not in the index" in shard.plain()


def test_a_duplicate_member_is_named(shard: Shard) -> None:
    pieces, member = shard.pieces(), shard.members()[2]
    shard.join([*pieces[:3], pieces[2], *pieces[3:]])
    assert f"sample {key_of(member)}: the tar has {member.name} twice" in shard.plain()


@pytest.mark.parametrize("seed", SEEDS)
def test_samples_that_changed_places_are_named(shard: Shard, seed: int) -> None:
    pieces, members = shard.pieces(), shard.members()
    first, second = sorted(random.Random(seed).sample(range(len(members) // 2), 2))
    pairs = [pieces[i : i + 2] for i in range(0, len(pieces), 2)]
    pairs[first], pairs[second] = pairs[second], pairs[first]
    shard.join([piece for pair in pairs for piece in pair])
    here, there = key_of(members[2 * second]), key_of(members[2 * first])
    assert reported(
        shard.plain(), f"another order than in the index: sample {here} in place of {there}"
    )


def test_members_of_a_sample_that_changed_places_are_named(shard: Shard) -> None:
    pieces, member = shard.pieces(), shard.members()[4]
    pieces[4], pieces[5] = pieces[5], pieces[4]
    shard.join(pieces)
    key = key_of(member)
    assert f"sample {key}: {key}.json comes before {member.name}" in shard.plain()


def test_a_sample_with_separated_members_is_named(shard: Shard) -> None:
    pieces, key = shard.pieces(), key_of(shard.members()[1])
    shard.join([pieces[0], *pieces[2:], pieces[1]])
    assert f"sample {key}: its members are not together" in shard.plain()


@pytest.mark.parametrize("garbage", [b"x", bytes(BLOCK), b"garbage" * 1000])
def test_bytes_after_the_end_are_reported(shard: Shard, garbage: bytes) -> None:
    shard.data += garbage
    assert f"{len(garbage)} bytes follow the mark of its end" in shard.plain()


def test_a_second_tar_after_the_end_is_reported(shard: Shard) -> None:
    end = len(shard.data) - 2 * BLOCK
    shard.data += shard.data
    problems = shard.plain()
    assert reported(problems, f"the mark of its end is at byte {end}, before a member")
    assert reported(problems, "its members are not together")


@pytest.mark.parametrize("lost", [1, 60, BLOCK, 700])
@pytest.mark.parametrize("seed", range(3))
def test_lost_bytes_in_a_payload_do_not_hide_the_following_samples(
    shard: Shard, lost: int, seed: int
) -> None:
    members = shard.members()
    lost = min(lost, max(m.size for m in members) // 2)
    payloads = [m for m in members if not m.name.endswith(".json") and m.size > lost]
    member = random.Random(seed).choice(payloads)
    data = shard.data
    shard.data = data[: member.offset_data] + data[member.offset_data + lost :]
    problems = shard.plain()
    assert reported(problems, f"sample {key_of(member)}: {member.name}")
    assert not reported(problems, "samples of the index are missing") or member is payloads[-1]
    assert len(problems) <= 9


def edit_number(name: str) -> Callable[[list[dict[str, object]], int], None]:
    def edit(rows: list[dict[str, object]], row: int) -> None:
        value = rows[row][name]
        assert isinstance(value, int)
        rows[row][name] = value + 512

    return edit


def edit_sha256(rows: list[dict[str, object]], row: int) -> None:
    rows[row]["sha256"] = str(rows[row]["sha256"])[::-1]


def edit_width(rows: list[dict[str, object]], row: int) -> None:
    rows[row]["width"] = 7


def remove_row(rows: list[dict[str, object]], row: int) -> None:
    del rows[row]


def repeat_row(rows: list[dict[str, object]], row: int) -> None:
    rows.insert(row, rows[row])


INDEX_EDITS = {
    "offset": (edit_number("offset"), "is at byte"),
    "size": (edit_number("size"), "bytes, its index says"),
    "sha256": (edit_sha256, "has another sha256 than its index says"),
    "width": (edit_width, "has another 'width' than its index"),
    "removed": (remove_row, "is not in the index"),
    "repeated": (repeat_row, "is in the index twice"),
}


@pytest.mark.parametrize("what", INDEX_EDITS)
@pytest.mark.parametrize("seed", range(3))
def test_an_index_that_disagrees_names_the_sample(shard: Shard, what: str, seed: int) -> None:
    rows = shard.index().to_pylist()
    edit, words = INDEX_EDITS[what]
    number = random.Random(seed).randrange(len(rows))
    key = rows[number]["key"]
    edit(rows, number)
    shard.write_index(rows)
    problems = shard.check()
    assert reported(problems, f"sample {key}", words)
    assert all(key in p or p.startswith("it has ") for p in problems)


def test_a_key_changed_in_the_index_names_both(shard: Shard) -> None:
    rows = shard.index().to_pylist()
    key, rows[1]["key"] = rows[1]["key"], "other"
    shard.write_index(rows)
    problems = shard.check()
    assert f"sample {key} is not in the index" in problems
    assert "1 samples of the index are missing: other" in problems


def test_rows_that_changed_places_are_named(shard: Shard) -> None:
    rows = shard.index().to_pylist()
    rows[1], rows[2] = rows[2], rows[1]
    shard.write_index(rows)
    (problem,) = shard.check()
    keys = f"sample {rows[2]['key']} in place of {rows[1]['key']}"
    assert problem == f"another order than in the index: {keys}"


@pytest.mark.parametrize(
    ("mark", "value", "words"),
    [
        (b"tar_sha256", b"0" * 64, "has another sha256 than its index says"),
        (b"tar_size", b"1", "its index says '1'"),
    ],
)
def test_wrong_metadata_of_an_index_are_reported(
    shard: Shard, mark: bytes, value: bytes, words: str
) -> None:
    table = shard.index()
    metadata = {**table.schema.metadata, mark: value}
    sink = io.BytesIO()
    pq.write_table(table.replace_schema_metadata(metadata), sink)
    shard.store.write(shard.index_key, sink.getvalue())
    assert reported(shard.check(), words)


def test_an_index_without_metadata_or_columns_is_reported(shard: Shard) -> None:
    shard.store.write(shard.index_key, encode_table([{"key": "a"}]))
    problems = shard.check()
    assert reported(problems, "row 0 of its index, of sample 'a', is not whole")
    assert reported(problems, "has another sha256 than its index says")


@pytest.mark.parametrize("seed", range(20))
def test_a_damaged_index_is_reported_without_a_traceback(shard: Shard, seed: int) -> None:
    rng, data = random.Random(seed), bytearray(shard.store.read(shard.index_key))
    for _ in range(rng.choice((1, 1, 3, 50))):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    shard.store.write(shard.index_key, bytes(data[: rng.choice((len(data), len(data) // 2))]))
    check_shard(shard.store, shard.key)


def test_a_missing_index_is_reported_and_the_tar_is_still_read(shard: Shard) -> None:
    shard.store.delete(shard.index_key)
    assert shard.check() == ["its index is missing"]
    shard.join(shard.pieces()[1:])
    key = key_of(shard.members()[0])
    assert f"sample {key}: its payload is missing" in shard.plain()


def test_an_index_with_too_many_rows_is_not_read(shard: Shard) -> None:
    sink = io.BytesIO()
    pq.write_table(pa.table({"key": pa.array([""]).take(pa.array([0] * 1_000_001))}), sink)
    shard.store.write(shard.index_key, sink.getvalue())
    assert "its index has 1000001 rows, more than a shard can have" in shard.check()


def test_a_missing_tar_is_reported(shard: Shard) -> None:
    shard.store.delete(shard.key)
    assert shard.check() == ["is missing"]


def test_an_empty_tar_and_a_tar_of_noise_are_reported(shard: Shard) -> None:
    shard.data = b""
    assert reported(shard.plain(), "is truncated: it ends at byte 0")
    shard.data = random.Random(0).randbytes(100_000)
    assert reported(shard.plain(), "samples of the index are missing")


@pytest.mark.parametrize("name", ["../../etc/passwd.jpg", "/a.jpg", "a b.jpg", "\x1b[2J.jpg", "a"])
def test_a_member_with_an_impossible_name_is_reported(shard: Shard, name: str) -> None:
    info = tarfile.TarInfo(name)
    shard.join([info.tobuf(tarfile.USTAR_FORMAT), *shard.pieces()])
    problems = shard.plain()
    assert f"member {name!r}, at byte 0: no shard has such a header" in problems
    assert not any("\x1b" in problem for problem in problems)


@pytest.mark.parametrize("change", [{"mtime": 5}, {"uname": "me"}, {"type": tarfile.SYMTYPE}])
def test_a_header_with_a_time_an_owner_or_another_type_is_reported(
    shard: Shard, change: dict[str, object]
) -> None:
    pieces, member = shard.pieces(), shard.members()[0]
    info = tarfile.TarInfo(member.name)
    info.size = member.size
    for field, value in change.items():
        setattr(info, field, value)
    pieces[0] = info.tobuf(tarfile.USTAR_FORMAT) + pieces[0][BLOCK:]
    shard.join(pieces)
    assert reported(shard.plain(), f"member {member.name!r}, at byte 0: no shard has such a header")


def test_a_header_with_a_size_beyond_the_end_is_reported(shard: Shard) -> None:
    info = tarfile.TarInfo("huge.jpg")
    info.size = 8**11 - 1
    shard.join([*shard.pieces(), info.tobuf(tarfile.USTAR_FORMAT)])
    assert reported(shard.plain(), "is truncated", "inside huge.jpg of sample huge")


def large(tmp_path: Path, count: int) -> tuple[Folder, FileRecord]:
    """Write a shard with payloads of 0, 700, 1400, … bytes."""
    place, rng = Folder(LocalStore(tmp_path), "images/x/0123"), random.Random(0)
    rows = [{"width": 4, "split": "train"} for _ in range(count)]
    samples = (
        (
            f"k{n}",
            {"png": rng.randbytes(n * 700), "json": json.dumps({"key": f"k{n}", **row}).encode()},
            row,
        )
        for n, row in enumerate(rows)
    )
    return place, write_shard(place, "train-000000", samples)[0]


def test_a_list_of_problems_is_limited(tmp_path: Path) -> None:
    place, tar = large(tmp_path, 50)
    data = bytearray(place.store.read(place.key(tar.path)))
    for at in range(40 * 700 * 5, len(data) - 2000, 7000):
        data[at] ^= 1
    place.store.write(place.key(tar.path), bytes(data))
    problems = check_shard(place.store, place.key(tar.path), tar)
    assert len(problems) == MOST + 3
    assert problems[-1].startswith("and ")


def test_a_large_shard_is_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place, tar = large(tmp_path, 20)
    for size in (1000, 4096, 1 << 20):
        monkeypatch.setattr("data_prep.shards.tar_members._CHUNK", size)
        assert check_shard(place.store, place.key(tar.path), tar) == []
