"""List files as raw sources. S3 is moto's server, or Ceph in slow tests."""

from __future__ import annotations

import json
import os
import pickle
import re
from pathlib import Path

import pytest
import small_root
from image_sets import crops
from raw_places import LIMIT, Place, contents, open_and_list, place

from data_prep.core.errors import ConfigError, ItemError, PipelineError
from data_prep.core.storage.local import LocalStore
from data_prep.images.stage import prepare_images
from data_prep.raw.listing import Item
from data_prep.raw.lists import MISSING
from data_prep.raw.source import check_source, open_source

__all__ = ["place"]


def split_of(place: Place, name: str, text: str) -> dict[str, str]:
    """Return the split of every item of a list."""
    listing = open_and_list(place.put(name, text.encode()))
    return {item.key: item.split for item in listing.items()}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("l.txt", "a/1.jpg\nb c.jpg\r\n\n./a//ü.jpg\nnot/there.jpg"),
        ("l.csv", 'label,Path\nx,a/1.jpg\ny,"b c.jpg"\nz,./a//ü.jpg\nw,not/there.jpg\n'),
        (
            "l.jsonl",
            '{"file": "a/1.jpg"}\n\n{"image": "b c.jpg"}\n{"path": "./a//\\u00fc.jpg", '
            '"split": null}\n{"uri": "not/there.jpg"}\n',
        ),
    ],
)
def test_paths_of_every_kind_of_list_are_relative_to_its_folder(
    place: Place, name: str, text: str
) -> None:
    for file in ("a/1.jpg", "b c.jpg", "a/ü.jpg"):
        place.put(file, file.encode())
    uri = place.put(name, text.encode())
    check_source(uri)
    source = open_source(uri)
    listing = source.list()
    assert [(item.key, item.size) for item in listing.items()] == [
        ("a/1.jpg", 7),
        ("a/ü.jpg", 8),
        ("b c.jpg", 7),
        ("not/there.jpg", -1),
    ]
    assert listing.problems == {"not/there.jpg": MISSING}
    assert contents(pickle.loads(pickle.dumps(source))) == {
        "a/1.jpg": b"a/1.jpg",
        "a/ü.jpg": "a/ü.jpg".encode(),
        "b c.jpg": b"b c.jpg",
        "not/there.jpg": "it is gone since it was listed",
    }


def test_a_list_may_contain_absolute_paths_and_uris(tmp_path: Path, moto_root: str) -> None:
    remote = Place(moto_root, True)
    bucket_uri = remote.put("x/far.jpg", b"far")
    (tmp_path / "lists").mkdir()
    for name in ("here.jpg", "lists/in.jpg", "sp ace.jpg", "lists/s%20.jpg"):
        (tmp_path / name).write_bytes(name.encode())
    lines = [
        "../here.jpg",
        f"{tmp_path}/lists/in.jpg",
        f"{tmp_path}/lists/../here.jpg",
        f"File://{tmp_path}/sp%20ace.jpg",
        "s%20.jpg",
        bucket_uri.replace("s3", "S3"),
    ]
    (tmp_path / "lists/l.txt").write_text("\n".join(lines))
    key = bucket_uri.replace("s3://", "s3:/")
    assert contents(open_source(str(tmp_path / "lists/l.txt"))) == {
        "../here.jpg": b"here.jpg",
        "in.jpg": b"lists/in.jpg",
        f"file:{tmp_path}/here.jpg": b"here.jpg",
        f"file:{tmp_path}/sp ace.jpg": b"sp ace.jpg",
        "s%20.jpg": b"lists/s%20.jpg",
        key: b"far",
    }
    local = [f"file://{tmp_path}/here.jpg", "far.jpg", bucket_uri, "../top.jpg"]
    remote.put("top.jpg", b"top")
    source = open_source(remote.put("x/l.txt", "\n".join(local).encode()))
    top = moto_root.replace("s3://", "s3:/")
    assert contents(source) == {
        f"file:{tmp_path}/here.jpg": b"here.jpg",
        "far.jpg": b"far",
        f"{top}/top.jpg": b"top",
    }


def test_a_list_and_a_folder_give_the_same_fingerprints(place: Place) -> None:
    place.put("a.jpg", b"1")
    (folder,) = open_and_list(place.uri).items()
    (item,) = open_and_list(place.put("l.txt", b"a.jpg")).items()
    assert item == folder


