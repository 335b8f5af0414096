"""Walk the chain of digests and check every hash: a file system check for a root.

It checks each manifest's own request digest and content digest, and that its inputs exist and are
unchanged. It checks that the registry's records are whole, and that the runs and evaluations which
they name have the digests they state. `dpnet/pipeline/verify_files.py` checks the files, and
`data_prep/shards/check_set.py` every sample, list and table of images and masks.
"""

from __future__ import annotations

import posixpath

from data_prep.core import digest
from data_prep.core.digest import sha256_bytes
from data_prep.core.errors import ConfigError, PipelineError
from data_prep.core.manifest import (
    FileRecord,
    InputRef,
    Manifest,
    StageRef,
    content_digest,
    read_manifest,
)
from data_prep.core.paths import (
    MANIFEST,
    champion_key,
    manifest_key,
    parse_record_key,
    version_key,
)
from data_prep.core.record import known_fields, parse_json, refuse_newer
from data_prep.core.stage import Request
from data_prep.core.storage.open import open_store
from data_prep.core.storage.store import Store
from data_prep.shards.check_set import Depth
from dpnet.model_store.history import FOUND, check_history, named_champion, whole_history
from dpnet.model_store.records import (
    AGAINST,
    INPUTS,
    RECORD,
    find_record,
    registration_folder,
)
from dpnet.pipeline.verification import EVERYTHING, Verification
from dpnet.pipeline.verify_files import check_files


def verify_uri(uri: str, root: str = "", depth: Depth = EVERYTHING) -> Verification:
    """Verify what a path or URI names: a root, a folder or manifest in it, or a model.

    Args:
        uri: path, s3:// URI or models:/….
        root: where models:/… is searched.
        depth: how much of the shards is read.

    Raises:
        PipelineError: there is nothing to verify.
    """
    if uri.startswith("models:/"):
        return verify(open_store(root), uri, depth)
    store = open_store(uri.removesuffix(MANIFEST).rstrip("/") or ".")
    top = store.local_folder
    if top is not None and not top.is_dir():
        what = "is a file" if top.exists() else "does not exist"
        raise ConfigError(f"{top} {what}: name a root, a folder in it or models:/NAME@champion.")
    try:
        folder = str(parse_json(store.read(MANIFEST))["folder"])
    except (FileNotFoundError, NotADirectoryError):
        inside = _place_in_root(store)
        root_store = open_store(store.uri.removesuffix(f"/{inside}")) if inside else store
        return verify(root_store, inside, depth)
    except (ValueError, KeyError, TypeError):
        raise PipelineError(f"{uri}: its manifest was altered. Verify the whole root.") from None
    if not store.uri.endswith(f"/{folder}"):
        raise PipelineError(
            f"{uri} was moved: its manifest says that its place under the root is {folder}. Move"
            " it back."
        )
    return verify(open_store(store.uri.removesuffix(f"/{folder}")), folder, depth)


