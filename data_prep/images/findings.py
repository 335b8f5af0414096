"""The outcome of each item of a shard, and the file in which a worker records them.

A worker writes the record under `work/` after the files of its shard. An interrupted build resumes
from these records. They are deleted when the version is committed.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass

from data_prep.core.manifest import FileRecord
from data_prep.core.record import known_fields, parse_json
from data_prep.shards.shards import Folder, decode_table, encode_table

SAMPLE, DUPLICATE, FAILED, IGNORED = "sample", "duplicate", "failed", "ignored"
OUTCOMES = (SAMPLE, DUPLICATE, FAILED, IGNORED)  # the order gives the codes of arrays of outcomes
_COLUMNS = {
    "sha256": "string",
    "size": "int64",
    "width": "int32",
    "height": "int32",
    "format": "string",
    "phash": "uint64",
    "samples": "int32",
    "outcome": "string",
    "reason": "string",
    "dropped": "bool",
}


@dataclass(frozen=True, slots=True)
class Finding:
    """The outcome of one item.

    Attributes:
        sha256: of the item's bytes; empty if they could not be read.
        width: pixels of the upright photo; `height` likewise.
        samples: number of samples cut from it.
        reason: why it failed or is ignored.
        dropped: whether its samples were later removed from the shard.
    """

    sha256: str = ""
    size: int = -1
    width: int = 0
    height: int = 0
    format: str = ""
    phash: int = 0
    samples: int = 0
    outcome: str = SAMPLE
    reason: str = ""
    dropped: bool = False


@dataclass(frozen=True)
class ShardRecord:
    """The record of one shard: its task's digest, its files, and a finding for each item."""

    task_digest: str
    files: list[FileRecord]
    findings: list[Finding]


def record_path(name: str) -> str:
    """Return the path of a shard's record in the version's folder."""
    return f"work/{name}.parquet"


def write_record(place: Folder, name: str, record: ShardRecord) -> None:
    """Write the record of the shard `name`."""
    metadata = {
        b"task": record.task_digest.encode(),
        b"files": json.dumps([file.to_json() for file in record.files]).encode(),
    }
    rows = _rows(record.findings)
    place.store.write(place.key(record_path(name)), encode_table(rows, _COLUMNS, metadata))


def read_record(place: Folder, name: str) -> ShardRecord | None:
    """Read the record of the shard `name`; return None if it is missing or incomplete."""
    import pyarrow.parquet as pq

    try:
        data = place.store.read(place.key(record_path(name)))
        metadata = pq.read_schema(io.BytesIO(data)).metadata or {}
        files = [FileRecord.from_json(file) for file in parse_json(metadata[b"files"])]
        findings = [Finding(**known_fields(Finding, row)) for row in decode_table(data)]
        return ShardRecord(metadata[b"task"].decode(), files, findings)
    except (FileNotFoundError, ValueError, KeyError, TypeError):  # ArrowInvalid is a ValueError
        return None


def _rows(findings: Sequence[Finding]) -> list[dict[str, object]]:
    return [{name: getattr(finding, name) for name in _COLUMNS} for finding in findings]
