"""Walk the chain of digests and check every hash: an fsck of a root.

Checked: each file's presence, size and sha256 against its stage's manifest; each manifest's own
request and content digest; that every input it names is there and is still what it was, and that
files of an earlier version are what that version made; every sample, list and account of images and
masks (`data_prep/shards/check_set.py`); and that the registry's records are whole and point at
committed runs and evaluations with the digests they state.
"""

from __future__ import annotations

import hashlib
import json
import posixpath
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

from data_prep.core import digest
from data_prep.core.errors import PipelineError
from data_prep.core.progress import Progress
from data_prep.core.stage import (
    MANIFEST,
    FileRecord,
    Request,
    StageRef,
    content_digest,
    read_manifest,
)
from data_prep.core.storage.open import open_store
from data_prep.core.storage.store import Store, checked_key
from data_prep.shards.check_set import STAGES, Coverage, Depth, check_set
from dpnet.model_store.records import AGAINST, CHAMPION, INPUTS, RECORD, find_record

CHUNK = 8 << 20  # bytes read at once, so that memory stays small with large shards
THREADS = 4  # hashing frees the interpreter lock, and S3 answers several reads at once
_RECORD_KEY = re.compile(rf"registry/([^/]+)/(?:{CHAMPION}|v(\d+))\.json")

EVERYTHING = Depth()
_SHA256 = re.compile(r"[0-9a-f]{64}")

Manifest = dict[str, Any]


@dataclass(frozen=True)
class Problem:
    """Something missing or altered; `where` is a key under the root."""

    where: str
    problem: str


@dataclass
class Verification:
    """What was checked, and what is wrong.

    `files` and `bytes` were read in full. `shards` are those of images and masks, `tars` and
    `indexes` say of how many both parts were read; `unread` files are there in their right size.
    """

    root: str
    target: str  # "" for the whole root
    depth: Depth = EVERYTHING
    stages: int = 0
    records: int = 0
    files: int = 0
    bytes: int = 0
    shards: int = 0
    tars: int = 0
    indexes: int = 0
    unread: int = 0
    notes: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.problems

    def add(self, where: str, problem: str) -> None:
        self.problems.append(Problem(where, problem))

    def covered(self) -> str:
        """What was read and what was not, in words."""
        stages = f"{self.stages} stage{'s'[: self.stages != 1]}"
        text = f"{self.files} files ({self.bytes / 1e6:.1f} MB) of {stages}"
        if self.depth.everything:
            return text
        return (
            f"{text}, {self.tars} of {self.shards} tars and {self.indexes} indexes among them;"
            f" of {self.unread} more files presence and size alone"
        )

    def to_json(self) -> dict[str, Any]:
        return {"ok": self.ok, **asdict(self)}


def verify_uri(uri: str, root: str = "", depth: Depth = EVERYTHING) -> Verification:
    """Verify what a path or URI names: a root, a stage's folder (or manifest) in it, or a model.

    `depth` says how much is read of shards; `root` is where `models:/…` is looked up. Raises
    PipelineError if there is nothing to verify.
    """
    if uri.startswith("models:/"):
        return verify(open_store(root), uri, depth)
    store = open_store(uri.removesuffix(MANIFEST).rstrip("/") or ".")
    top = store.local_folder
    if top is not None and not top.is_dir():
        what = "is a file" if top.exists() else "does not exist"
        raise PipelineError(
            f"{top} {what}: name a root, a stage's folder in it or models:/NAME@champion."
        )
    try:
        folder = str(json.loads(store.read(MANIFEST))["folder"])
    except (FileNotFoundError, NotADirectoryError):
        return verify(store, depth=depth)
    except (ValueError, KeyError, TypeError):
        raise PipelineError(f"{uri}: its manifest was altered; verify the whole root.") from None
    if not store.uri.endswith(f"/{folder}"):
        raise PipelineError(
            f"{uri} was moved: its manifest says that it is {folder} under its root; move it back."
        )
    return verify(open_store(store.uri.removesuffix(f"/{folder}")), folder, depth)


