"""Walk the chain of digests and check every hash: an fsck of a root.

Checked: each file's presence, size and sha256 against its stage's manifest; each manifest's own
request and content digest; that every input it names is there and is still what it was; and that
the registry's records are whole and point at committed runs and evaluations with the digests they
state.
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

from data_prep import digest
from data_prep.errors import PipelineError
from data_prep.progress import Progress
from data_prep.stage import MANIFEST, FileRecord, Request, StageRef, read_manifest
from data_prep.storage import LocalStore, Store, open_store
from dpnet.register import CHAMPION, INPUTS, RECORD, find_record

CHUNK = 8 << 20  # bytes read at once, so that memory stays small with large shards
THREADS = 4  # hashing frees the interpreter lock, and S3 answers several reads at once
_RECORD_KEY = re.compile(rf"registry/([^/]+)/(?:{CHAMPION}|v(\d+))\.json")

Manifest = dict[str, Any]


@dataclass(frozen=True)
class Problem:
    """Something missing or altered; `where` is a key under the root."""

    where: str
    problem: str


@dataclass
class Verification:
    """What was checked, and what is wrong."""

    root: str
    target: str  # "" for the whole root
    stages: int = 0
    records: int = 0
    files: int = 0
    bytes: int = 0
    problems: list[Problem] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.problems

    def add(self, where: str, problem: str) -> None:
        self.problems.append(Problem(where, problem))

    def to_json(self) -> dict[str, Any]:
        return {"ok": self.ok, **asdict(self)}


def verify_uri(uri: str, root: str = "") -> Verification:
    """Verify what a path or URI names: a root, a stage's folder (or manifest) in it, or a model.

    `root` is where `models:/…` is looked up. Raises PipelineError if there is nothing to verify.
    """
    if uri.startswith("models:/"):
        return verify(open_store(root), uri)
    store = open_store(uri.removesuffix(MANIFEST).rstrip("/") or ".")
    if isinstance(store, LocalStore) and not store.folder.is_dir():
        what = "is a file" if store.folder.exists() else "does not exist"
        raise PipelineError(
            f"{store.folder} {what}: name a root, a stage's folder in it or models:/NAME@champion."
        )
    try:
        folder = str(json.loads(store.read(MANIFEST))["folder"])
    except (FileNotFoundError, NotADirectoryError):
        return verify(store)
    except (ValueError, KeyError, TypeError):
        raise PipelineError(f"{uri}: its manifest was altered; verify the whole root.") from None
    if not store.uri.endswith(f"/{folder}"):
        raise PipelineError(
            f"{uri} was moved: its manifest says that it is {folder} under its root; move it back."
        )
    return verify(open_store(store.uri.removesuffix(f"/{folder}")), folder)


def verify(store: Store, target: str = "") -> Verification:
    """Verify the whole root ("" as `target`), or one stage's folder or `models:/…` with everything
    that it was made from. Raises PipelineError if there is no such thing."""
    result = Verification(store.uri, target)
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
    result.problems.sort(key=lambda p: (p.where, p.problem))
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
    files = [FileRecord(**f) for f in manifest["files"]]
    content = digest.content_digest((f.path, f.sha256) for f in files if f.content)
    if content != manifest["content_digest"]:
        result.add(where, "was altered: its content digest does not follow from its files")


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
        for role in INPUTS:
            _check_named(store, f"its {role}", record[role], key, result)
    except (ValueError, KeyError, TypeError):
        result.add(key, "was altered: it is not a whole record")
        return
    if not store.exists(f"{folder}/{MANIFEST}"):
        result.add(key, "its registration was never finished: run the same command again")
    elif not store.exists(f"{folder}/{RECORD}") or store.read(f"{folder}/{RECORD}") != data:
        result.add(key, f"differs from what was registered: {folder}/{RECORD}")


def _check_files(store: Store, manifests: Mapping[str, Manifest], result: Verification) -> None:
    """Check presence, size and hash of every file, several at a time."""
    listings: dict[str, dict[str, int]] = {}
    wanted: dict[str, tuple[int, str]] = {}
    for folder, manifest in manifests.items():
        for record in manifest["files"]:
            key = posixpath.normpath(posixpath.join(folder, record["path"]))
            if key.startswith(("../", "/")):
                result.add(f"{folder}/{MANIFEST}", f"was altered: {record['path']} is not inside")
                continue
            home = folder if key.startswith(f"{folder}/") else posixpath.dirname(key)
            if home not in listings:
                listings[home] = {entry.key: entry.size for entry in store.list(home)}
            size = listings[home].get(key)
            if size is None:
                result.add(key, "is missing")
            elif size != record["size"]:
                result.add(key, f"was altered: it has {size} bytes, not {record['size']}")
            elif wanted.setdefault(key, (size, record["sha256"]))[1] != record["sha256"]:
                result.add(key, "is named with two different hashes")

    def check(key: str) -> tuple[str, str]:
        size, sha256 = wanted[key]
        try:
            return key, "" if _sha256(store, key, size) == sha256 else "was altered: another sha256"
        except FileNotFoundError:
            return key, "is missing"
        except OSError as error:
            return key, f"cannot be read: {error.strerror or error}"

    with Progress("verify", len(wanted), "files") as progress, ThreadPoolExecutor(THREADS) as pool:
        for key, problem in pool.map(check, sorted(wanted)):
            result.files += 1
            result.bytes += wanted[key][0]
            if problem:
                result.add(key, problem)
            progress.update(result.files)


def _sha256(store: Store, key: str, size: int) -> str:
    sha256 = hashlib.sha256()
    for offset in range(0, size, CHUNK):
        sha256.update(store.read_range(key, offset, min(CHUNK, size - offset)))
    return sha256.hexdigest()
