"""Committed stages with given payloads in their shards, and a remote store."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from data_prep.core.manifest import FileRecord, StageRef
from data_prep.core.stage import Produced, Request, Work, run_stage
from data_prep.core.storage.local import LocalStore
from data_prep.core.storage.store import Store
from data_prep.shards.shards import shard_name, write_shard, write_urls


def stage_of(
    store: Store, stage: str, shards: Sequence[Sequence[bytes]], *, split: str = "train"
) -> StageRef:
    """Commit a stage of one split with these payloads in its shards.

    A sample's key is `s` and its position in the shard.
    """

    def build(work: Work) -> Produced:
        files: list[FileRecord] = []
        for number, payloads in enumerate(shards):
            samples = [(f"s{at}", {"png": data}, {}) for at, data in enumerate(payloads)]
            files += write_shard(work, shard_name(split, number), samples)
        files.append(write_urls(work, split, [shard_name(split, n) for n in range(len(shards))]))
        return Produced(files, {})

    return run_stage(store, Request(stage, "small", f"{stage}/small", {}), build)


def flip_byte(path: Path, at: int) -> None:
    """Flip all bits of one byte of a file."""
    data = bytearray(path.read_bytes())
    data[at] ^= 0xFF
    path.write_bytes(data)


class Far:
    """A local store that acts like a remote one: it has no local folder.

    A download takes `seconds` and adds a line to the file `log`.
    """

    def __init__(self, near: LocalStore, seconds: float = 0.0) -> None:
        self.near, self.seconds, self.uri, self.local_folder = near, seconds, near.uri, None
        self.log = near.folder / "downloads"

    @property
    def downloads(self) -> list[str]:
        """Return the keys of all downloads, in the order of their starts."""
        return self.log.read_text().split() if self.log.exists() else []

    @property
    def label(self) -> str:
        return self.uri

    def read(self, key: str) -> bytes:
        return self.near.read(key)

    def read_range(self, key: str, offset: int, size: int) -> bytes:
        return self.near.read_range(key, offset, size)

    def receive(self, key: str, into: BinaryIO) -> None:
        self._note_download(key)
        self._send(key, into)

    def download(self, key: str, path: Path) -> None:
        self._note_download(key)
        with path.with_name(f"{path.name}.part").open("wb") as file:
            self._send(key, file)
        path.with_name(f"{path.name}.part").replace(path)

    def _note_download(self, key: str) -> None:
        with self.log.open("a") as log:
            log.write(f"{key}\n")

    def _send(self, key: str, into: BinaryIO) -> None:
        data = self.near.read(key)
        into.write(data[: len(data) // 2])
        into.flush()
        time.sleep(self.seconds)
        into.write(data[len(data) // 2 :])
