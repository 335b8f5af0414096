"""Decide what in a root is garbage. Nothing here reads or deletes: `collect_garbage.py` does.

A finished run, a set of masks, a retrain and everything in the registry is always kept. A committed
stage is garbage only if no kept stage names it in its manifest, directly or through other stages.
"""

from __future__ import annotations

import math
import posixpath
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from data_prep.core.manifest import Manifest
from data_prep.core.paths import (
    EVALUATIONS,
    IMAGES,
    LEASE,
    MANIFEST,
    MASKS,
    MLFLOW_ARTIFACTS,
    MLFLOW_DATABASE,
    PHOTOS,
    PREFECT,
    REGISTRY,
    RETRAINS,
    RUNS,
    TRAINING_LEASE,
    UP,
    lease_key,
    manifest_key,
    parse_history_key,
    parse_record_key,
    parse_vote_key,
)
from data_prep.core.storage.store import Entry

MARK = "garbage.json"  # in a folder that gc is deleting
WATCH_LEASE = "watch-lease.json"
LEASES = (LEASE, TRAINING_LEASE, WATCH_LEASE)

CHECKPOINTS, UNFINISHED, VERSIONS = "checkpoints", "unfinished stages", "dataset versions"
PICTURES, LEFTOVERS = "pictures in MLflow", "leftovers"
# In the order of deletion: evaluations and unfinished runs use versions, and versions older ones.
KINDS = (EVALUATIONS, UNFINISHED, VERSIONS, CHECKPOINTS, LEFTOVERS, PICTURES)

_DAY = 86_400.0  # seconds
_STAGE = re.compile(
    rf"(?:(?:{RUNS}|{EVALUATIONS})/[^/]+"
    rf"|(?:{IMAGES}|{MASKS}|{RETRAINS})/[^/]+/[^/]+"
    rf"|{REGISTRY}/[^/]+/(?!history/|votes/)[^/]+)(?=/.)"
)
_STEP = re.compile(r"(step-(\d{8,})(?:\.\d+)?)/(?:checkpoint\.json|state\.pt|log\.jsonl)")
_ALWAYS = rf"{re.escape(MANIFEST)}|{re.escape(LEASE)}|{re.escape(MARK)}"
# What the stages write into their folders, by the folder under the root.
_OWN = {
    RUNS: rf"{_STEP.pattern}|{re.escape(TRAINING_LEASE)}|status\.json|log\.jsonl|log/\d+\.jsonl"
    r"|pictures/[^/]+|model/(?:generator\.safetensors|model\.json)|resolved-config\.yaml",
    EVALUATIONS: r"metrics\.parquet|report\.(?:json|html)|pictures/[^/]+\.png"
    r"|parts/[^/]+\.(?:json|npy)",
    IMAGES: r"(?:train|val|test)(?:-\d{6,}\.(?:tar|parquet)|\.urls)|config\.json|work/[^/]+"
    r"|(?:failures|duplicates|near_duplicates|sources)\.parquet",
    MASKS: r"(?:train|eval)(?:-\d{6,}\.(?:tar|parquet)|\.urls)|sources\.parquet",
    REGISTRY: r"record\.json|README\.md",
    RETRAINS: r"(?:plan|rival|retrain)\.json",
}
_FILES = {top: re.compile(f"{_ALWAYS}|{own}") for top, own in _OWN.items()}
_BESIDE = re.compile(  # files next to the folders of stages
    rf"{IMAGES}/[^/]+/(?:watch\.json|{LEASE}|{WATCH_LEASE})|{REGISTRY}/[^/]+/{LEASE}"
)
_NOT_OURS_TO_DELETE = tuple(f"{top}/" for top in (PHOTOS, PREFECT, UP, MLFLOW_ARTIFACTS))
# Folders in which a stage keeps intermediate results until its commit.
_INTERMEDIATE = {IMAGES: "work/", EVALUATIONS: "parts/", RUNS: "log/"}
_PICTURE = re.compile(rf"({MLFLOW_ARTIFACTS}/([0-9a-f]{{32}})/artifacts/pictures)/[^/]+")
_DIGEST = re.compile(r"(?:.*-)?[0-9a-f]{12}")