def _place_in_root(store: Store) -> str:
    """Return the key of the folder `store` under its root; "" if it is a root, or unknown.

    The manifests in it say where they are under their root.

    Raises:
        PipelineError: it is a folder above a root.
    """
    above, below = "", ""
    for entry in store.list():
        here = posixpath.dirname(entry.key)
        if posixpath.basename(entry.key) != MANIFEST or not here:
            continue
        try:
            said = str(parse_json(store.read(entry.key))["folder"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if said == here:
            return ""
        if said.endswith(f"/{here}") and store.uri.endswith(f"/{said.removesuffix(f'/{here}')}"):
            below = said.removesuffix(f"/{here}")
        elif here.endswith(f"/{said}"):
            above = here.removesuffix(f"/{said}")
    if above and not below:
        raise ConfigError(
            f"{store.label} is not a root, but it contains one. Name that root:"
            f" {store.label}/{above}."
        )
    return below


def verify(store: Store, target: str = "", depth: Depth = EVERYTHING) -> Verification:
    """Verify a whole root, or a folder or model with everything that it was made from.

    Args:
        store: the root.
        target: a folder or models:/…; "" for the whole root.
        depth: how much of the shards is read.

    Raises:
        PipelineError: the root, the stage or the model does not exist.
    """
    result = Verification(store.uri, target, depth)
    if target.startswith("models:/"):
        record = find_record(store, target)
        records = [version_key(record["model"], record["version"])]
        folders = [registration_folder(record)]
    elif target and store.exists(manifest_key(target)):
        read_manifest(store, target)  # raises its own sentence if the manifest is damaged
        records, folders = [], [target]
    else:
        keys = [entry.key for entry in store.list(target)]
        records = [key for key in keys if parse_record_key(key)]
        folders = [posixpath.dirname(k) for k in keys if posixpath.basename(k) == MANIFEST]
        if not folders and target:
            read_manifest(store, target)  # raises: the stage was never finished
        if not folders:
            raise ConfigError(
                f"{store.label} contains no finished stage: name a root (the folder given as"
                " --root), a folder in it, or models:/NAME@champion."
            )
    for key in records:
        result.records += 1
        check_record(store, key, result)
    models = [parsed[0] for key in records if (parsed := parse_record_key(key))]
    for model in dict.fromkeys(models):
        check_model_history(store, model, result)
    check_files(store, _walk(store, folders, result), result)
    # The listing and the read may find the same problem. Problems of one file stay in order.
    result.problems = sorted(dict.fromkeys(result.problems), key=lambda p: p.where)
    return result


def _walk(store: Store, folders: list[str], result: Verification) -> dict[str, Manifest]:
    """Return the sound manifests of `folders` and of all their inputs, by folder."""
    sound: dict[str, Manifest] = {}
    pending, seen = sorted(folders, reverse=True), set(folders)
    while pending:
        folder = pending.pop()
        where = manifest_key(folder)
        try:
            manifest = read_manifest(store, folder)
            check_digests(manifest, where, result)
            if unknown := _unknown_fields(store, where):
                result.notes.append(
                    f"{where} has fields that this version does not know ({', '.join(unknown)}): a"
                    " newer version of dpnet wrote it, or it was altered."
                )
        except PipelineError as error:
            result.add(where, str(error))
            continue
        result.stages += 1
        sound[folder] = manifest
        for role, named in manifest.inputs.items():
            if _is_unchanged(store, f"its input {role!r}", named, where, result):
                if named.folder not in seen:
                    pending.append(named.folder)
                seen.add(named.folder)
    return sound


def check_digests(manifest: Manifest, where: str, result: Verification) -> None:
    """Compute both digests of a manifest again and compare them with the stated ones."""
    request = Request(
        stage=manifest.stage,
        name=manifest.name,
        top=posixpath.dirname(manifest.folder),
        settings=manifest.settings,
        inputs={role: _reference(named) for role, named in manifest.inputs.items()},
        sources=manifest.sources,
    )
    short = request.digest[: digest.SHORT]
    if request.digest != manifest.request_digest or not manifest.folder.endswith(short):
        result.add(where, "was altered: its request digest does not fit its settings and inputs")
    if content_digest(manifest.files) != manifest.content_digest:
        result.add(where, "was altered: its content digest does not fit its files")


def _unknown_fields(store: Store, where: str) -> list[str]:
    """Return the names of a manifest's fields that this version does not know.

    A reader ignores them. An optional field with another name would be lost without a word.
    """
    found = parse_json(store.read(where))
    parts = [
        (Manifest, [found]),
        (FileRecord, found["files"]),
        (InputRef, found["inputs"].values()),
    ]
    known = [(each, known_fields(kind, each)) for kind, some in parts for each in some]
    return sorted({name for each, own in known for name in each.keys() - own.keys()})


def _reference(named: InputRef) -> StageRef:
    """Return an input of a manifest as a reference."""
    return StageRef(
        stage=named.stage,
        name="",
        folder=named.folder,
        request_digest=named.request_digest,
        content_digest=named.content_digest,
        seconds=0.0,
        skipped=True,
    )


def _is_unchanged(
    store: Store, what: str, named: InputRef, where: str, result: Verification
) -> bool:
    """Check that a named stage exists and has the named digests; return whether it exists.

    Args:
        store: the root.
        what: the stage's role, for messages.
        named: folder and digests of the stage, as the manifest or record states them.
        where: the key of that manifest or record.
        result: where problems are added.
    """
    try:
        manifest = read_manifest(store, named.folder)
    except PipelineError as error:
        result.add(where, f"{what} does not exist: {error}")
        return False
    for kind in ("request_digest", "content_digest"):
        if getattr(manifest, kind) != getattr(named, kind):
            result.add(where, f"{what}, {named.folder}, has another {kind.replace('_', ' ')}")
    return True


def check_model_history(store: Store, model: str, result: Verification) -> None:
    """Check the chain of a model's history, and that it fits the records of the versions."""
    stored = list(check_history(store, model))
    for key, entry, problem in stored:
        if entry is None:
            result.add(key, problem)
            continue
        record = version_key(model, entry.version)
        if not store.exists(record):
            result.add(record, f"is missing, and {key} names it as champion")
        elif sha256_bytes(store.read(record)) != entry.record_sha256:
            result.add(record, f"was altered: it is not the record that {key} names")
    if not stored:  # a root of an earlier version
        return
    try:
        entries, named = whole_history(store, model), named_champion(store, model)
    except PipelineError:  # named with the other records
        return
    last, key = entries[-1], champion_key(model)
    if len(entries) > len(stored) and last.how == FOUND and not last.derived:
        result.add(
            key,
            f"names version {named}, and the history version {last.former}: it was replaced by"
            " hand. The next promotion or registration adds this to the history",
        )
    elif named != last.version:
        result.notes.append(
            f"{key} does not name version {last.version} yet, because its promotion was killed: the"
            " next promotion or registration finishes it."
        )


def check_record(store: Store, key: str, result: Verification) -> None:
    """Check that a record is the one of its registration, and that its inputs are unchanged."""
    data = store.read(key)
    try:
        record = parse_json(data)
        refuse_newer(record, f"{store.label}/{key}")
        folder = registration_folder(record)
        if key not in (
            champion_key(record["model"]),
            version_key(record["model"], record["version"]),
        ):
            result.add(key, "was altered: it is the record of another version")
        for role in (*INPUTS, *([AGAINST] if AGAINST in record else [])):
            ref = InputRef.from_json({"stage": role} | record[role])
            _is_unchanged(store, f"its {role}", ref, key, result)
    except (ValueError, KeyError, TypeError, AttributeError):
        result.add(key, "was altered: it is not a whole record")
        return
    except PipelineError as error:
        result.add(key, str(error))
        return
    if not store.exists(manifest_key(folder)):
        result.add(key, "its registration was never finished: run the same command again")
    elif not store.exists(f"{folder}/{RECORD}") or store.read(f"{folder}/{RECORD}") != data:
        result.add(key, f"differs from the registered record {folder}/{RECORD}")
