"""The records of the registry in storage: each version of a model, and the champion."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from data_prep.core.digest import SHORT
from data_prep.core.errors import ConfigError, PipelineError
from data_prep.core.paths import (
    REGISTRY,
    champion_key,
    parse_record_key,
    registry_folder,
    version_key,
)
from data_prep.core.record import parse_json, refuse_newer
from data_prep.core.storage.store import Store

CHAMPION, CHALLENGER = "champion", "challenger"
RECORD = "record.json"
INPUTS = ("run", "evaluation")
AGAINST = "against"  # an optional third input: a new evaluation of the champion, to compare with

_REFERENCE = re.compile(r"models:/([A-Za-z0-9][\w.-]*)(?:@(\w+)|/(\d+))")


def find_record(store: Store, reference: str = "") -> dict[str, Any]:
    """Return the record of a version.

    Args:
        store: the root.
        reference: `models:/NAME@champion`, `models:/NAME/VERSION`, or "" for the champion of the
            only model.

    Raises:
        PipelineError: there is no such version, or "" could mean several.
    """
    if not reference:
        named = [parse_record_key(entry.key) for entry in store.list(REGISTRY)]
        models = [each[0] for each in named if each and each[1] is None]
        if not models:
            versions = sorted(each for each in named if each and each[1] is not None)
            if versions:
                model, number = versions[-1]
                raise ConfigError(
                    f"{store.label} has no champion, because no version was promoted yet: name one"
                    f" with --model models:/{model}/{number}, or promote it with `dpnet registry"
                    f" promote {number} --why TEXT`."
                )
            raise ConfigError(
                f"{store.label} has no champion yet: run the pipeline there first, or name the root"
                " with --root, or a model with --model."
            )
        if len(models) > 1:
            names = ", ".join(f"models:/{model}@{CHAMPION}" for model in models)
            raise ConfigError(f"{store.label} has several champions: choose one of {names}.")
        return read_record(store, champion_key(models[0]))
    match = _REFERENCE.fullmatch(reference)
    if match is None or match[2] not in (None, CHAMPION):
        raise ConfigError(
            f"{reference!r} is not a model reference: write models:/NAME@{CHAMPION} or"
            " models:/NAME/VERSION."
        )
    model = match[1]
    key = champion_key(model) if match[2] else version_key(model, int(match[3]))
    if not store.exists(key):
        known = sorted(read_records(store, match[1]))
        there = f"its versions are {', '.join(map(str, known))}" if known else "no such model"
        raise ConfigError(f"{store.label} has no {reference}: {there}. Check --root and the name.")
    return read_record(store, key)


def read_record(store: Store, key: str) -> dict[str, Any]:
    """Read and check a record. Raises PipelineError if it was altered."""
    try:
        record = parse_json(store.read(key))
        refuse_newer(record, f"{store.label}/{key}")
        folder = record["run"]["folder"]
        if isinstance(folder, str) and isinstance(record["version"], int):
            return dict(record)
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    raise PipelineError(
        f"{store.label}/{key} was altered: run `dpnet verify` for details, and restore the file."
    )


def read_records(store: Store, model: str) -> dict[int, dict[str, Any]]:
    """Read the records of all versions of a model, by number."""
    records = {}
    for entry in store.list(registry_folder(model)):
        if (named := parse_record_key(entry.key)) and named[1] is not None:
            records[named[1]] = read_record(store, entry.key)
    return records


def registration_folder(record: Mapping[str, Any]) -> str:
    """Return the folder of the stage that wrote the record of a version."""
    return f"{registry_folder(str(record['model']))}/{record['request_digest'][:SHORT]}"