@dataclass(frozen=True)
class Contents:
    """The contents of a root.

    Attributes:
        files: every object of the root, by key.
        manifests: of every committed stage, by folder.
        registered: folders that a version of a model, the history or a started retrain names.
        running: keys of the leases that a runner holds, or may hold.
        wanted: content digests of the inputs of unfinished runs, by the run's folder.
        abandoned: temporary objects of killed writers.
        mlflow_runs: ids of MLflow's runs, or None if MLflow cannot be read.
        now: the time in seconds since 1970.
        days: the age from which an unfinished stage is garbage.
    """

    files: Mapping[str, Entry]
    manifests: Mapping[str, Manifest]
    registered: frozenset[str] = frozenset()
    running: frozenset[str] = frozenset()
    wanted: Mapping[str, frozenset[str]] = field(default_factory=dict)
    abandoned: tuple[Entry, ...] = ()
    mlflow_runs: frozenset[str] | None = None
    now: float = 0.0
    days: float = 7.0


class Unit(NamedTuple):
    """Garbage that is deleted together.

    Attributes:
        kind: one of KINDS.
        folder: the folder that it is in.
        keys: of its objects, in the order of deletion.
        size: in bytes.
        why: the reason, without a full stop.
        leases: keys of the leases to hold while it is deleted.
        whole: whether the folder of a stage goes.
    """

    kind: str
    folder: str
    keys: tuple[str, ...]
    size: int
    why: str
    leases: tuple[str, ...] = ()
    whole: bool = False


@dataclass
class Findings:
    """The garbage of a root, the number of kept things by kind and reason, and unknown files."""

    units: list[Unit] = field(default_factory=list)
    kept: Counter[tuple[str, str]] = field(default_factory=Counter)
    unknown: list[str] = field(default_factory=list)


def stage_folder(key: str) -> str | None:
    """Return the folder of the stage that an object belongs to, or None."""
    match = _STAGE.match(key)
    return match[0] if match else None


def lost_manifests(contents: Contents) -> Iterator[tuple[str, str]]:
    """Yield each stage that has files and no manifest, although a manifest or record names it.

    Yields:
        The folder, and the folder or record that names it.
    """
    named = dict.fromkeys(sorted(contents.registered), REGISTRY)
    for folder, manifest in contents.manifests.items():
        named |= {ref.folder: folder for ref in manifest.inputs.values()}
    there = {stage_folder(key) for key in contents.files if _name(key) not in LEASES}
    for folder, by in sorted(named.items()):
        if folder in there and folder not in contents.manifests:
            yield folder, by


def find_garbage(contents: Contents) -> Findings:
    """Return what is garbage, what is kept and why, and the files that nobody knows."""
    found = Findings()
    stages: dict[str, list[str]] = {}
    for key in contents.files:
        folder = stage_folder(key)
        if folder is not None:
            stages.setdefault(folder, []).append(key)
        elif not _is_known_elsewhere(key):
            found.unknown.append(key)
    for folder in sorted(stages):
        known = set(_known(contents, folder, stages[folder]))
        found.unknown += [key for key in stages[folder] if key not in known]
        stages[folder] = [key for key in stages[folder] if key in known]
    for folder in stages.keys() - contents.manifests.keys():
        _judge_unfinished(contents, folder, stages[folder], found)
    users = _find_users(contents, stages, found)
    for folder, keys in stages.items():
        if folder not in contents.manifests:
            continue
        _judge_intermediate(contents, folder, keys, found)
        if folder.startswith(f"{RUNS}/"):
            found.kept[RUNS, "finished"] += 1
            _judge_checkpoints(contents, folder, keys, found)
        elif folder not in users:
            kind = VERSIONS if folder.startswith(f"{IMAGES}/") else EVALUATIONS
            found.units.append(_whole(contents, kind, folder, keys, _WHY[kind]))
    _judge_abandoned(contents, found)
    _judge_pictures(contents, found)
    found.units.sort(key=lambda unit: _order(contents, unit))
    found.unknown.sort()
    return found


_WHY = {
    EVALUATIONS: "its run is gone, or is neither registered nor the newest",
    VERSIONS: "nothing that is kept was made from it",
}


