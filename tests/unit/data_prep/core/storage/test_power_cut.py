"""What a folder store asks of the disk, so that a power cut loses nothing that was committed."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from data_prep.core.errors import StorageError
from data_prep.core.storage.local import LocalStore


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the list to which syncs, links and renames are added, by the names of their files."""
    seen: list[str] = []
    fsync, link, replace = os.fsync, os.link, os.replace

    def synced(descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        seen.append(f"sync {path.name}" if path.is_dir() else "sync file")
        fsync(descriptor)

    def linked(source: Any, target: Any) -> None:
        link(source, target)
        seen.append(f"link {Path(target).name}")

    def renamed(source: Any, target: Any) -> None:
        replace(source, target)
        seen.append(f"rename {Path(target).name}")

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "link", linked)
    monkeypatch.setattr(os, "replace", renamed)
    return seen


def test_a_created_file_follows_the_files_before_it_to_the_disk(
    tmp_path: Path, calls: list[str]
) -> None:
    store = LocalStore(tmp_path)
    store.write("run/state", b"1")
    calls.clear()
    assert store.create("run/manifest.json", b"2")
    assert calls == ["sync file", "sync run", "link manifest.json", "sync run"]


@pytest.mark.parametrize("how", ["write", "upload"])
def test_a_written_file_and_its_name_reach_the_disk(
    how: str, tmp_path: Path, calls: list[str]
) -> None:
    store = LocalStore(tmp_path / "root")
    store.write("run/other", b"0")
    (tmp_path / "source").write_bytes(b"1")
    calls.clear()
    if how == "write":
        store.write("run/state", b"1")
    else:
        store.upload("run/state", tmp_path / "source")
    assert calls == ["sync file", "rename state", "sync run"]


def test_new_folders_reach_the_disk_before_their_files(tmp_path: Path, calls: list[str]) -> None:
    LocalStore(tmp_path / "root").write("runs/a/state", b"1")
    assert calls[:3] == [f"sync {tmp_path.name}", "sync root", "sync runs"]
    assert calls[3:] == ["sync file", "rename state", "sync a"]


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EIO])
def test_only_a_file_system_that_cannot_sync_folders_is_excused(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, fsync = LocalStore(tmp_path), os.fsync

    def refuse(descriptor: int) -> None:
        if Path(os.readlink(f"/proc/self/fd/{descriptor}")).is_dir():
            raise OSError(number, os.strerror(number))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", refuse)
    if number == errno.EINVAL:
        assert store.create("manifest.json", b"1")
    else:
        with pytest.raises(StorageError, match="Input/output error"):
            store.create("manifest.json", b"1")
