"""Roots and sources have the same addresses and the same error messages."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_prep.core.errors import ConfigError
from data_prep.core.storage.open import open_store
from data_prep.core.storage.uri import S3Address, normal_uri, parse_uri
from data_prep.raw.bucket_events import uris_below
from data_prep.raw.source import check_source, open_files


@pytest.mark.parametrize(
    ("uri", "address"),
    [
        ("s3://bucket", S3Address("bucket", "")),
        ("s3://bucket/", S3Address("bucket", "")),
        ("s3://bucket/a/b c/", S3Address("bucket", "a/b c")),
        ("s3://bucket/a?b#c%20d", S3Address("bucket", "a?b#c%20d")),  # part of the key
        ("S3://bucket/a", S3Address("bucket", "a")),
        ("file:///a/b%20c", Path("/a/b c")),
        ("file://localhost/a", Path("/a")),
        ("file:/a", Path("/a")),
        ("a/b", Path("a/b")),
        ("/a?b#c", Path("/a?b#c")),
        ("a/s3://b", Path("a/s3:/b")),
        ("//[a", Path("//[a")),
    ],
)
def test_an_address_is_a_folder_or_a_bucket_with_a_prefix(
    uri: str, address: Path | S3Address
) -> None:
    assert parse_uri(uri) == address


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert parse_uri("~/photos") == tmp_path / "photos"
    assert open_store("~/photos").local_folder == tmp_path / "photos"


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("s3://b/a//p", r"'s3://b/a//p' has a part without a name .* Write s3://b/a/p\."),
        ("s3://b/p\n", r"has a line break, or a blank at its end\. Remove it"),
        ("s3://b\n", r"has a line break, or a blank at its end\. Remove it"),
        ("s3://b/a\nb", r"has a line break, or a blank at its end\. Remove it"),
        (" s3://b/p", r"' s3://b/p' is not valid\. Write s3://bucket/prefix"),
        ("s3:/b/p", r"'s3:/b/p' is not valid\. Write s3://bucket/prefix"),
        ("S3:b/p", r"'S3:b/p' is not valid\. Write s3://bucket/prefix"),
        ("s3:///x", r"has no bucket\. Write s3://bucket/prefix"),
        (
            "s3://key:secret@bucket/x",
            "may not contain credentials, a host or a port. Write s3://bucket/prefix",
        ),
        (
            "s3://host:9000/bucket/x",
            "may not contain credentials, a host or a port. Write s3://bucket/prefix",
        ),
        ("file://me:secret@host/x", r"may not contain a host\. Write file:///absolute/path"),
        ("https://me:secret@host/x", "https:// addresses cannot be used. .*s3://bucket/prefix"),
        ("gs://bucket/x", "gs:// addresses cannot be used. .*s3://bucket/prefix"),
    ],
)
def test_a_wrong_address_gets_the_same_message_everywhere_without_a_password(
    uri: str, message: str
) -> None:
    texts = set[str]()
    for use in (parse_uri, open_store, open_files, check_source):
        with pytest.raises(ConfigError, match=message) as caught:
            use(uri)
        texts.add(str(caught.value))
    (text,) = texts
    assert "secret" not in text


@pytest.mark.parametrize(
    ("uri", "normal"),
    [
        ("s3://bucket/a/b", "s3://bucket/a/b"),
        ("s3://bucket", "s3://bucket"),
        ("S3://bucket/", "s3://bucket"),
        ("s3://bucket//a/b//", "s3://bucket/a/b"),
    ],
)
def test_an_address_has_one_form_everywhere(uri: str, normal: str) -> None:
    assert open_files(uri).uri == open_store(uri).uri == normal_uri(uri) == normal
    assert uris_below([f"{normal}/1.png", "s3://other/1.png"], uri) == [f"{normal}/1.png"]


def test_a_path_has_one_form_with_and_without_a_scheme(tmp_path: Path) -> None:
    forms = {normal_uri(each) for each in (f"{tmp_path}/a b", f"file:{tmp_path}/a%20b/")}
    assert forms == {f"{tmp_path}/a b"}
