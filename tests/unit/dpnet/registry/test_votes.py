"""Votes on two versions: records that never change, and what a reader checks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from data_prep.core.digest import sha256_bytes
from data_prep.core.errors import ConfigError, PipelineError
from data_prep.core.paths import parse_vote_key, version_key
from data_prep.core.storage.local import LocalStore
from dpnet.registry.votes import MOST_REASON, Vote, keep_vote, read_votes


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    """Return a root with the records of two versions."""
    found = LocalStore(tmp_path)
    for number in (1, 2):
        record = {"model": "dpnet", "version": number, "run": {"folder": "runs/x"}}
        found.write(version_key("dpnet", number), json.dumps(record).encode())
    return found


def vote(store: LocalStore, winner: int = 2, loser: int = 1, reason: str = "sharper") -> Vote:
    return keep_vote(store, "dpnet", winner, loser, blind=True, reason=reason, by="ann@host")


def test_a_vote_names_both_versions_by_the_bytes_of_their_records(store: LocalStore) -> None:
    made = vote(store)
    assert made.winner_sha256 == sha256_bytes(store.read(version_key("dpnet", 2)))
    assert made.loser_sha256 == sha256_bytes(store.read(version_key("dpnet", 1)))
    assert read_votes(store, "dpnet") == [made]
    assert (made.winner, made.loser, made.blind, made.by) == (2, 1, True, "ann@host")


def test_every_vote_is_kept_oldest_first(store: LocalStore) -> None:
    assert read_votes(store, "dpnet") == []
    made = [vote(store, reason=f"{n}") for n in range(3)]
    assert sorted(read_votes(store, "dpnet"), key=lambda v: v.reason) == made
    keys = [entry.key for entry in store.list("registry/dpnet/votes")]
    assert all(parse_vote_key(key) for key in keys)
    assert parse_vote_key("registry/dpnet/votes/../x.json") is None


def test_a_reason_is_one_line_that_can_be_shown(store: LocalStore) -> None:
    assert vote(store, reason=" a\nb\x1b[31m ").reason == "a b\\x1b[31m"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"winner": 1}, "same version"),
        ({"winner": 9}, "no version 9"),
        ({"reason": "x" * (MOST_REASON + 1)}, "more than 500"),
    ],
)
def test_a_wrong_vote_is_refused_and_nothing_is_written(
    store: LocalStore, change: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        vote(store, **change)
    assert read_votes(store, "dpnet") == []


@pytest.mark.parametrize(
    "data", [b"{", b"[]", b'{"format": 1}', b'{"format": 9, "winner": 1}', b"\xff"]
)
def test_an_altered_vote_is_named(store: LocalStore, data: bytes) -> None:
    vote(store)
    (entry,) = store.list("registry/dpnet/votes")
    store.write(entry.key, data)
    with pytest.raises(PipelineError, match=r"votes/.*(was altered|has format 9)"):
        read_votes(store, "dpnet")


@pytest.mark.parametrize(
    "change", [{"winner": "2"}, {"loser": None}, {"reason": 1}, {"at": "yesterday"}, {"by": []}]
)
def test_a_vote_with_a_field_of_another_kind_is_named(
    store: LocalStore, change: dict[str, Any]
) -> None:
    vote(store)
    (entry,) = store.list("registry/dpnet/votes")
    store.write(entry.key, json.dumps(json.loads(store.read(entry.key)) | change).encode())
    with pytest.raises(PipelineError, match="was altered"):
        read_votes(store, "dpnet")


def test_a_field_of_a_newer_version_is_ignored(store: LocalStore) -> None:
    made = vote(store)
    (entry,) = store.list("registry/dpnet/votes")
    store.write(entry.key, json.dumps(json.loads(store.read(entry.key)) | {"new": 1}).encode())
    assert read_votes(store, "dpnet") == [made]
