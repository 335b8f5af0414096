"""Digests: what was asked (request) and what came out (content).

A digest is 64 lower-case hexadecimal digits of SHA-256. Canonical JSON is UTF-8, keys sorted, no
blanks, no NaN, so that the same value always gives the same bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

SHORT = 12  # hexadecimal digits of a digest that go into a folder's name


def canonical_json(value: Any) -> bytes:
    """Bytes of `value` (JSON types only). Raises ValueError on NaN or infinity."""
    text = json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )
    return text.encode()


def sha256_bytes(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def sha256_json(value: Any) -> str:
    return sha256_bytes(canonical_json(value))


def sha256_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def content_digest(files: Iterable[tuple[str, str]]) -> str:
    """Digest of (relative path, sha256) pairs, whatever order they come in."""
    return sha256_json(sorted(files))
