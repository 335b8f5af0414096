"""The tables and lists of a version: the outcome of every item, and the shards of each split.

The tables do not count in the content digest: a new text file or copy among the photos must not
cause a new training.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_prep.core.manifest import FileRecord
from data_prep.core.stage import Work
from data_prep.core.temporary import naming_temporary_folder, temporary_file
from data_prep.images.findings import FAILED, IGNORED, OUTCOMES, SAMPLE
from data_prep.images.keys import UNSURE
from data_prep.images.outcomes import Outcomes
from data_prep.images.plan import shard_split
from data_prep.images.resolution import Resolution
from data_prep.images.versions import LISTED_BY, SOURCES
from data_prep.raw.listing import ROWS, RULES, SPLITS
from data_prep.shards.shards import sha256_of, write_urls

if TYPE_CHECKING:
    import pyarrow as pa


def write_lists(
    work: Work, outcomes: Outcomes, shards: Mapping[str, Sequence[FileRecord]]
) -> tuple[list[FileRecord], dict[str, dict[str, int]]]:
    """Write the `.urls` file of every split, and count its samples and shards.

    Args:
        work: the stage's folder.
        outcomes: of all items.
        shards: the files of each shard, by name.

    Returns:
        The records of the written files, and {split: {"samples": n, "shards": n}}.
    """
    import numpy as np

    records, figures = [], {}
    stored = outcomes.are(SAMPLE)
    for code, split in enumerate(SPLITS):
        paths = [
            record.path.removesuffix(".tar")
            for name in sorted(shards)
            if shard_split(name) == split
            for record in shards[name]
            if record.path.endswith(".tar")
        ]
        # The lines follow from the shards' names, so they add nothing to the content.
        records.append(replace(write_urls(work, split, paths), content=False))
        own = stored & (outcomes.plan.split == code)
        figures[split] = {
            "samples": int(outcomes.samples[own].sum(dtype=np.int64)),
            "shards": len(paths),
        }
    return records, figures


def write_tables(work: Work, outcomes: Outcomes, resolution: Resolution) -> list[FileRecord]:
    """Write the tables of failures, duplicates, near duplicates and of all sources."""
    tables: dict[str, Iterable[pa.Table]] = {
        "failures.parquet": [_failure_table(outcomes)],
        "duplicates.parquet": [_duplicate_table(outcomes, resolution)],
        "near_duplicates.parquet": [_near_table(outcomes, resolution)],
        SOURCES: _source_tables(outcomes),
    }
    return [_write_table(work, path, parts) for path, parts in tables.items()]


def _failure_table(outcomes: Outcomes) -> pa.Table:
    """Return failures.parquet: the failed and the ignored items."""
    import pyarrow as pa

    rows = outcomes.are(FAILED, IGNORED).nonzero()[0]
    return pa.table(
        {
            "key": _keys(outcomes, rows),
            "kind": pa.array([OUTCOMES[outcomes.code[r]] for r in rows], pa.string()),
            "sha256": pa.array(_sha256(outcomes, rows), pa.string()),
            "reason": pa.array([outcomes.reason(int(r)) for r in rows], pa.string()),
        }
    )


def _duplicate_table(outcomes: Outcomes, resolution: Resolution) -> pa.Table:
    """Return duplicates.parquet: the items that leave, and for each the one that stays."""
    import pyarrow as pa

    return pa.table(
        {
            "key": _keys(outcomes, resolution.rows),
            "sha256": pa.array(_sha256(outcomes, resolution.rows), pa.string()),
            "kept": _keys(outcomes, resolution.kept),
            "reason": pa.array(list(resolution.reasons), pa.string()),
        }
    )


def _near_table(outcomes: Outcomes, resolution: Resolution) -> pa.Table:
    """Return near_duplicates.parquet: all pairs of nearly the same photos."""
    import pyarrow as pa

    rows = [pair.row for pair in resolution.near]
    others = [pair.other for pair in resolution.near]
    removed = set(resolution.rows.tolist())
    split = outcomes.plan.split
    return pa.table(
        {
            "key": _keys(outcomes, rows),
            "split": pa.array([SPLITS[split[r]] for r in rows], pa.string()),
            "other": _keys(outcomes, others),
            "other_split": pa.array([SPLITS[split[r]] for r in others], pa.string()),
            "distance": pa.array([pair.distance for pair in resolution.near], pa.int32()),
            "dropped": pa.array([r in removed for r in rows], pa.bool_()),
        }
    )


def _source_tables(outcomes: Outcomes) -> Iterator[pa.Table]:
    """Yield sources.parquet, some rows at a time."""
    import numpy as np
    import pyarrow as pa

    listing = outcomes.plan.listing
    names = list(outcomes.numbers)
    splits = pa.array([*SPLITS])
    kinds = pa.array([*OUTCOMES])
    prepared = np.asarray(outcomes.plan.kind >= UNSURE)
    for start in range(0, len(listing), ROWS):
        stop = min(start + ROWS, len(listing))
        part = slice(start, stop)
        columns = listing.table.slice(start, stop - start)
        hashes = outcomes.sha256[part].tobytes().hex()
        hashed = outcomes.hashed[part]
        split = pa.array(outcomes.plan.split[part], mask=~prepared[part])
        yield pa.table(
            {
                **_places(outcomes, columns),
                "key": columns["key"],
                "size": columns["size"],
                "fingerprint": columns["fingerprint"],
                "sha256": pa.array(
                    [hashes[64 * i : 64 * i + 64] if ok else None for i, ok in enumerate(hashed)],
                    pa.string(),
                ),
                "width": pa.array(outcomes.width[part]),
                "height": pa.array(outcomes.height[part]),
                "format": _named(outcomes.formats, outcomes.format[part]),
                "phash": pa.array(outcomes.phash[part]),
                "samples": pa.array(outcomes.samples[part]),
                "split": splits.take(split.cast(pa.int32())),
                "shard": _named(names, outcomes.shard[part]),
                "outcome": kinds.take(pa.array(outcomes.code[part].astype(np.int32))),
                "reason": pa.array(
                    [outcomes.reason(r) or None for r in range(start, stop)], pa.string()
                ),
            },
            metadata={LISTED_BY: str(RULES).encode()},
        )


def _places(outcomes: Outcomes, columns: pa.Table) -> dict[str, Any]:
    """Return the columns that say where an archive holds its members, if there are archives."""
    import pyarrow as pa

    if "container" not in columns.column_names:
        return {}
    containers = pa.array([*outcomes.plan.listing.containers], pa.string())
    container = columns["container"].to_numpy()
    number = pa.array(container, mask=container < 0)
    return {
        "container": containers.take(number),
        "offset": columns["offset"],
        "block": columns["block"],
    }


def _named(names: Sequence[str], codes: Iterable[int]) -> pa.Array:
    """Return the name of each code, null for a negative one."""
    import pyarrow as pa

    return pa.array([names[code] if code >= 0 else None for code in codes], pa.string())


def _keys(outcomes: Outcomes, rows: Any) -> pa.Array:
    import pyarrow as pa

    column = outcomes.plan.listing.table["key"]
    return column.take(pa.array(rows, pa.int64())).combine_chunks()


def _sha256(outcomes: Outcomes, rows: Iterable[int]) -> list[str | None]:
    return [outcomes.sha256[r].tobytes().hex() if outcomes.hashed[r] else None for r in rows]


def _write_table(work: Work, path: str, parts: Iterable[pa.Table]) -> FileRecord:
    """Write a Parquet file part by part."""
    import pyarrow.parquet as pq

    with temporary_file("table") as file:
        writer = None
        for part in parts:
            with naming_temporary_folder():
                if writer is None:
                    writer = pq.ParquetWriter(file.name, part.schema, compression="zstd")
                writer.write_table(part)
        assert writer is not None
        with naming_temporary_folder():
            writer.close()
        work.store.upload(work.key(path), Path(file.name))
    sha256, size = sha256_of(work.store, work.key(path))
    return FileRecord(path, size, sha256, content=False)
