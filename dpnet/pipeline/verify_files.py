"""Check the files that manifests name: presence, size, sha256, and the sets of shards."""

from __future__ import annotations

import hashlib
import posixpath
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

from data_prep.core.errors import PipelineError
from data_prep.core.manifest import FileRecord, Manifest
from data_prep.core.paths import manifest_key
from data_prep.core.progress import Progress
from data_prep.core.storage.store import Store, checked_key
from data_prep.shards.check_set import STAGES, Coverage, check_set
from dpnet.pipeline.verification import Verification

CHUNK = 8 << 20  # bytes read at once, so that memory stays small with large shards
THREADS = 4  # hashing frees the interpreter lock, and S3 answers several reads at once


def check_files(store: Store, manifests: Mapping[str, Manifest], result: Verification) -> None:
    """Check presence and size of every file, then hashes, then the sets of shards.

    Args:
        store: the root.
        manifests: sound manifests by the folder of their stage.
        result: where problems and counts are added.
    """
    wrong: set[str] = set()
    present = _find_files(store, manifests, wrong, result)
    plain: dict[str, FileRecord] = {}
    for folder, records in present.items():
        shards = manifests[folder].stage in STAGES
        for key, record in records.items():
            if key not in wrong and not (shards and _is_of_shard(key, records)):
                plain.setdefault(key, record)

    def check(key: str) -> tuple[str, str]:
        size, sha256 = plain[key].size, plain[key].sha256
        try:
            return key, "" if _sha256(store, key, size) == sha256 else "was altered: another sha256"
        except FileNotFoundError:
            return key, "is missing"
        except OSError as error:
            return key, f"cannot be read: {error.strerror or error}"

    with Progress("verify", len(plain), "files") as progress, ThreadPoolExecutor(THREADS) as pool:
        for key, problem in pool.map(check, sorted(plain)):
            result.files += 1
            result.bytes += plain[key].size
            if problem:
                result.add(key, problem)
            progress.update(result.files)
    _check_sets(store, manifests, present, result)


def _check_sets(
    store: Store,
    manifests: Mapping[str, Manifest],
    present: Mapping[str, Mapping[str, FileRecord]],
    result: Verification,
) -> None:
    """Check the images and masks; a shard of several versions is read once.

    Args:
        store: the root.
        manifests: sound manifests by folder.
        present: the files of each folder, by key.
        result: where problems and counts are added.
    """
    coverage = Coverage()
    for folder in sorted(present):
        manifest, records = manifests[folder], present[folder]
        if manifest.stage not in STAGES:
            continue
        tars = sum(key.endswith(".tar") for key in records)
        with Progress(f"verify {folder}", tars, "shards") as progress:
            check_set(store, manifest, records, result.depth, coverage, result.add, progress.update)
    result.shards, result.tars = coverage.count(".tar"), coverage.count(".tar", only_read=True)
    result.indexes = coverage.count(".parquet", only_read=True)
    result.files += len(coverage.read)
    result.bytes += coverage.bytes_read
    result.unread = len(coverage.sizes) - len(coverage.read)
    result.notes += coverage.notes


def _is_of_shard(key: str, records: Mapping[str, FileRecord]) -> bool:
    """Return whether a file of a set is the tar or the index of a shard."""
    return key.endswith(".tar") or f"{key.removesuffix('.parquet')}.tar" in records


def _find_files(
    store: Store, manifests: Mapping[str, Manifest], wrong: set[str], result: Verification
) -> dict[str, dict[str, FileRecord]]:
    """Return the files that each manifest names, by folder and key.

    Args:
        store: the root.
        manifests: sound manifests by folder.
        wrong: where the keys of missing files and of files of another size are added.
        result: where problems are added. A path outside the root is a problem and is left out.
    """
    listings: dict[str, dict[str, int]] = {}
    hashes: dict[str, str] = {}
    found: dict[str, dict[str, FileRecord]] = {}
    for folder, manifest in manifests.items():
        own = found.setdefault(folder, {})
        for record in manifest.files:
            key = posixpath.normpath(posixpath.join(folder, record.path))
            where = manifest_key(folder)
            if not _is_inside(key):
                result.add(where, f"was altered: {record.path} is not inside the root")
                continue
            if not key.startswith(f"{folder}/"):
                _check_inherited(manifests, folder, key, record, result)
            home = folder if key.startswith(f"{folder}/") else posixpath.dirname(key)
            if home not in listings:
                listings[home] = {entry.key: entry.size for entry in store.list(home)}
            size = listings[home].get(key)
            if size is None:
                result.add(key, "is missing")
            elif size != record.size:
                result.add(key, f"was altered: it has {size} bytes, not {record.size}")
            elif hashes.setdefault(key, record.sha256) != record.sha256:
                result.add(key, "two manifests name it with different hashes")
            if size != record.size:
                wrong.add(key)
            own[key] = record
    return found


def _is_inside(key: str) -> bool:
    """Return whether a key from a manifest is in a folder inside the root."""
    try:
        return "/" in checked_key(key)
    except PipelineError:
        return False


def _check_inherited(
    manifests: Mapping[str, Manifest],
    folder: str,
    key: str,
    record: FileRecord,
    result: Verification,
) -> None:
    """Check that an ancestor made a file outside the set's own folder, with the same hash.

    Args:
        manifests: sound manifests by folder.
        folder: the folder of the manifest that names the file.
        key: the file's key.
        record: the file's size and hash, as that manifest states them.
        result: where problems are added.
    """
    home, where = posixpath.dirname(key), manifest_key(folder)
    ancestors, at = set[str](), folder
    while at in manifests and (parent := manifests[at].inputs.get("parent")):
        at = parent.folder
        if at in ancestors:
            break
        ancestors.add(at)
    if home not in ancestors:
        result.add(where, f"names {record.path}, but no ancestor made {home}")
    elif home in manifests:
        made = {file.path: file for file in manifests[home].files}
        known = made.get(posixpath.basename(key))
        if known is None or (known.size, known.sha256) != (record.size, record.sha256):
            result.add(where, f"names {record.path}, but the version that made it differs")


def _sha256(store: Store, key: str, size: int) -> str:
    sha256 = hashlib.sha256()
    for offset in range(0, size, CHUNK):
        sha256.update(store.read_range(key, offset, min(CHUNK, size - offset)))
    return sha256.hexdigest()
