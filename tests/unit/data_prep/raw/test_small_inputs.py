"""Small files that would fill the memory: a source reads them in bounded memory, or refuses them.

The memory is that of a process of its own. The limits are far above what the readers need, and far
below what the files would take.
"""

from __future__ import annotations

import gzip
import io
import json
import random
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from memory import growth
from raw_places import contents

from data_prep.core.errors import ItemError, PipelineError
from data_prep.raw import folders, members, tables
from data_prep.raw.source import open_source

MOST_MB = 200
ROWS = 120
LARGE = b"x" * (3 << 20)  # so many rows of it take 360 MB

IMPORTS = """
import pyarrow.compute, pyarrow.parquet, numpy
from data_prep.core.errors import ItemError, PipelineError
from data_prep.raw.source import open_source
"""
# Print how many of the first 20 items can be read, and a failure.
READ = """
source = open_source(sys.argv[1])
good, first = 0, ""
try:
    listing = source.list()
    first = max(listing.problems.values(), key=lambda text: "too long" in text, default="")
    with source.reader() as reader:
        for item in [*listing.items()][:20]:
            try:
                good += len(reader.read(item, 32 << 20)) > 0
            except ItemError as error:
                first = first or str(error)
except PipelineError as error:
    first = str(error)
print(good, first)
"""


def table(columns: dict[str, Any], **options: Any) -> bytes:
    into = io.BytesIO()
    pq.write_table(pa.table(columns), into, compression="zstd", **options)
    return into.getvalue()


def repeated() -> bytes:
    shared = {"dictionary_pagesize_limit": 1 << 30}
    return table({"image": pa.array([LARGE] * ROWS, pa.binary())}, **shared)


def repeated_in_a_struct() -> bytes:
    column = pa.StructArray.from_arrays(
        [pa.array([LARGE] * ROWS, pa.binary()), pa.array(list(map(str, range(ROWS))))],
        ["bytes", "path"],
    )
    return table({"image": column}, dictionary_pagesize_limit=1 << 30)


def differences() -> bytes:
    options = {"use_dictionary": False, "column_encoding": {"image": "DELTA_BYTE_ARRAY"}}
    return table({"image": pa.array([LARGE] * ROWS, pa.binary())}, **options)


def shrunk() -> bytes:
    return table({"image": pa.array([bytes(1 << 20)] * 60, pa.binary())}, use_dictionary=False)


def keys_repeated() -> bytes:
    keys = [LARGE.decode()] * ROWS
    photos = pa.array([b"1"] * ROWS, pa.binary())
    return table({"image": photos, "key": keys}, dictionary_pagesize_limit=1 << 30)


def keys_of_differences() -> bytes:
    keys = [f"{LARGE.decode()}{number}" for number in range(ROWS)]
    options = {"use_dictionary": False, "column_encoding": {"key": "DELTA_BYTE_ARRAY"}}
    return table({"image": pa.array([b"1"] * ROWS, pa.binary()), "key": keys}, **options)