def names(contents: Contents, folder: str, gone: Iterable[str] = ()) -> bool:
    """Return whether the manifest of a committed stage names a folder, except those in `gone`."""
    without = set(gone)
    return any(
        ref.folder == folder
        for user, manifest in contents.manifests.items()
        if user not in without
        for ref in manifest.inputs.values()
    )


def _find_users(contents: Contents, stages: Mapping[str, list[str]], found: Findings) -> set[str]:
    """Return the committed folders that are kept, and count them by reason."""
    manifests, kept = contents.manifests, dict[str, str]()

    def keep(folders: Iterable[str], why: str) -> None:
        """Keep folders with everything that they were made from."""
        pending = list(folders)
        while pending:
            folder = pending.pop()
            if folder not in kept:
                kept[folder] = why
                if folder in manifests:
                    pending += sorted(_made_from(manifests[folder]))

    ours = [f for f in manifests if f.startswith((f"{REGISTRY}/", f"{RETRAINS}/"))]
    keep([*sorted(contents.registered), *ours], "in the registry, or needed by it")
    registered = {folder for folder in kept if folder.startswith(f"{RUNS}/")}
    keep([f for f in manifests if f.startswith(f"{RUNS}/")], "used by a run")
    keep([f for f in manifests if not _may_go(f)], "used by another stage")
    newest = _newest_runs(manifests)
    for folder, manifest in manifests.items():
        if folder.startswith(f"{EVALUATIONS}/"):
            run = manifest.inputs["run"].folder if "run" in manifest.inputs else ""
            if run not in manifests:
                continue
            if run in registered:
                keep([folder], "of a registered run")
            elif run in newest:
                keep([folder], "of the newest run")
    keep(_newest_versions(manifests), "the newest version, or needed by it")
    going = {unit.folder for unit in found.units}  # unfinished stages
    wanted = {
        digest for run, each in contents.wanted.items() if run not in going for digest in each
    }
    keep([f for f, m in manifests.items() if m.content_digest in wanted], "used by a run")
    if contents.running:  # what a running stage reads is recorded only when it ends
        keep(sorted(filter(_may_go, manifests)), "a stage is running and may need it")
    for folder, why in kept.items():
        top = folder.partition("/")[0]
        kind = {IMAGES: VERSIONS, EVALUATIONS: EVALUATIONS}.get(top)
        if kind and folder in stages and folder in manifests:
            found.kept[kind, why] += 1
    return set(kept)


def _may_go(folder: str) -> bool:
    """Return whether a committed stage in this folder can be garbage."""
    return folder.startswith((f"{EVALUATIONS}/", f"{IMAGES}/"))


def _made_from(manifest: Manifest) -> set[str]:
    """Return the folders that a stage was made from, and those whose files it refers to."""
    folders = {ref.folder for ref in manifest.inputs.values()}
    for file in manifest.files:
        if file.path.startswith("../"):
            key = posixpath.normpath(posixpath.join(manifest.folder, file.path))
            folders.add(posixpath.dirname(key))
    return folders


def _newest_runs(manifests: Mapping[str, Manifest]) -> set[str]:
    """Return the newest finished run of each name."""
    newest: dict[str, tuple[str, str]] = {}
    for folder, manifest in manifests.items():
        if folder.startswith(f"{RUNS}/"):
            newest[manifest.name] = max(
                newest.get(manifest.name, ("", "")), (manifest.created, folder)
            )
    return {folder for _, folder in newest.values()}


def _newest_versions(manifests: Mapping[str, Manifest]) -> list[str]:
    """Return the newest version of each dataset, by the order of `dpnet images log`."""
    newest: dict[str, tuple[tuple[float, str], str]] = {}
    for folder, manifest in manifests.items():
        if folder.startswith(f"{IMAGES}/"):
            top = posixpath.dirname(folder)
            order = (_number_of(manifest), manifest.created)
            newest[top] = max(newest.get(top, ((-1.0, ""), "")), (order, folder))
    return sorted(folder for _, folder in newest.values())


def _number_of(manifest: Manifest) -> float:
    """Return the number of a dataset version; 0 if the manifest has none."""
    number = manifest.summary.get("version")
    return float(number) if isinstance(number, int) else 0.0