def verify(store: Store, target: str = "", depth: Depth = EVERYTHING) -> Verification:
    """Verify the whole root ("" as `target`), or one stage's folder or `models:/…` with everything
    that it was made from. Raises PipelineError if there is no such thing."""
    result = Verification(store.uri, target, depth)
    if target.startswith("models:/"):
        record = find_record(store, target)
        records = [f"registry/{record['model']}/v{record['version']}.json"]
        folders = [_registration(record)]
    elif target:
        read_manifest(store, target)  # for its sentence, if that stage was never finished
        records, folders = [], [target]
    else:
        keys = [entry.key for entry in store.list()]
        records = [key for key in keys if _RECORD_KEY.fullmatch(key)]
        folders = [posixpath.dirname(k) for k in keys if posixpath.basename(k) == MANIFEST]
        if not folders:
            raise PipelineError(
                f"{store.uri} holds no finished stage: name a root (the folder given as --root),"
                " a stage's folder in it, or models:/NAME@champion."
            )
    for key in records:
        result.records += 1
        _check_record(store, key, result)
    _check_files(store, _walk(store, folders, result), result)
    # One thing may be seen twice, in a listing and in what was read. Those of a file stay in order.
    result.problems = sorted(dict.fromkeys(result.problems), key=lambda p: p.where)
    return result


def _walk(store: Store, folders: list[str], result: Verification) -> dict[str, Manifest]:
    """The sound manifests of `folders` and of everything they were made from, by folder."""
    sound: dict[str, Manifest] = {}
    pending, seen = sorted(folders, reverse=True), set(folders)
    while pending:
        folder = pending.pop()
        where = f"{folder}/{MANIFEST}"
        try:
            manifest = read_manifest(store, folder)
            _check_digests(manifest, where, result)
            inputs = {r: (str(n["folder"]), n) for r, n in manifest["inputs"].items()}
        except PipelineError as error:
            result.add(where, str(error))
            continue
        except (KeyError, TypeError, AttributeError, ValueError):
            result.add(where, "was altered: it is not a whole manifest")
            continue
        result.stages += 1
        sound[folder] = manifest
        for role, (source, named) in inputs.items():
            if _check_named(store, f"its input {role!r}", named, where, result):
                if source not in seen:
                    pending.append(source)
                seen.add(source)
    return sound


def _check_digests(manifest: Manifest, where: str, result: Verification) -> None:
    """Compute both digests of a manifest again from what it says."""
    request = Request(
        stage=manifest["stage"],
        name=manifest["name"],
        top=posixpath.dirname(manifest["folder"]),
        settings=manifest["settings"],
        inputs={role: _reference(named) for role, named in manifest["inputs"].items()},
        sources=manifest["sources"],
    )
    short = request.digest[: digest.SHORT]
    if request.digest != manifest["request_digest"] or not manifest["folder"].endswith(short):
        result.add(where, "was altered: its request digest does not follow from what it says")
    if content_digest(_records(manifest)) != manifest["content_digest"]:
        result.add(where, "was altered: its content digest does not follow from its files")


def _records(manifest: Manifest) -> list[FileRecord]:
    """The files of a manifest. Raises ValueError or TypeError if they are not said as they are."""
    records = [FileRecord(**file) for file in manifest["files"]]
    for record in records:
        if not (isinstance(record.path, str) and isinstance(record.sha256, str)):
            raise TypeError(record)
        if type(record.size) is not int or not _SHA256.fullmatch(record.sha256):
            raise ValueError(record)
    return records


def _reference(named: Mapping[str, Any]) -> StageRef:
    """An input as a manifest names it."""
    return StageRef(
        stage=named["stage"],
        name="",
        folder=named["folder"],
        request_digest=named["request_digest"],
        content_digest=named["content_digest"],
        seconds=0.0,
        skipped=True,
    )


def _check_named(
    store: Store, what: str, named: Mapping[str, Any], where: str, result: Verification
) -> bool:
    """Whether the stage that `where` names is there; told if it is not, or is another one now."""
    try:
        manifest = read_manifest(store, str(named["folder"]))
    except PipelineError as error:
        result.add(where, f"{what} is not there: {error}")
        return False
    for kind in ("request_digest", "content_digest"):
        if manifest.get(kind) != named.get(kind):
            result.add(where, f"{what}, {named['folder']}, has another {kind.replace('_', ' ')}")
    return True


def _registration(record: Mapping[str, Any]) -> str:
    """Folder of the stage that wrote a registry record."""
    return f"registry/{record['model']}/{record['request_digest'][: digest.SHORT]}"