def test_a_split_column_is_read_under_its_usual_names(tmp_path: Path) -> None:
    place = Place(str(tmp_path), False)
    names = {
        "train": "train", "Training": "train", "val": "val", "valid": "val", "validation": "val",
        "dev": "val", "test": "test", " testing": "test", "EVAL": "test", "": "",
    }  # fmt: skip
    rows = "".join(f"{number}.jpg,{name}\n" for number, name in enumerate(names))
    assert split_of(place, "l.csv", f"path,split\n{rows}") == {
        f"{number}.jpg": split for number, split in enumerate(names.values())
    }
    rows = "\n".join(
        json.dumps({"path": f"{number}.jpg", "split": name}) for number, name in enumerate(names)
    )
    assert split_of(place, "l.jsonl", rows) == {
        f"{number}.jpg": split for number, split in enumerate(names.values())
    }


def test_without_a_split_column_the_folders_decide_the_splits(tmp_path: Path) -> None:
    place = Place(str(tmp_path), False)
    assert split_of(place, "l.txt", "train/a.jpg\nval/b.jpg") == {
        "train/a.jpg": "train",
        "val/b.jpg": "val",
    }


def test_repeated_lines_are_listed_once(tmp_path: Path) -> None:
    place = Place(str(tmp_path), False)
    text = f"path,split\na.jpg,train\n./a.jpg,training\n{tmp_path}/a.jpg,train\nb.jpg,test\n"
    assert split_of(place, "l.csv", text) == {"a.jpg": "train", "b.jpg": "test"}
    with pytest.raises(ConfigError, match=r"line 3 of .*l\.csv: 'a\.jpg' was in another split"):
        split_of(place, "l.csv", "path,split\na.jpg,train\n./a.jpg,val\n")


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("l.csv", "path,split\na.jpg,train\nb.jpg,hold-out\n", "line 3 of .*'hold-out' is unknown"),
        ("l.csv", "name,size\na.jpg,1\n", "its first line has no column path, uri"),
        ("l.csv", "path,split\na.jpg,train\n,train\n", "line 3 has no path"),
        ("l.csv", "", "its first line has no column"),
        ("l.jsonl", '{"path": "a"}\n["b"]', "line 2 is not a JSON object"),
        ("l.jsonl", '{"path": "a"}\n{"path"', "line 2 is not a JSON object"),
        ("l.jsonl", '{"label": "a"}', "line 1 has no field path, uri"),
        ("l.jsonl", '{"path": "\\ud800"}', "line 1 of .*not valid Unicode"),
        ("l.txt", "a.jpg\nhttps://me:secret@host/x.jpg", "line 2 of .*https:// .*cannot be read"),
        ("l.txt", "gs://bucket/x.jpg", "line 1 of .*gs:// "),
        ("l.txt", "s3://bucket", "line 1 of .*a bucket and a key"),
        ("l.txt", "\0\0\0", "this is not a text file"),
    ],
)
def test_the_error_for_an_unusable_list_names_the_line(
    tmp_path: Path, name: str, text: str, sentence: str
) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=sentence) as caught:
        open_and_list(str(tmp_path / name))
    assert "secret" not in str(caught.value)
    assert str(tmp_path / name) in str(caught.value)


def test_an_absolute_path_in_a_list_on_s3_is_refused(moto_root: str) -> None:
    with pytest.raises(ConfigError, match=r"line 1 of .*Write s3://bucket/key"):
        open_and_list(Place(moto_root, True).put("l.txt", b"/data/a.jpg"))


def test_an_empty_list_and_an_absent_list_are_refused(place: Place) -> None:
    with pytest.raises(PipelineError, match=r"l\.txt contains no paths"):
        open_and_list(place.put("l.txt", b"\n\n"))
    for check in (check_source, open_and_list):
        with pytest.raises(PipelineError, match=r"none\.csv does not exist"):
            check(f"{place.uri}/none.csv")


def test_a_listed_name_that_is_not_unicode_is_read(tmp_path: Path) -> None:
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.jpg")).write_bytes(b"1")
    (tmp_path / "l.txt").write_bytes(b"\xef\xbb\xbf\xff.jpg\n")
    assert contents(open_source(str(tmp_path / "l.txt"))) == {"\\xff.jpg": b"1"}