def _judge_checkpoints(
    contents: Contents, folder: str, keys: Iterable[str], found: Findings
) -> None:
    """Find the checkpoints of a finished run that no longer training can start from."""
    manifest = contents.manifests[folder]
    listed = {f"{folder}/{file.path}" for file in manifest.files}
    steps: dict[str, int] = {}
    objects: dict[str, list[str]] = {}
    for key in keys:
        match = _STEP.fullmatch(key.removeprefix(f"{folder}/"))
        if match and key not in listed:
            steps[match[1]] = int(match[2])
            objects.setdefault(match[1], []).append(key)
    if not steps:
        return
    marked = {name: n for name, n in steps.items() if f"{folder}/{name}/{_CHECKPOINT}" in keys}
    name = folder.rpartition("-")[0]
    if any(key.startswith(f"{name}-") for key in contents.running):
        found.kept[CHECKPOINTS, "a training of this name is running"] += len(steps)
        return
    useful = _useful_steps(manifest, set(marked.values()))
    if useful is None:
        found.kept[CHECKPOINTS, "the manifest does not say where fine-tuning began"] += len(steps)
        return
    kept = {each for each, step in marked.items() if step in useful}
    if kept:
        found.kept[CHECKPOINTS, "a longer training can start from it"] += len(kept)
    # The mark first, as training deletes them: no marked checkpoint is ever incomplete.
    gone = [
        key
        for each in sorted(objects.keys() - kept)
        for key in sorted(objects[each], key=lambda key: (_name(key) != _CHECKPOINT, key))
    ]
    if gone:
        why = "the run is finished"
        found.units.append(
            Unit(CHECKPOINTS, folder, tuple(gone), _size(contents, gone), why, (lease_key(folder),))
        )


_CHECKPOINT = "checkpoint.json"


def _useful_steps(manifest: Manifest, steps: set[int]) -> set[int] | None:
    """Return the steps whose checkpoints a longer training may start from; None if unknown.

    It starts from the last one before fine-tuning (`dpnet/training/extend.py`). If there was no
    fine-tuning, it may need one from before the last step, because that step was validated.
    """
    train = manifest.settings.get("train")
    if not isinstance(train, dict):
        return None
    total, share = train.get("steps"), train.get("finetune_share")
    if not isinstance(total, int) or not isinstance(share, int | float):
        return None
    constant = math.floor(total * (1 - share))  # as `TrainSettings.constant_until`
    limits = [constant, constant - 1] if constant == total else [constant]
    before = [[step for step in steps if step <= limit] for limit in limits]
    return {max(some) for some in before if some}


def _judge_unfinished(contents: Contents, folder: str, keys: list[str], found: Findings) -> None:
    """Decide about a stage without a manifest: garbage if it is old and nobody works on it."""
    top = folder.partition("/")[0]
    own = [key for key in keys if _name(key) not in LEASES]
    if not own:  # on S3 the record of a released lease stays
        return
    if top in (REGISTRY, RETRAINS):
        found.kept[UNFINISHED, "of the registry, or a retrain"] += 1
        return
    if any(posixpath.dirname(key) == folder for key in contents.running):
        found.kept[UNFINISHED, "running"] += 1
        return
    mark = contents.files.get(f"{folder}/{MARK}")
    written = [contents.files[key].modified for key in own if _name(key) != MARK]
    times = [time for time in written if time is not None]
    if mark is not None and mark.modified is not None and all(t <= mark.modified for t in times):
        why = "gc was interrupted while it deleted this"
    elif len(times) < len(written):
        found.kept[UNFINISHED, "of unknown age"] += 1
        return
    elif contents.now - max(times, default=0.0) < contents.days * _DAY:
        found.kept[UNFINISHED, f"younger than {contents.days:g} days"] += 1
        return
    else:
        why = f"unfinished, and not touched for {contents.days:g} days"
    found.units.append(_whole(contents, UNFINISHED, folder, own, why))


