"""Read what a root holds, so that `garbage.py` can decide what is garbage.

A manifest or a record that is damaged, or missing where another names it, ends the reading: what is
in use would be unknown.
"""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Iterable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from data_prep.core.errors import ConfigError, PipelineError
from data_prep.core.lease import is_running
from data_prep.core.manifest import Manifest, read_manifest
from data_prep.core.paths import (
    EVALUATIONS,
    IMAGES,
    MANIFEST,
    MASKS,
    REGISTRY,
    RETRAINS,
    RUNS,
    manifest_key,
    parse_history_key,
    parse_record_key,
)
from data_prep.core.record import parse_json
from data_prep.core.storage.store import Entry, Store
from data_prep.core.text import printable
from dpnet.model_store.history import read_history
from dpnet.model_store.records import AGAINST, INPUTS
from dpnet.pipeline.garbage import LEASES, Contents, lost_manifests, stage_folder
from dpnet.pipeline.retrain import PLAN
from dpnet.pipeline.verification import Verification
from dpnet.pipeline.verify import check_digests, check_model_history, check_record
from dpnet.tracking.mlflow_database import mlflow_database

TOPS = (IMAGES, MASKS, RUNS, EVALUATIONS, REGISTRY, RETRAINS)
_CHECKPOINT = "checkpoint.json"
_DAY = 86_400.0  # seconds
# A lease that was not renewed for this long is not held: its owner regards it as lost after three
# intervals, and an interval has at most an hour. The rest is for clocks that differ.
_LEASE_S = _DAY


class Reader:
    """Reads a root, several times if necessary: manifests that did not change are read once.

    Args:
        store: the root.
        days: the age from which an unfinished stage is garbage.
    """

    def __init__(self, store: Store, days: float) -> None:
        self.store, self.days = store, days
        self._manifests: dict[tuple[str, str], Manifest] = {}
        self._runs = mlflow_runs(store)

    def read(self, own: Iterable[str] = ()) -> Contents:
        """Return what the root holds now; `own` are keys of leases that this command holds.

        Raises:
            PipelineError: a manifest or record was altered or is missing, or a folder is a link.
        """
        store, now = self.store, time.time()
        _refuse_links(store)
        files = {entry.key: entry for entry in store.list()}
        if not any(stage_folder(key) for key in files):
            raise ConfigError(
                f"{store.label} contains no stage: name a root, the folder or s3:// URI that was"
                " given as --root."
            )
        found = Verification(store.uri, "")
        manifests = self._read_manifests(files, found)
        registered = self._read_registry(files, found)
        if found.problems:
            _refuse(store, found.problems[0].where, found.problems[0].problem)
        contents = Contents(
            files,
            manifests,
            frozenset(registered | self._read_plans(files, manifests)),
            frozenset(_running(store, files, set(own), now)),
            _wanted(store, files, manifests),
            tuple(store.leftovers(now - self.days * _DAY)),
            self._runs,
            now,
            self.days,
        )
        for folder, by in lost_manifests(contents):
            _refuse(store, manifest_key(folder), f"is missing, and {by} names it")
        return contents

    def _read_manifests(
        self, files: Mapping[str, Entry], found: Verification
    ) -> dict[str, Manifest]:
        """Return the manifests by folder, and add those that are damaged to `found`."""
        manifests = {}
        for key, entry in files.items():
            folder, _, name = key.rpartition("/")
            if name != MANIFEST or not folder:
                continue
            mark = (key, entry.fingerprint)
            if mark not in self._manifests:
                try:
                    manifest = read_manifest(self.store, folder)
                except PipelineError as error:
                    found.add(key, f"cannot be used ({str(error).rstrip('.')})")
                    continue
                check_digests(manifest, key, found)
                self._manifests[mark] = manifest
            manifests[folder] = self._manifests[mark]
        return manifests

    def _read_registry(self, files: Mapping[str, Entry], found: Verification) -> set[str]:
        """Return the folders that versions and histories name; add damage to `found`."""
        named: set[str] = set()
        models: set[str] = set()
        for key in files:
            if record := parse_record_key(key):
                models.add(record[0])
                check_record(self.store, key, found)
                if not found.problems:
                    body = parse_json(self.store.read(key))
                    roles = (*INPUTS, AGAINST)
                    named |= {body[role]["folder"] for role in roles if role in body}
            elif history := parse_history_key(key):
                models.add(history[0])
        for model in sorted(models):
            check_model_history(self.store, model, found)
            if found.problems:
                break
            for entry in read_history(self.store, model):
                made = entry.made_from.values()
                named |= {str(each["folder"]) for each in made if "folder" in each}
        return named

    def _read_plans(
        self, files: Mapping[str, Entry], manifests: Mapping[str, Manifest]
    ) -> set[str]:
        """Return the folders that started retrains name."""
        named: set[str] = set()
        for key in files:
            folder = stage_folder(key)
            if folder is None or folder in manifests or key != f"{folder}/{PLAN}":
                continue
            if folder.startswith(f"{RETRAINS}/"):
                try:
                    plan = parse_json(self.store.read(key))
                    run = plan["champion"] and plan["champion"]["run"]
                    named |= {str(each) for each in (plan["images"], run) if each}
                except FileNotFoundError:
                    continue
                except (ValueError, KeyError, TypeError):
                    _refuse(self.store, key, "was altered")
        return named


