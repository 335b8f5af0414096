"""Show a registry from storage alone: its models, their versions, and who was champion."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from data_prep.core.errors import ConfigError, PipelineError
from data_prep.core.paths import REGISTRY, champion_key, parse_record_key, version_key
from data_prep.core.storage.store import Store
from dpnet.model_store.history import Entry, find_champion, made_from, whole_history
from dpnet.model_store.records import (
    CHALLENGER,
    CHAMPION,
    read_record,
    read_records,
    registration_folder,
)

Facts = dict[str, Any]


def models(store: Store) -> list[str]:
    """Return the names of the registered models. Raises PipelineError if there is none."""
    found = {parsed[0] for each in store.list(REGISTRY) if (parsed := parse_record_key(each.key))}
    if not found:
        raise ConfigError(
            f"{store.label} has no registered model: run the pipeline there first, or name the root"
            " with --root."
        )
    return sorted(found)


def the_model(store: Store, name: str | None) -> str:
    """Return the model that a command means: `name`, or the only one of the root."""
    known = models(store)
    if name is not None and name not in known:
        raise ConfigError(f"{store.label} has no model {name!r}: choose one of {', '.join(known)}.")
    if name is None and len(known) > 1:
        raise ConfigError(
            f"{store.label} has several models: name one of {', '.join(known)} with --model."
        )
    return name or known[0]


def list_versions(store: Store, model: str) -> Iterator[Facts]:
    """Yield the versions of a model, oldest first, with their state and figures."""
    champion = find_champion(store, model)
    former = {entry.version for entry in whole_history(store, model)}
    for number, record in sorted(read_records(store, model).items()):
        state = CHALLENGER
        if champion is not None and champion["version"] == number:
            state = CHAMPION
        elif number in former:
            state = "former champion"
        yield {
            "model": model,
            "version": number,
            "state": state,
            "hole_psnr": record.get("hole_psnr"),
            "reason": record.get("reason", ""),
            "run": record["run"]["folder"],
        }


def show_version(store: Store, model: str, version: int | None) -> Facts:
    """Return everything that is known about a version; None means the champion.

    Raises:
        PipelineError: there is no such version, or no champion.
    """
    if version is None:
        champion = find_champion(store, model)
        if champion is None:
            raise ConfigError(
                f"{model} has no champion, because no version was promoted yet: name a version."
            )
        version = champion["version"]
    known = [each["version"] for each in list_versions(store, model)]
    if version not in known:
        raise ConfigError(
            f"{store.label} has no version {version} of {model}: its versions are"
            f" {', '.join(map(str, known)) or 'none'}. Choose one of them."
        )
    record = read_record(store, version_key(model, version))
    (about,) = (each for each in list_versions(store, model) if each["version"] == version)
    held = [each for each in spans(store, model) if each["version"] == version]
    try:
        folder = registration_folder(record)
    except (KeyError, TypeError):
        raise PipelineError(
            f"{store.label}/{version_key(model, version)} was altered: run `dpnet verify` for"
            " details, and restore the file."
        ) from None
    return {
        **record,
        **about,
        "made_from": made_from(store, record),
        "champion": held,
        "folder": folder,
    }


def spans(store: Store, model: str) -> list[Facts]:
    """Return who was champion from when to when, oldest first. The last one ends with None."""
    entries = whole_history(store, model)
    ends = [*(entry.at for entry in entries[1:]), *([None] if entries else [])]
    return [_span(entry, end) for entry, end in zip(entries, ends, strict=True)]


def _span(entry: Entry, end: str | None) -> Facts:
    return {
        "number": entry.number,
        "version": entry.version,
        "from": entry.at,
        "to": end,
        "how": entry.how,
        "by": entry.by,
        "why": entry.why,
        "made_from": entry.made_from,
        "digest": entry.digest,
    }


def unfinished(store: Store, model: str) -> str:
    """Return a sentence if `champion.json` does not fit the history yet, or ""."""
    entries = whole_history(store, model)
    champion = find_champion(store, model)
    if not entries or champion is None or champion["version"] == entries[-1].version:
        return ""
    return (
        f"{champion_key(model)} still names version {champion['version']}, because the promotion of"
        f" version {entries[-1].version} was killed: the next promotion or registration finishes"
        " it."
    )
