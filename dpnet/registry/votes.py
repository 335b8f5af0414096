"""Votes: which of two versions a person found better, and why. They change no champion.

Each vote is a record `registry/<model>/votes/<time>-<random>.json`, which never changes. It names
both versions by number and by the hash of their records. `dpnet registry history` shows the votes,
so that a promotion by hand, which overrides the gate, has its reasons next to it.
"""

from __future__ import annotations

import json
import re
import secrets
import time
from dataclasses import asdict, dataclass

from data_prep.core.digest import sha256_bytes
from data_prep.core.errors import ConfigError, PipelineError
from data_prep.core.paths import parse_vote_key, version_key, vote_key, votes_folder
from data_prep.core.record import known_fields, parse_json, refuse_newer
from data_prep.core.storage.store import Store
from data_prep.core.text import printable

FORMAT = 1
MOST_REASON = 500  # characters


@dataclass(frozen=True)
class Vote:
    """A vote of one person.

    Attributes:
        winner: number of the better version.
        loser: number of the other version.
        winner_sha256: SHA-256 of the record of the better version.
        loser_sha256: SHA-256 of the record of the other version.
        blind: whether the person did not know which result is of which version.
        reason: why, or "".
        by: who voted, as far as the server knows: its own user and host.
        at: time in UTC ("2026-01-31T12:00:00Z").
    """

    winner: int
    loser: int
    winner_sha256: str
    loser_sha256: str
    blind: bool
    reason: str
    by: str
    at: str
    format: int = FORMAT


def keep_vote(
    store: Store, model: str, winner: int, loser: int, *, blind: bool, reason: str, by: str
) -> Vote:
    """Write the record of a vote, and return it.

    Args:
        store: the root.
        model: name of the model.
        winner: number of the better version.
        loser: number of the other version.
        blind: whether the person did not know which is which.
        reason: at most 500 characters.
        by: who voted.

    Raises:
        PipelineError: a version does not exist, both are the same, or the root cannot be written.
    """
    if winner == loser:
        raise ConfigError("winner and loser are the same version: compare two different ones.")
    if len(reason) > MOST_REASON:
        raise ConfigError(f"the reason has more than {MOST_REASON} characters: shorten it.")
    hashes = [_record_sha256(store, model, number) for number in (winner, loser)]
    now = time.gmtime()
    at = time.strftime("%Y-%m-%dT%H:%M:%SZ", now)
    text = printable(" ".join(reason.split()))
    vote = Vote(winner, loser, hashes[0], hashes[1], blind, text, by, at)
    key = vote_key(model, f"{time.strftime('%Y%m%dT%H%M%SZ', now)}-{secrets.token_hex(4)}")
    if store.create(key, json.dumps(asdict(vote), indent=1, ensure_ascii=False).encode()) is None:
        raise PipelineError(f"{store.label}/{key} exists already: vote again.")
    return vote


def _record_sha256(store: Store, model: str, number: int) -> str:
    try:
        return sha256_bytes(store.read(version_key(model, number)))
    except FileNotFoundError:
        raise ConfigError(f"{model} has no version {number}: vote on two that exist.") from None


def read_votes(store: Store, model: str) -> list[Vote]:
    """Return the votes of a model, oldest first. Raises PipelineError if a record was altered."""
    return [
        _read_vote(store, entry.key)
        for entry in store.list(votes_folder(model))
        if parse_vote_key(entry.key)
    ]


def _read_vote(store: Store, key: str) -> Vote:
    try:
        found = parse_json(store.read(key))
        refuse_newer(found, f"{store.label}/{key}", FORMAT)
        vote = Vote(**known_fields(Vote, found))
        numbers = isinstance(vote.winner, int) and isinstance(vote.loser, int)
        texts = all(isinstance(each, str) for each in (vote.reason, vote.by, vote.at))
        if numbers and texts and re.match(r"\d{4}-", vote.at):
            return vote
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    raise PipelineError(f"{store.label}/{key} was altered: restore it from a backup.")
