"""Figures of prepared data: one set of images or masks, and the versions of a dataset."""

from __future__ import annotations

import posixpath
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from data_prep.core.errors import PipelineError
from data_prep.core.manifest import Manifest, read_manifest
from data_prep.core.paths import MANIFEST
from data_prep.core.storage.store import Store
from data_prep.inspection.find_set import committed
from data_prep.shards.ledger import FAILURES, SOURCES, OldTableError, TableError, read_batches
from data_prep.shards.shards import index_key, read_index, split_shards

# Lower bounds of the classes of shorter sides, in pixels.
EDGES = (0, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192)
COUNTS = ("listed", "added", "removed", "changed", "failed", "ignored")  # of items, in a log
REASONS = 5  # the number of reported reasons, the most frequent first


def read_checked_manifest(store: Store, folder: str) -> Manifest:
    """Read the manifest of a set; raise PipelineError if its summary lacks the splits."""
    manifest = read_manifest(store, folder)
    try:
        for numbers in manifest.summary["splits"].values():
            int(numbers["samples"]), int(numbers["shards"])
    except (KeyError, TypeError, AttributeError, ValueError):
        raise PipelineError(
            f"{store.label}/{folder}/{MANIFEST} was altered: run `dpnet verify` for details."
        ) from None
    return manifest


def _described(manifest: Manifest) -> dict[str, Any]:
    """Return the figures that images and masks have in common."""
    splits = {}
    for split, numbers in manifest.summary["splits"].items():
        own = [f for f in manifest.files if _split_of(f.path) == split]
        splits[split] = {
            "samples": numbers["samples"],
            "shards": numbers["shards"],
            "bytes": sum(file.size for file in own if file.path.endswith(".tar")),
        }
    return {
        "folder": manifest.folder,
        "name": manifest.name,
        "created": manifest.created,
        "content_digest": manifest.content_digest,
        "splits": splits,
    }


def _split_of(path: str) -> str:
    return posixpath.basename(path).rpartition("-")[0]


def inspect_images(store: Store, folder: str) -> dict[str, Any]:
    """Return figures of one version: items, samples by split, failures, sizes of the photos.

    `sides` counts the photos by their shorter side: [from, below, number], in pixels; `below` is
    None in the last class.

    Raises:
        PipelineError: a table is damaged.
    """
    manifest = read_checked_manifest(store, folder)
    summary = manifest.summary
    counted = ("listed", "photographs", "failed", "ignored", "duplicates", "near_duplicates")
    sides, formats = _originals(store, folder)
    return {
        **_described(manifest),
        "version": summary.get("version"),
        "parent": _parent(manifest),
        "items": {name: summary[name] for name in counted if name in summary},
        "reasons": _reasons(store, folder),
        "sides": sides,
        "formats": formats,
    }


def _parent(manifest: Manifest) -> str | None:
    parent = manifest.inputs.get("parent")
    return posixpath.basename(parent.folder) if parent else None


def _table(store: Store, folder: str, name: str, columns: Sequence[str]) -> Iterator[Any]:
    """Yield columns of a table in batches; nothing if an old version wrote it without them."""
    try:
        yield from read_batches(store, f"{folder}/{name}", columns)
    except OldTableError:
        return
    except TableError as error:
        raise PipelineError(
            f"{store.label}/{folder}/{name} {error}: run `dpnet verify` for details."
        ) from None


def _originals(store: Store, folder: str) -> tuple[list[list[int | None]], dict[str, int]]:
    """Return shorter sides and file formats of the photos that became samples."""
    import numpy as np

    sides, formats = np.zeros(len(EDGES), np.int64), Counter[str]()
    for batch in _table(store, folder, SOURCES, ("outcome", "width", "height", "format")):
        stored = np.array([outcome == "sample" for outcome in batch["outcome"]], np.bool_)
        width, height = (
            np.array([n or 0 for n in batch[c]], np.int64) for c in ("width", "height")
        )
        short = np.minimum(width, height)[stored]
        sides += np.bincount(np.searchsorted(EDGES, short, "right") - 1, minlength=len(EDGES))
        formats.update(str(f) for f, s in zip(batch["format"], stored, strict=True) if s)
    bounds: list[int | None] = [*EDGES[1:], None]
    found = zip(EDGES, bounds, sides.tolist(), strict=True)
    return [list(row) for row in found if row[2]], dict(formats.most_common())


def _reasons(store: Store, folder: str) -> list[dict[str, Any]]:
    """Return the most frequent reasons of failures, without numbers, each with its first item."""
    counts, first = Counter[str](), dict[str, str]()
    for batch in _table(store, folder, FAILURES, ("key", "kind", "reason")):
        for key, kind, reason in zip(batch["key"], batch["kind"], batch["reason"], strict=True):
            if kind == "failed":
                pattern = re.sub(r"\d+", "#", str(reason))
                counts[pattern] += 1
                first.setdefault(pattern, key)
    return [
        {"reason": reason, "items": number, "first": first[reason]}
        for reason, number in counts.most_common(REASONS)
    ]


def inspect_masks(store: Store, folder: str) -> dict[str, Any]:
    """Return figures of a set of masks: counts by split, and by ratio bin and recipe."""
    manifest = read_checked_manifest(store, folder)
    counts: dict[str, Counter[tuple[str, str]]] = {}
    for split in manifest.summary["splits"]:
        own = counts.setdefault(split, Counter())
        for tar in split_shards(store, folder, split):
            try:
                rows = read_index(store, tar, ("ratio_bin", "recipe"))
                own.update((row["ratio_bin"], row["recipe"]) for row in rows)
            except (FileNotFoundError, ValueError, KeyError):  # ArrowInvalid is a ValueError
                raise PipelineError(
                    f"{store.label}/{index_key(tar)} is missing or damaged: run `dpnet verify` for"
                    " details."
                ) from None
    return {
        **_described(manifest),
        "bins": {split: _nested(own) for split, own in counts.items()},
        "unreachable": manifest.summary.get("unreachable", []),
    }


def _nested(counts: Mapping[tuple[str, str], int]) -> dict[str, dict[str, int]]:
    """Return {ratio bin: {recipe: number}}, both sorted."""
    found: dict[str, dict[str, int]] = {}
    for (name, recipe), number in sorted(counts.items()):
        found.setdefault(name, {})[recipe] = number
    return found


def log_images(store: Store, name: str) -> list[dict[str, Any]]:
    """Return every version of a dataset, oldest first, with its changes from its parent.

    `other_settings` names the settings of a version without a parent that differ from those of the
    version before it.

    Raises:
        PipelineError: there is no such dataset.
    """
    found, before = [], None
    for head in committed(store, "images", name):
        manifest = read_manifest(store, head.folder)
        summary, parent = manifest.summary, _parent(manifest)
        tars = [file.path for file in manifest.files if file.path.endswith(".tar")]
        inherited = sum(path.startswith("../") for path in tars)
        settings = manifest.settings
        other = [
            option
            for option in sorted(settings.keys() | (before or {}).keys())
            if before is not None and settings.get(option) != before.get(option)
        ]
        found.append(
            {
                "digest": posixpath.basename(manifest.folder),
                "version": summary["version"],
                "created": manifest.created,
                "parent": parent,
                "splits": {s: n["samples"] for s, n in summary["splits"].items()},
                **{what: summary.get(what) for what in COUNTS},
                "shards_written": len(tars) - inherited,
                "shards_inherited": inherited,
                "other_settings": other if parent is None else [],
            }
        )
        before = settings
    return found