def directory_of_a_gigabyte(path: Path) -> None:
    """Write a zip with one entry and a directory that is a hole in the file."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("1.jpg", b"1")
    whole = path.read_bytes()
    end = whole.rindex(b"PK\5\6")
    fields = list(struct.unpack("<4s4H2LH", whole[end : end + 22]))
    size = 900 << 20
    begin, fields[5] = int(fields[6]), size
    with path.open("r+b") as file:
        file.truncate(begin + size)
        file.seek(begin + size)
        file.write(struct.pack("<4s4H2LH", *fields))


def extended_headers() -> bytes:
    """Return a tar.gz of 300 MB of extended headers, all of them for one member."""
    into = io.BytesIO()
    with gzip.GzipFile(fileobj=into, mode="wb", compresslevel=1) as file:
        for number in range(300):
            value = f"{number:03d}={'x' * ((1 << 20) - 20)}\n"
            file.write(header("pax", len(value) + 8, tarfile.XHDTYPE))
            file.write(padded(f"{len(value) + 8:07d} {value}".encode()))
        file.write(header("1.jpg", 1) + padded(b"1") + bytes(1024))
    return into.getvalue()


def long_names() -> bytes:
    """Return a tar.gz of 300 members with names of a megabyte."""
    into = io.BytesIO()
    with gzip.GzipFile(fileobj=into, mode="wb", compresslevel=1) as file:
        for number in range(300):
            name = b"%03d" % number + b"x" * ((1 << 20) - 8)
            file.write(header("long", len(name), tarfile.GNUTYPE_LONGNAME) + padded(name))
            file.write(header("1.jpg", 1) + padded(b"1"))
    return into.getvalue()


def names(kind: bytes = tarfile.REGTYPE) -> bytes:
    """Return a tar.gz of 40,000 members with names of 4 KB; small as it is, 20,000 fit."""
    into = io.BytesIO()
    with gzip.GzipFile(fileobj=into, mode="wb", compresslevel=6) as file:
        file.write(b"".join(header(f"{number}.jpg", 1) + padded(b"1") for number in range(20)))
        for number in range(40_000):
            name = b"%06d" % number + b"x" * 4080
            file.write(header("long", len(name), tarfile.GNUTYPE_LONGNAME) + padded(name))
            file.write(header("1.jpg", 0, kind))
    return into.getvalue()


def links() -> bytes:
    return names(tarfile.SYMTYPE)


def header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info.tobuf(tarfile.USTAR_FORMAT)


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 512)


def one_line(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(300 << 20)


CASES: dict[str, tuple[str, Callable[[], bytes] | Callable[[Path], None], str]] = {
    # name: the file, its maker, what a reading of it prints
    "nulls": (
        "a.parquet",
        lambda: table({"image": pa.nulls(3_000_000, pa.binary())}),
        "0 PATH cannot be used: it has 3000000 members or more in",
    ),
    "repeated": ("a.parquet", repeated, "20 "),
    "repeated in a struct": ("a.parquet", repeated_in_a_struct, "20 "),
    "differences": ("a.parquet", differences, "20 "),
    "shrunk": ("a.parquet", shrunk, "0 its part of the table grows from"),
    "keys repeated": ("a.parquet", keys_repeated, "20"),
    "keys of differences": ("a.parquet", keys_of_differences, "20"),
    "zip directory": (
        "a.zip",
        directory_of_a_gigabyte,
        "0 PATH cannot be used: its directory is broken",
    ),
    "extended headers": ("a.tar.gz", extended_headers, "1 "),
    "long names": (
        "a.tar.gz",
        long_names,
        "0 PATH cannot be used: the name of a member",
    ),
    "names": ("a.tar.gz", names, "1 the names of its members are too long"),
    "links": ("a.tar.gz", links, "1 the names of its members are too long"),
    "text line": ("a.txt", one_line, "0 PATH: line 1 is longer than 1048576 characters"),
    "csv line": ("a.csv", one_line, "0 PATH: line 1 is longer than 1048576 characters"),
    "json line": ("a.jsonl", one_line, "0 PATH: line 1 is longer than 1048576 characters"),
}


@pytest.mark.slow
@pytest.mark.rotated(3)
@pytest.mark.parametrize("case", CASES)
def test_a_small_file_takes_little_memory(case: str, tmp_path: Path) -> None:
    name, make, expected = CASES[case]
    path = tmp_path / name
    made = make(path) if name.endswith((".zip", ".txt", ".csv", ".jsonl")) else make()  # type: ignore[call-arg, arg-type]
    if made is not None:
        path.write_bytes(made)
        assert len(made) < 10 << 20
    megabytes, printed = growth(IMPORTS, READ, path)
    assert printed.replace(str(path), "PATH").startswith(expected.strip())
    assert megabytes < MOST_MB


def refusal(path: Path) -> str:
    """Return the error of the source in one line, with PATH for its address."""
    with pytest.raises(PipelineError) as caught:
        open_source(str(path)).list()
    return str(caught.value).replace(str(path), "PATH")


def test_a_container_may_have_as_many_members_as_photos_can_be_in_it(tmp_path: Path) -> None:
    into = io.BytesIO()
    with gzip.GzipFile(fileobj=into, mode="wb") as file:
        for number in range(20_000):
            file.write(header(f"{number}.jpg", 0))
        file.write(bytes(1024))
    path = tmp_path / "a.tar.gz"
    path.write_bytes(into.getvalue())
    most = members.most_members(len(into.getvalue()))
    assert 4096 < most < 20_000
    listing = open_source(str(path)).list()
    assert len(listing) == most + 1  # the last one is the archive with its problem
    (problem,) = (text for text in listing.problems.values() if "members" in text)
    assert problem.endswith(f"and {most} are allowed, so they cannot be photos")
    rows = [str(number).encode() for number in range(members.most_members(0))]
    path = tmp_path / "a.parquet"
    path.write_bytes(table({"image": pa.array(rows, pa.binary())}))
    assert len(open_source(str(path)).list()) == len(rows)


def test_many_equal_names_are_numbered_in_a_few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = 0

    def counted(name: str) -> int:
        nonlocal steps
        steps += 1
        return hash(name)

    monkeypatch.setattr(folders, "hash", counted, raising=False)
    names = folders._Unique()
    found = [names.add(name) for name in ["a", "a#3", "a", "a", "a", *["b.c"] * 1000]]
    assert found[:5] == ["a", "a#3", "a#2", "a#4", "a#5"]
    assert found[5:] == ["b.c", *(f"b#{number}.c" for number in range(2, 1001))]
    assert steps < 5000


def test_repeated_and_other_rows_of_a_table_keep_their_bytes(tmp_path: Path) -> None:
    noise = random.Random(0)
    few = [noise.randbytes(3000) for _ in range(5)]
    photos = [few[number % 5] for number in range(60)]
    photos += [noise.randbytes(3000) for _ in range(60)]  # too many for the dictionary
    names = [f"{number}.jpg" for number in range(120)]
    for encoding in (None, "PLAIN", "DELTA_BYTE_ARRAY", "DELTA_LENGTH_BYTE_ARRAY"):
        options: dict[str, Any] = {"dictionary_pagesize_limit": 100_000, "write_batch_size": 8}
        if encoding:
            options = {"use_dictionary": False}
            options["column_encoding"] = {"image": encoding, "key": encoding}
        columns = {"image": pa.array(photos, pa.binary()), "key": pa.array(names)}
        (tmp_path / "a.parquet").write_bytes(table(columns, row_group_size=70, **options))
        found = contents(open_source(str(tmp_path / "a.parquet")))
        assert found == dict(zip(names, photos, strict=True)), encoding


def test_large_row_groups_of_each_encoding_are_read_in_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "_HELD", 20_000)
    test_repeated_and_other_rows_of_a_table_keep_their_bytes(tmp_path)


def test_a_part_that_grows_too_much_leaves_the_others_readable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "_HELD", 20_000)
    photos = [random.Random(n).randbytes(3000) if n < 20 else bytes(3000) for n in range(40)]
    options = {"use_dictionary": False, "write_statistics": False, "row_group_size": 20}
    (tmp_path / "a.parquet").write_bytes(table({"image": pa.array(photos, pa.binary())}, **options))
    source = open_source(str(tmp_path / "a.parquet"))
    with source.reader() as reader:
        items = [*source.list().items()]
        for row in (0, 30, 1, 31, 2):
            if row < 20:
                assert reader.read(items[row], 10_000) == photos[row]
            else:
                with pytest.raises(ItemError, match="more than 100 times"):
                    reader.read(items[row], 10_000)


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("a.csv", "path" + "," * (1 << 20), "line 1 is longer than 1048576 characters"),
        ("a.csv", "path\na\n" + ',"\n"' * 400_000, "is longer than 1048576 characters"),
        ("a.jsonl", '{"path": "a"}\n' + "[" * 200_000, "line 2 is not a JSON object"),
        ("a.jsonl", json.dumps({"path": "a" * 4097}), "a path has more than 4096 characters"),
        ("a.txt", f"ok\n{'a' * 4097}\n", "line 2 of PATH: a path has more than 4096 characters"),
        ("a.txt", f"ok\n{'a' * (2 << 20)}", "line 2 is longer than 1048576 characters"),
    ],
)
def test_a_list_with_a_too_long_entry_is_refused(
    name: str, text: str, reason: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_text(text)
    assert reason in refusal(tmp_path / name)
    assert len(refusal(tmp_path / name)) < 300


def test_a_csv_row_may_have_several_lines(tmp_path: Path) -> None:
    rows = ["path,text", *(f'{number}.jpg,"a\nb"' for number in range(200_000))]
    text = "\n".join(rows)
    assert len(text) > 2 * (1 << 20)
    (tmp_path / "a.csv").write_text(text)
    assert len(open_source(str(tmp_path / "a.csv")).list()) == 200_000
