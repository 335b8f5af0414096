"""Parquet tables as raw sources. S3 is moto's server, or Ceph in slow tests."""

from __future__ import annotations

import io
import random
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from raw_places import LIMIT, Place, by_name, contents, keys, open_and_list, place

from data_prep.core.errors import ItemError, PipelineError
from data_prep.images.keys import PHOTO, item_kinds
from data_prep.raw import tables as tables_module
from data_prep.raw.listing import Item
from data_prep.raw.source import open_source

__all__ = ["place"]
STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def packed(columns: dict[str, Any], rows_in_group: int = 1000) -> bytes:
    into = io.BytesIO()
    pq.write_table(pa.table(columns), into, row_group_size=rows_in_group)
    return into.getvalue()


def hugging_face(names: Sequence[str | None]) -> bytes:
    rows = [{"bytes": str(number).encode(), "path": name} for number, name in enumerate(names)]
    return packed({"image": pa.array(rows, STRUCT), "label": list(range(len(rows)))}, 2)


def test_rows_of_a_table_in_a_folder_are_items(place: Place) -> None:
    place.put("data/a.parquet", hugging_face(["x.jpg", "y/z.jpg", "w.jpg"]))
    place.put("data/b.parquet", packed({"jpg": [b"B"], "key": ["x.jpg"]}))
    source = open_source(place.uri)
    expected = {
        "data/a.parquet/x.jpg": b"0",
        "data/a.parquet/y/z.jpg": b"1",
        "data/a.parquet/w.jpg": b"2",
        "data/b.parquet/x.jpg": b"B",
    }
    assert contents(source) == expected
    assert contents(source, by_name) == expected
    places = {item.key: (item.offset, item.block) for item in source.list().items()}
    assert places["data/a.parquet/w.jpg"] == (2, 1)  # row and row group


def test_a_table_is_a_source_and_is_not_opened_again_if_unchanged(place: Place) -> None:
    source = open_source(place.put("set.parquet", hugging_face(["b.jpg", "a.jpg"])))
    listing = source.list()
    assert contents(source) == {"a.jpg": b"1", "b.jpg": b"0"}
    first = [Item(item.key, 99, item.fingerprint) for item in listing.items()]
    again = source.list(
        lambda *requested: first if requested == ("", first[0].fingerprint) else None
    )
    assert [item.size for item in again.items()] == [99, 99]  # from the earlier listing


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary()])
@pytest.mark.parametrize("name", ["image", "JPG", "content", "only_one"])
def test_the_column_of_images_is_found_by_name_or_type(
    tmp_path: Path, kind: pa.DataType, name: str
) -> None:
    columns = {"id": [7, 8], name: pa.array([b"1", b"2"], kind), "note": ["x", "y"]}
    if name != "only_one":
        columns["mask"] = pa.array([b"m", b"n"])
    (tmp_path / "a.parquet").write_bytes(packed(columns))
    assert contents(open_source(str(tmp_path / "a.parquet"))) == {"7": b"1", "8": b"2"}


@pytest.mark.parametrize(
    "names", [["a.jpg", "a.jpg"], ["a.jpg", None], ["a.jpg", ""], ["/a.jpg", "a.jpg"]]
)
def test_rows_without_names_are_numbered(tmp_path: Path, names: list[str | None]) -> None:
    (tmp_path / "a.parquet").write_bytes(hugging_face(names))
    source = open_source(str(tmp_path / "a.parquet"))
    assert contents(source) == {"row-000000000": b"0", "row-000000001": b"1"}
    assert contents(source, by_name) == contents(source)


def test_the_next_column_of_names_is_used_if_the_first_has_repeats(tmp_path: Path) -> None:
    columns = {"path": ["a", "a"], "key": ["k", "k"], "Filename": ["/f/1", "/f/2"]}
    (tmp_path / "a.parquet").write_bytes(packed({"image": [b"1", b"2"], **columns}))
    assert contents(open_source(str(tmp_path / "a.parquet"))) == {"f/1": b"1", "f/2": b"2"}


def test_a_row_without_an_image_fails_as_an_item(tmp_path: Path) -> None:
    rows = [{"bytes": b"1", "path": "a"}, {"bytes": None, "path": "b"}, {"bytes": b"", "path": "c"}]
    (tmp_path / "a.parquet").write_bytes(packed({"image": pa.array(rows, STRUCT)}))
    (tmp_path / "b.parquet").write_bytes(packed({"image": pa.array([b"1", None]), "id": [1, 2]}))
    (tmp_path / "c.parquet").write_bytes(packed({"image": pa.array([None, rows[0]], STRUCT)}))
    found = contents(open_source(str(tmp_path)))
    empty = "its row has no image"
    assert found == {
        "a.parquet/a": b"1",
        "a.parquet/b": empty,
        "a.parquet/c": empty,
        "b.parquet/1": b"1",
        "b.parquet/2": empty,
        "c.parquet/row-000000000": empty,
        "c.parquet/row-000000001": b"1",
    }


