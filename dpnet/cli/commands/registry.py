"""Commands for registered models: list, show, history, promote, rollback, rebuild."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from data_prep.core.digest import SHORT
from data_prep.core.storage.open import open_store
from data_prep.core.storage.store import Store
from data_prep.core.text import aligned_table, count_of, joined
from dpnet.cli.commands.roots import Outcome, announced, root_to_read
from dpnet.registry import overview, votes


def list_versions(args: Namespace) -> Outcome:
    """List the versions of every model."""
    store = open_store(root_to_read(args))
    names = (
        overview.models(store) if args.model is None else [overview.the_model(store, args.model)]
    )
    found = [each for name in names for each in overview.list_versions(store, name)]
    rows = [("model", "version", "state", "hole PSNR", "run")]
    rows += [
        (each["model"], str(each["version"]), each["state"], _db(each), each["run"])
        for each in found
    ]
    notes = [note for name in names if (note := overview.unfinished(store, name))]
    result = {"ok": True, "root": store.uri, "versions": found, "notes": notes}
    return result, joined([*aligned_table(rows, "<><><"), *notes])


def show(args: Namespace) -> Outcome:
    """Show what is known about a version."""
    store, model = _opened(args)
    found = overview.show_version(store, model, args.version)
    lines = [
        f"{model} version {found['version']}, {found['state']}",
        f"reason      {found['reason']}",
        f"hole PSNR   {_db(found)}",
        *_origin(found["made_from"]),
        *(
            f"champion    {_time(each)}, by {each['by']}: {each['why']}"
            for each in found["champion"]
        ),
        f"files       {store.label}/{found['folder']}",
    ]
    return {"ok": True, "root": store.uri, **found}, joined(lines)


def history(args: Namespace) -> Outcome:
    """Show who was champion from when to when, and why, and how people voted on the versions."""
    store, model = _opened(args)
    found = overview.spans(store, model)
    lines = []
    for each in found:
        lines += [
            f"version {each['version']}  {_time(each)}, by {each['by']}",
            f"  why     {each['why']}",
            *(f"  {line}" for line in _origin(each["made_from"])),
        ]
    if not found:
        lines.append(f"{model} has had no champion yet.")
    given = votes.read_votes(store, model)
    lines += [_vote_line(each) for each in given]
    notes = [note for note in [overview.unfinished(store, model)] if note]
    result = {
        "ok": True,
        "root": store.uri,
        "model": model,
        "history": found,
        "votes": [asdict(each) for each in given],
        "notes": notes,
    }
    return result, joined([*lines, *notes])


def _vote_line(vote: votes.Vote) -> str:
    blind = ", without knowing which was which" if vote.blind else ""
    why = f": {vote.reason}" if vote.reason else ""
    return f"vote for version {vote.winner} over {vote.loser}{blind}  {vote.at}, by {vote.by}{why}"


def promote(args: Namespace) -> Outcome:
    """Make a version the champion."""
    from dpnet.registry import promotion

    store, model = _opened(args)
    with announced(store, model):
        done = promotion.promote(store, model, args.version, args.why)
    return _changed(store, model, done, args.tracking_uri)


def rollback(args: Namespace) -> Outcome:
    """Make the former champion the champion again."""
    from dpnet.registry import promotion

    store, model = _opened(args)
    with announced(store, model):
        done = promotion.rollback(store, model, args.why)
    return _changed(store, model, done, args.tracking_uri)


def rebuild(args: Namespace) -> Outcome:
    """Make an empty or incomplete MLflow whole again."""
    from dpnet.registry.rebuild import rebuild as restore

    store = open_store(root_to_read(args))
    names = (
        overview.models(store) if args.model is None else [overview.the_model(store, args.model)]
    )
    found = [restore(store, name, args.tracking_uri) for name in names]
    lines = []
    for each in found:
        lines += [
            f"{each['model']}: {count_of(len(each['versions']), 'version')} in MLflow at"
            f" {each['tracking_uri']}, champion {each['champion'] or 'none'}",
            *(f"  written again: {store.label}/{key}" for key in each["restored"]),
        ]
    return {"ok": True, "root": store.uri, "models": found}, joined(lines)


def _opened(args: Namespace) -> tuple[Store, str]:
    store = open_store(root_to_read(args))
    return store, overview.the_model(store, args.model)


def _changed(store: Store, model: str, done: Any, tracking_uri: str | None) -> Outcome:
    """Return the champion after a command, once MLflow follows."""
    from dpnet.registry.rebuild import follow

    entry, changed = done
    mlflow = follow(store, model, tracking_uri)
    now = "is champion now" if changed else "is champion already"
    result = {
        "ok": True,
        "root": store.uri,
        "model": model,
        "version": entry.version,
        "former": entry.former,
        "changed": changed,
        "why": entry.why,
        "by": entry.by,
        "mlflow": mlflow,
    }
    return result, joined([f"{model} version {entry.version} {now}.", mlflow])


def _origin(made_from: Mapping[str, Mapping[str, Any]]) -> Sequence[str]:
    """Return lines with the names and digests that a version was made from."""
    lines = []
    for role, label in (("images", "photos"), ("masks", "masks"), ("run", "run")):
        if ref := made_from.get(role):
            name = f"{ref['name']} " if "name" in ref else ""
            digest = str(ref.get("content_digest", "?"))[:SHORT]
            lines.append(f"{label:<12}{name}{digest} in {ref.get('folder', '?')}")
    if run := made_from.get("run"):
        lines.append(f"settings    {str(run.get('request_digest', ''))[:SHORT]}")
    return lines


def _time(span: Mapping[str, Any]) -> str:
    return f"from {span['from'] or 'an unknown time'} to {span['to'] or 'now'}"


def _db(found: Mapping[str, Any]) -> str:
    value = found["hole_psnr"]
    return f"{value:.2f} dB" if isinstance(value, int | float) else "not known"
