"""Open the store that a URI names."""

from __future__ import annotations

from data_prep.core.storage.local import LocalStore
from data_prep.core.storage.store import Store
from data_prep.core.storage.uri import S3Address, parse_uri


def open_store(uri: str, patience: float = 0.0) -> Store:
    """Return the store at `s3://bucket/prefix`, `file:///path` or a plain path.

    Args:
        uri: The address; see `parse_uri`.
        patience: Seconds to retry an S3 server that does not answer, with a warning. Values below
            a minute mean a minute.
    """
    address = parse_uri(uri)
    if isinstance(address, S3Address):
        from data_prep.core.storage.s3 import S3Store

        return S3Store(address.bucket, address.prefix, patience)
    return LocalStore(address)