def test_an_image_over_the_limit_fails_as_an_item(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(packed({"image": [b"12345", b"123"]}))
    source = open_source(str(tmp_path))
    large, small = source.list().items()
    with source.reader() as reader:
        with pytest.raises(ItemError, match="larger than 4 bytes"):
            reader.read(large, 4)
        assert reader.read(small, 4) == b"123"


def test_a_table_without_images_is_ignored_in_a_folder_and_refused_alone(tmp_path: Path) -> None:
    (tmp_path / "index.parquet").write_bytes(packed({"key": ["a"], "size": [1]}))
    (tmp_path / "two.parquet").write_bytes(packed({"one": [b"1"], "two": [b"2"]}))
    (tmp_path / "a.jpg").write_bytes(b"a")
    listing = open_and_list(str(tmp_path))
    assert keys(listing) == ["a.jpg", "index.parquet", "two.parquet"]
    assert listing.problems == {
        "index.parquet": "ignored: it has no column of images",
        "two.parquet": "it has several columns of bytes, and none is called image: 'one', 'two'",
    }
    for name, reason in (("index", "no column of images"), ("two", "'one', 'two'")):
        with pytest.raises(
            PipelineError, match=rf"{name}\.parquet cannot be used: it has .*{reason}"
        ):
            open_and_list(str(tmp_path / f"{name}.parquet"))


def test_a_broken_table_is_reported_and_a_broken_page_fails_its_rows(tmp_path: Path) -> None:
    whole = packed({"image": [random.Random(0).randbytes(9000)] * 3, "key": ["a", "b", "c"]})
    (tmp_path / "cut.parquet").write_bytes(whole[:-100])
    (tmp_path / "page.parquet").write_bytes(whole[:4] + b"\xff" * 60 + whole[64:])
    source = open_source(str(tmp_path))
    listing = source.list()
    assert listing.problems == {"cut.parquet": "the archive is cut off within it"}
    assert contents(source)["page.parquet/a"] == "its part of the table is broken"


def test_listing_a_table_does_not_read_the_images(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(packed({"image": [random.Random(0).randbytes(1 << 20)], "key": ["a"]}))
    data = bytearray(path.read_bytes())
    data[100:900_000] = bytes(899_900)
    path.write_bytes(data)
    assert keys(open_and_list(str(path))) == ["a"]


def test_many_threads_read_the_same_from_large_row_groups_in_any_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables_module, "_HELD", 0)
    monkeypatch.setattr(tables_module, "_BATCH", 3)
    names = [f"{number:03d}" for number in range(50)]
    images = [name.encode() * 20 for name in names]
    (tmp_path / "a.parquet").write_bytes(packed({"image": images, "key": names}, 20))
    source = open_source(str(tmp_path / "a.parquet"))
    items = list(source.list().items())
    random.Random(2).shuffle(items)
    with source.reader() as reader, ThreadPoolExecutor(8) as pool:
        read = list(pool.map(lambda item: reader.read(item, LIMIT), items))
    assert read == [images[item.offset] for item in items]


def test_a_large_row_group_is_read_in_bounded_memory(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    table = pa.table({"image": [random.Random(n).randbytes(1 << 20) for n in range(200)]})
    pq.write_table(table, path, use_dictionary=False, row_group_size=200)
    del table
    code = (
        "import resource, pyarrow.parquet, pyarrow.compute;"
        "from data_prep.raw.source import open_source;"
        f"source = open_source({str(path)!r}); listing = source.list();"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; before = peak();"
        "reader = source.reader().__enter__();"
        "print(sum(len(reader.read(i, 1 << 24)) for i in listing.items()) >> 20, peak() - before)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    size, more = map(int, done.stdout.split())
    assert size == 200
    assert more < 120 << 10  # KiB


def test_a_path_in_a_table_is_only_a_label(tmp_path: Path) -> None:
    names = [r"C:\photos\1.jpg", "../2.jpg", "/3.jpg", ".hidden/4.jpg"]
    pq.write_table(
        pa.table({"image": [b"1", b"2", b"3", b"4"], "path": names}), tmp_path / "t.parquet"
    )
    expected = dict(
        zip([names[0], names[1], "3.jpg", names[3]], (b"1", b"2", b"3", b"4"), strict=True)
    )
    for source in (tmp_path / "t.parquet", tmp_path):
        prefix = "" if source.name == "t.parquet" else "t.parquet/"
        opened = open_source(str(source))
        assert opened.list().problems == {}
        for change in (by_name, lambda item: item):
            assert contents(opened, change) == {prefix + k: v for k, v in expected.items()}


@pytest.mark.parametrize("kind", ["dictionary", "binary_view", "struct of views", "keys"])
def test_other_columns_of_bytes_are_read(tmp_path: Path, kind: str) -> None:
    images = pa.array([b"1", b"2", b"1"], pa.binary())
    keys = pa.array(["a", "b", "c"])
    if kind == "dictionary":
        images = images.dictionary_encode()
    elif kind == "binary_view":
        images = images.cast(pa.binary_view())
    elif kind == "keys":
        keys = keys.cast(pa.string_view())
    else:
        images = pa.StructArray.from_arrays(
            [images.cast(pa.binary_view()), keys], ["bytes", "path"]
        )
    pq.write_table(pa.table({"image": images, "key": keys}), tmp_path / "t.parquet")
    assert contents(open_source(str(tmp_path / "t.parquet"))) == {"a": b"1", "b": b"2", "c": b"1"}


LISTS = {"a": [b"1", b"2"], "b": [], "c": None, "d": [b"3", None, b"1"]}


@pytest.mark.parametrize("held", [48 << 20, 0])
@pytest.mark.parametrize("kind", ["struct", "bytes", "old names", "large lists", "key"])
def test_each_image_of_a_list_is_a_member(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, held: int
) -> None:
    monkeypatch.setattr(tables_module, "_HELD", held)
    monkeypatch.setattr(tables_module, "_BATCH", 2)
    of_list = pa.large_list if kind == "large lists" else pa.list_
    image: pa.DataType = pa.binary()
    rows: list[Any] = list(LISTS.values())
    if kind != "bytes":
        image = pa.struct({"bytes": image, "path": pa.string()})
        rows = [row and [{"bytes": each, "path": "x"} for each in row] for row in rows]
    columns = {"images": pa.array(rows, of_list(image))}
    names = [f"row-{number:09d}" for number in range(4)]
    if kind == "key":
        columns["id"], names = pa.array(list(LISTS)), list(LISTS)
    path = tmp_path / "t.parquet"
    options: Any = {"use_compliant_nested_type": kind != "old names"}
    pq.write_table(pa.table(columns), path, row_group_size=3, **options)
    a, b, c, d = names
    expected = {f"{a}-0": b"1", f"{a}-1": b"2", f"{d}-0": b"3", f"{d}-2": b"1"}
    failing = {f"{b}-0", f"{c}-0", f"{d}-1"}
    source = open_source(str(path))
    items = list(source.list().items())
    assert {item.key for item in items} == expected.keys() | failing
    with source.reader() as reader:
        for item in items:
            if item.key in expected:
                assert reader.read(item, LIMIT) == expected[item.key]
            else:
                with pytest.raises(ItemError, match="its row has no image"):
                    reader.read(item, LIMIT)


def test_lists_of_a_fixed_size_are_read(tmp_path: Path) -> None:
    rows = pa.array([[b"1", b"2"], [b"3", b"4"]], pa.list_(pa.binary(), 2))
    pq.write_table(pa.table({"image": rows}), tmp_path / "t.parquet")
    found = contents(open_source(str(tmp_path / "t.parquet")))
    assert sorted(found.values()) == [b"1", b"2", b"3", b"4"]


def test_a_single_image_wins_over_a_list(tmp_path: Path) -> None:
    table = pa.table({"views": [[b"1", b"2"]], "png": [b"3"]})
    pq.write_table(table, tmp_path / "t.parquet")
    assert list(contents(open_source(str(tmp_path / "t.parquet"))).values()) == [b"3"]


def test_a_list_that_grows_from_few_bytes_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"images": [[b""] * 2_000_000]}), path)
    with pytest.raises(PipelineError, match="members or more"):
        open_and_list(str(path))
    kind = pa.list_(pa.binary())
    pq.write_table(
        pa.table({"images": pa.array([[bytes(1 << 20)] * 60], kind)}),
        path,
        use_dictionary=False,
        column_encoding={"images.list.element": "DELTA_BYTE_ARRAY"},
    )
    with pytest.raises(PipelineError, match="without DELTA_BYTE_ARRAY"):
        open_and_list(str(path))


def test_columns_with_one_name_are_refused_with_a_reason(tmp_path: Path) -> None:
    table = pa.table([pa.array([b"1"]), pa.array([b"2"])], ["image", "image"])
    pq.write_table(table, tmp_path / "t.parquet")
    with pytest.raises(PipelineError, match=r"several columns called 'image'\. Give"):
        open_and_list(str(tmp_path / "t.parquet"))


def test_a_key_that_is_no_single_value_is_passed_over(tmp_path: Path) -> None:
    table = pa.table({"image": [b"1"], "path": [{"name": "a"}], "id": [["b"]]})
    pq.write_table(table, tmp_path / "t.parquet")
    assert contents(open_source(str(tmp_path / "t.parquet"))) == {"row-000000000": b"1"}


def test_an_empty_table_beside_photos_has_no_items(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": pa.array([], pa.binary())}), tmp_path / "t.parquet")
    (tmp_path / "a.jpg").write_bytes(b"a")
    listing = open_and_list(str(tmp_path))
    assert keys(listing) == ["a.jpg"]
    assert list(item_kinds(listing, str(tmp_path))) == [PHOTO]