def _refuse(store: Store, where: str, problem: str) -> None:
    raise PipelineError(
        f"nothing is deleted, because it is not known what is in use ({printable(where)}:"
        f" {printable(problem).rstrip('.')}): run `dpnet verify {printable(store.label)}`, and"
        " restore the file."
    )


def _refuse_links(store: Store) -> None:
    """Refuse a root with links to folders: what they contain is not listed, and not in the root."""
    top = store.local_folder
    if top is None:
        return
    if not top.is_dir():
        what = "is a file" if top.exists() else "does not exist"
        raise ConfigError(f"{top} {what}: name a root.")
    for name in TOPS:
        links = [top / name] if (top / name).is_symlink() else []
        for folder, folders, _ in os.walk(top / name):
            links += [Path(folder, each) for each in folders if Path(folder, each).is_symlink()]
            if links:
                raise PipelineError(
                    f"nothing is deleted, because {links[0]} is a link to another folder, so it is"
                    " not known what is in use: move the folder into the root."
                )


def _running(store: Store, files: Mapping[str, Entry], own: set[str], now: float) -> Iterable[str]:
    """Yield the keys of the leases that another runner holds, or may hold."""
    for key, entry in files.items():
        if key.rpartition("/")[2] in LEASES and key not in own:
            recent = entry.modified is None or now - entry.modified < _LEASE_S
            if recent and is_running(store, key):
                yield key


def _wanted(
    store: Store, files: Mapping[str, Entry], manifests: Mapping[str, Manifest]
) -> dict[str, frozenset[str]]:
    """Return the content digests that the checkpoints of unfinished runs name, by run."""
    wanted: dict[str, set[str]] = {}
    for key in files:
        folder = stage_folder(key)
        if folder is None or folder in manifests or not key.startswith(f"{RUNS}/"):
            continue
        if key.rpartition("/")[2] == _CHECKPOINT:
            try:
                asked: Any = parse_json(store.read(key))["asked"]["content digest"]
                wanted.setdefault(folder, set()).update(map(str, asked.values()))
            except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
                continue  # training does not use it either
    return {run: frozenset(digests) for run, digests in wanted.items()}


def mlflow_runs(store: Store) -> frozenset[str] | None:
    """Return the ids of the runs in the root's MLflow database, or None.

    Deleted runs that can be restored are among them. None means that there is no database, that it
    cannot be read, or that another MLflow is configured. The database is only read: MLflow's own
    client would change its schema.
    """
    if os.environ.get("MLFLOW_TRACKING_URI"):
        return None
    try:
        database = mlflow_database(store)
        if database is None or not database.is_file():
            return None
        uri = f"{database.absolute().as_uri()}?mode=ro"
        with closing(sqlite3.connect(uri, uri=True, timeout=5)) as connection:
            return frozenset(str(row[0]) for row in connection.execute("SELECT run_uuid FROM runs"))
    except (sqlite3.Error, PipelineError, OSError):
        return None
