"""Roots and sources have the same addresses and the same error messages."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_prep.core.errors import ConfigError
from data_prep.core.storage.open import open_store
from data_prep.core.storage.uri import S3Address, parse_uri
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


@pytest.mark.parametrize("uri", ["s3://bucket/a/b", "s3://bucket"])
def test_a_root_and_a_source_at_one_address_are_the_same_place(uri: str) -> None:
    assert open_files(uri).uri == open_store(uri).uri == uri