def test_a_listed_folder_is_missing_and_a_file_over_the_limit_fails(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.jpg").write_bytes(b"12345")
    (tmp_path / "l.txt").write_text("sub\na.jpg\na.jpg/b.jpg")
    source = open_source(str(tmp_path / "l.txt"))
    assert source.list().problems == {"sub": MISSING, "a.jpg/b.jpg": MISSING}
    with source.reader() as reader:
        assert reader.read(Item("a.jpg", 5, 1), LIMIT) == b"12345"
        with pytest.raises(ItemError, match="larger than 4 bytes"):
            reader.read(Item("a.jpg", 5, 1), 4)


@pytest.mark.parametrize(
    ("written", "there", "reason"),
    [
        (r"C:\data\a.jpg", "data/a.jpg", "a path of Windows"),
        (r"sub\a.jpg", "sub/a.jpg", "a path of Windows"),
        ("a%20b.jpg", "a b.jpg", "as in a URL"),
        ("é.jpg".encode("latin-1"), "é.jpg", "not in UTF-8"),
        ("e\u0301.jpg", "é.jpg", "NFC or NFD"),
        ("a.jpg 7", "a.jpg", "more than a path"),
        ("a.jpg,cat", "a.jpg", "more than a path"),
        ("data/sub/a.jpg", "sub/a.jpg", "start at the folder of the list.* is at .*/sub/a.jpg"),
        ("/other/place/sub/a.jpg", "sub/a.jpg", "is at .*/sub/a.jpg"),
        ("nowhere.jpg", "a.jpg", "start at the folder of the list"),
        (r"D:\x\a.jpg", "b.jpg", "a path of Windows"),
    ],
)
def test_a_list_without_any_file_says_why(
    tmp_path: Path, written: str | bytes, there: str, reason: str
) -> None:
    (tmp_path / there).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / there).write_bytes(b"1")
    (tmp_path / "l.txt").write_bytes(written if isinstance(written, bytes) else written.encode())
    (problem,) = open_and_list(str(tmp_path / "l.txt")).problems.values()
    assert re.search(rf"^missing: .*{reason}", problem), problem
    with pytest.raises(PipelineError, match=rf"^none of the 1 path in .*{reason}") as caught:
        prepare_images(crops(tmp_path / "l.txt"), LocalStore(tmp_path / "root"))
    sentence = str(caught.value)
    assert sentence.endswith(".")
    assert len(re.findall(r"Correct|Write|Save|Copy|Give", sentence)) == 1  # one advice


@pytest.mark.parametrize(
    ("text", "is_list"),
    [
        ("Dear all,\nthese are my notes\nabout the holidays.\n", False),
        ("width=3\nheight=4\nphoto.jpg\n", False),
        ("a.jpg\nb.png\nnotes\n", True),
        ("a.jpg 1\nb.jpg 2\n", True),
    ],
)
def test_a_text_that_is_no_list_of_photos_is_called_so(
    tmp_path: Path, text: str, is_list: bool
) -> None:
    file = tmp_path / "some.txt"
    file.write_text(text)
    with pytest.raises(PipelineError) as caught:
        prepare_images(crops(file), LocalStore(tmp_path / "root"))
    assert ("does not look like a list of photos" in str(caught.value)) == (not is_list)
    (tmp_path / "some.csv").write_text("path\na\nb\n")  # its column says that they are paths
    with pytest.raises(PipelineError, match="Relative paths start at"):
        prepare_images(crops(tmp_path / "some.csv"), LocalStore(tmp_path / "root"))


def test_of_a_list_with_some_missing_files_one_advice_is_about_the_list(tmp_path: Path) -> None:
    photos = small_root.photographs(tmp_path / "photos")
    names = [path.name for path in sorted(photos.iterdir())]
    (photos / "l.txt").write_text("\n".join([*names, "gone.png", "lost.png"]))
    with pytest.raises(PipelineError) as caught:
        prepare_images(crops(photos / "l.txt"), LocalStore(tmp_path / "root"))
    sentence = str(caught.value)
    assert "gone.png: missing" in sentence
    assert sentence.count("correct their paths in the list; relative ones start at its folder") == 1
    assert "complete photos" not in sentence


def test_the_reason_for_missing_files_is_found_on_s3_too(moto_root: str) -> None:
    place = Place(moto_root, True)
    place.put("a b.jpg")
    uri = place.put("l.txt", b"a%20b.jpg")
    (problem,) = open_and_list(uri).problems.values()
    assert "as in a URL" in problem
