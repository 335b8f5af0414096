"""Digests: of the request and of the content of a stage.

A digest is 64 lower-case hexadecimal digits of SHA-256. Canonical JSON is UTF-8, keys sorted, no
blanks, no NaN, so the same value always gives the same bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

SHORT = 12  # hexadecimal digits of a digest in the name of a folder


def canonical_json(value: Any) -> bytes:
    """Return canonical JSON of `value`. Raise ValueError for NaN or infinity."""
    text = json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )
    return text.encode()


def sha256_bytes(data: bytes) -> str:
    """Return the digest of bytes."""
    return hashlib.sha256(data).hexdigest()


def sha256_json(value: Any) -> str:
    """Return the digest of the canonical JSON of `value`."""
    return sha256_bytes(canonical_json(value))


def sha256_file(path: Path) -> str:
    """Return the digest of a file, which is read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def content_digest(files: Iterable[tuple[str, str]]) -> str:
    """Return the digest of (relative path, sha256) pairs. Their order does not matter."""
    return sha256_json(sorted(files))