def _judge_intermediate(
    contents: Contents, folder: str, keys: Iterable[str], found: Findings
) -> None:
    """Find intermediate results of a committed stage, which a killed writer left."""
    inside = _INTERMEDIATE.get(folder.partition("/")[0], "")
    listed = {f"{folder}/{file.path}" for file in contents.manifests[folder].files}
    left = [
        key
        for key in keys
        if key not in listed
        and (key == f"{folder}/{MARK}" or (inside and key.startswith(f"{folder}/{inside}")))
    ]
    if left:
        why = "intermediate results of a finished stage"
        leases = (lease_key(folder),)
        found.units.append(Unit(LEFTOVERS, folder, tuple(left), _size(contents, left), why, leases))


def _judge_abandoned(contents: Contents, found: Findings) -> None:
    for entry in contents.abandoned:
        folder = posixpath.dirname(entry.key)
        why = "temporary file or unfinished upload of a killed writer"
        found.units.append(Unit(LEFTOVERS, folder, (entry.key,), entry.size, why))


def _judge_pictures(contents: Contents, found: Findings) -> None:
    """Find pictures of runs that MLflow does not have any more."""
    pictures: dict[str, list[str]] = {}
    for key, entry in contents.files.items():
        match = _PICTURE.fullmatch(key)
        if match is None or contents.mlflow_runs is None or match[2] in contents.mlflow_runs:
            continue
        if entry.modified is not None and contents.now - entry.modified >= contents.days * _DAY:
            pictures.setdefault(match[1], []).append(key)
    for folder, keys in pictures.items():
        why = "MLflow has no such run"
        found.units.append(Unit(PICTURES, folder, tuple(keys), _size(contents, keys), why))


def _whole(contents: Contents, kind: str, folder: str, keys: Iterable[str], why: str) -> Unit:
    """Return the unit of a stage's folder, without its leases and the mark of gc.

    The manifest goes first. Without it a folder is no stage, so `dpnet verify` does not miss the
    files that are already gone, and nobody skips a stage whose files are gone. With the manifest
    last, a kill in between would leave a manifest that names missing files.
    """
    first = manifest_key(folder)
    gone = sorted(
        (key for key in keys if _name(key) not in (*LEASES, MARK)),
        key=lambda key: (key != first, _name(key) != _CHECKPOINT, key),
    )
    top = folder.partition("/")[0]
    leases = [lease_key(folder)]
    if top == RUNS:
        leases.append(f"{folder}/{TRAINING_LEASE}")
    if top == IMAGES:  # nobody plans a version that refers to this one meanwhile
        leases.insert(0, lease_key(posixpath.dirname(folder)))
    return Unit(kind, folder, tuple(gone), _size(contents, gone), why, tuple(leases), whole=True)


def _order(contents: Contents, unit: Unit) -> tuple[int, int, str]:
    """Order the units so that no manifest ever names a stage that is gone: users first."""
    depth, at = 0, unit.folder
    while unit.kind == VERSIONS and at in contents.manifests and depth < len(contents.manifests):
        parent = contents.manifests[at].inputs.get("parent")
        if parent is None:
            break
        depth, at = depth + 1, parent.folder
    return KINDS.index(unit.kind), -depth, unit.folder


def _known(contents: Contents, folder: str, keys: Iterable[str]) -> Iterator[str]:
    """Yield the keys that a stage of this kind writes into its folder."""
    manifest = contents.manifests.get(folder)
    if manifest is None and not _DIGEST.fullmatch(_name(folder)):
        return
    listed = {file.path for file in manifest.files} if manifest else set()
    pattern = _FILES[folder.partition("/")[0]]
    for key in keys:
        path = key.removeprefix(f"{folder}/")
        if path in listed or pattern.fullmatch(path):
            yield key


def _is_known_elsewhere(key: str) -> bool:
    """Return whether an object outside of the stages' folders is one of ours."""
    return bool(
        key.startswith((MLFLOW_DATABASE, *_NOT_OURS_TO_DELETE))
        or _BESIDE.fullmatch(key)
        or parse_record_key(key)
        or parse_history_key(key)
        or parse_vote_key(key)
    )


def _name(key: str) -> str:
    return posixpath.basename(key)


def _size(contents: Contents, keys: Iterable[str]) -> int:
    return sum(contents.files[key].size for key in keys)