def _check_record(store: Store, key: str, result: Verification) -> None:
    """A record must be the one its registration made, and name a run and an evaluation as they
    are."""
    match = _RECORD_KEY.fullmatch(key)
    assert match is not None
    data = store.read(key)
    try:
        record = json.loads(data)
        folder = _registration(record)
        if record["model"] != match[1] or match[2] not in (None, str(record["version"])):
            result.add(key, "was altered: it is the record of another version")
        for role in (*INPUTS, *([AGAINST] if AGAINST in record else [])):
            _check_named(store, f"its {role}", record[role], key, result)
    except (ValueError, KeyError, TypeError):
        result.add(key, "was altered: it is not a whole record")
        return
    if not store.exists(f"{folder}/{MANIFEST}"):
        result.add(key, "its registration was never finished: run the same command again")
    elif not store.exists(f"{folder}/{RECORD}") or store.read(f"{folder}/{RECORD}") != data:
        result.add(key, f"differs from what was registered: {folder}/{RECORD}")


def _check_files(store: Store, manifests: Mapping[str, Manifest], result: Verification) -> None:
    """Check presence and size of every file, the hashes of those that are no shards several at a
    time, and then every set of shards."""
    wrong: set[str] = set()
    present = _present(store, manifests, wrong, result)
    plain: dict[str, FileRecord] = {}
    for folder, records in present.items():
        shards = manifests[folder]["stage"] in STAGES
        for key, record in records.items():
            if key not in wrong and not (shards and _of_shard(key, records)):
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
    """Check the images and masks; a shard of several versions is read once."""
    coverage = Coverage()
    for folder in sorted(present):
        manifest, records = manifests[folder], present[folder]
        if manifest["stage"] not in STAGES:
            continue
        tars = sum(key.endswith(".tar") for key in records)
        with Progress(f"verify {folder}", tars, "shards") as progress:
            check_set(store, manifest, records, result.depth, coverage, result.add, progress.update)
    result.shards, result.tars = coverage.count(".tar"), coverage.count(".tar", only_read=True)
    result.indexes = coverage.count(".parquet", only_read=True)
    result.files += len(coverage.read)
    result.bytes += coverage.bytes_read
    result.unread = len(coverage.sizes) - len(coverage.read)
    result.notes = coverage.notes


def _of_shard(key: str, records: Mapping[str, FileRecord]) -> bool:
    """Whether a file of a set is the tar or the index of a shard."""
    return key.endswith(".tar") or f"{key.removesuffix('.parquet')}.tar" in records


def _present(
    store: Store, manifests: Mapping[str, Manifest], wrong: set[str], result: Verification
) -> dict[str, dict[str, FileRecord]]:
    """By folder the files that its manifest names, by their keys under the root.

    Those that are missing or of another size are told of and added to `wrong`; a path that is not
    inside the root is told of and left out.
    """
    listings: dict[str, dict[str, int]] = {}
    hashes: dict[str, str] = {}
    found: dict[str, dict[str, FileRecord]] = {}
    for folder, manifest in manifests.items():
        own = found.setdefault(folder, {})
        for record in _records(manifest):
            key = posixpath.normpath(posixpath.join(folder, record.path))
            where = f"{folder}/{MANIFEST}"
            if not _inside(key):
                result.add(where, f"was altered: {record.path} is not inside")
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
                result.add(key, "is named with two different hashes")
            if size != record.size:
                wrong.add(key)
            own[key] = record
    return found


def _inside(key: str) -> bool:
    """Whether a key from a manifest is one inside the root, in a folder of it."""
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
    """A file outside a set's own folder must be one that an ancestor made, with the same hash."""
    home, where = posixpath.dirname(key), f"{folder}/{MANIFEST}"
    ancestors, at = set[str](), folder
    while at in manifests and (parent := manifests[at]["inputs"].get("parent")):
        at = str(parent["folder"])
        if at in ancestors:
            break
        ancestors.add(at)
    if home not in ancestors:
        result.add(where, f"names {record.path}, which is of no version that it comes from")
    elif home in manifests:
        made = {file.path: file for file in _records(manifests[home])}
        known = made.get(posixpath.basename(key))
        if known is None or (known.size, known.sha256) != (record.size, record.sha256):
            result.add(where, f"names {record.path} otherwise than the version that made it")


def _sha256(store: Store, key: str, size: int) -> str:
    sha256 = hashlib.sha256()
    for offset in range(0, size, CHUNK):
        sha256.update(store.read_range(key, offset, min(CHUNK, size - offset)))
    return sha256.hexdigest()
