"""Small sets of photos for tests, and readers of a committed version."""

from __future__ import annotations

import json
import posixpath
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data_prep.core.digest import sha256_bytes
from data_prep.core.manifest import StageRef, read_manifest
from data_prep.core.storage.store import Store
from data_prep.images.settings import ImagesSettings
from data_prep.shards.shards import decode_table, iterate_shard, read_index, split_shards

SPLITS = ("train", "val", "test")
PHOTOS = Path(__file__).parents[3] / "shared/data/photos"


def picture(seed: int, width: int = 80, height: int = 64) -> Image.Image:
    """Make a smooth colourful image."""
    random = np.random.Generator(np.random.Philox(seed))
    small = random.integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def photograph(path: Path, seed: int, width: int = 80, height: int = 64) -> Path:
    """Write one photo."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(seed, width, height).save(path)
    return path


def photographs(folder: Path, count: int = 12) -> Path:
    """Write photos into three subfolders."""
    for number in range(count):
        photograph(folder / f"trip {number % 3}/{number}.png", number)
    return folder


def crops(source: object, **options: Any) -> ImagesSettings:
    """Return settings for crops of 32 pixels."""
    return ImagesSettings(source=str(source), **{"size": 32, "workers": 1, **options})


def tiles(source: object, **options: Any) -> ImagesSettings:
    """Return settings for overlapping tiles."""
    defaults = {"mode": "tiles", "tile": [32, 48], "tile_stride": 0.5, "max_tiles": 40}
    return crops(source, **{**defaults, "shard_samples": 160, **options})


def files_of(store: Store, ref: StageRef) -> dict[str, str]:
    """Return the SHA-256 of each stored content file, by its path in the manifest."""
    return {
        file.path: sha256_bytes(store.read(posixpath.normpath(f"{ref.folder}/{file.path}")))
        for file in read_manifest(store, ref.folder).files
        if file.content
    }


def shards_of(store: Store, ref: StageRef) -> dict[str, str]:
    """Return the SHA-256 of each shard and index, by name, in any version's folder."""
    return {
        posixpath.basename(path): sha256
        for path, sha256 in files_of(store, ref).items()
        if posixpath.basename(path).startswith(SPLITS)
    }


def samples(store: Store, ref: StageRef, split: str) -> list[tuple[str, dict[str, bytes]]]:
    shards = split_shards(store, ref.folder, split)
    return [sample for shard in shards for sample in iterate_shard(store, shard)]


def all_samples(store: Store, ref: StageRef) -> list[tuple[str, dict[str, bytes]]]:
    return [sample for split in SPLITS for sample in samples(store, ref, split)]


def record(files: dict[str, bytes]) -> dict[str, Any]:
    return dict(json.loads(files["json"]))


def payload(files: dict[str, bytes]) -> bytes:
    (data,) = (data for extension, data in files.items() if extension != "json")
    return data


def homes(store: Store, ref: StageRef) -> dict[str, str]:
    """Return the split of every stored item; check that each item is in only one split."""
    found: dict[str, str] = {}
    for split in SPLITS:
        for _, files in samples(store, ref, split):
            key = record(files)["relative_key"]
            assert found.setdefault(key, split) == split, f"{key} is in two splits"
    return found


def rows(store: Store, ref: StageRef) -> list[dict[str, Any]]:
    """Return the rows of all indexes."""
    return [
        row
        for split in SPLITS
        for shard in split_shards(store, ref.folder, split)
        for row in read_index(store, shard)
    ]


def table(store: Store, ref: StageRef, name: str) -> list[dict[str, Any]]:
    return decode_table(store.read(f"{ref.folder}/{name}.parquet"))


def outcomes(store: Store, ref: StageRef) -> dict[str, str]:
    return {row["key"]: row["outcome"] for row in table(store, ref, "sources")}


def reasons(store: Store, ref: StageRef) -> dict[str, str]:
    return {row["key"]: row["reason"] for row in table(store, ref, "failures")}
