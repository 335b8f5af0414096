"""Open the store that a URI names."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote, urlsplit

from data_prep.core.errors import StorageError
from data_prep.core.storage.local import (
    LocalStore,
)
from data_prep.core.storage.store import Store


def open_store(uri: str, patience: float = 0.0) -> Store:
    """The store at `s3://bucket/prefix`, `file:///path` or a plain path.

    S3 that does not answer is tried again for a minute at most, or for `patience` seconds if these
    are more, with a warning.
    """
    if uri.startswith("s3://"):
        from data_prep.core.storage.s3 import S3Store

        # Not by urlsplit: a "?" or "#" is part of a key.
        bucket, _, prefix = uri.removeprefix("s3://").partition("/")
        if "@" in bucket or ":" in bucket:
            raise StorageError(
                "an S3 URI holds no credentials, host or port: write s3://bucket/prefix and use"
                " AWS_ENDPOINT_URL and the other AWS settings for the rest."
            )
        if not bucket:
            raise StorageError(f"{uri!r} names no bucket: write s3://bucket/prefix.")
        return S3Store(bucket, prefix.strip("/"), patience)
    parts = urlsplit(uri)
    if parts.scheme == "file":
        if parts.netloc not in ("", "localhost"):
            raise StorageError(f"{uri!r} is not a local path: write file:///absolute/path.")
        return LocalStore(Path(unquote(parts.path)))
    if "://" in uri:
        raise StorageError(f"{parts.scheme}:// is an unknown scheme: use a path, file:// or s3://.")
    return LocalStore(Path(uri))
