"""The client of the Jobs API: which token it shows to whom."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import AuthenticationError

from data_prep.core.errors import ConfigError, PipelineError
from dpnet.training.ray import jobs_client
from dpnet.training.ray.jobs_client import connect_client


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the tokens that a cluster has got, which accepts only the one of the user's home."""
    found: list[str] = []

    def client(address: str, token: str) -> Any:
        found.append(token)
        if token != "of the home":
            raise AuthenticationError("no token")
        return "connected"

    monkeypatch.setattr(jobs_client, "_client", client)
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    return found


def test_the_token_of_the_home_goes_only_to_a_cluster_that_asks(
    asked: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("of the home\n")
    assert connect_client("http://head:8265") == "connected"
    assert asked == ["", "of the home"]


def test_a_user_without_a_home_learns_how_to_give_the_token(
    asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(os, "getuid", lambda: 54321)  # without an entry in the list of users
    with pytest.raises(PipelineError, match="requires its token"):
        connect_client("http://head:8265")
    assert asked == [""]


def test_the_token_comes_from_the_file_that_the_variable_names(
    asked: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "token").write_text("of the home\n")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    assert connect_client("http://head:8265") == "connected"
    assert asked == ["of the home"]


def test_a_token_file_that_is_not_text_or_never_ends_is_read_as_far_as_a_token_goes(
    asked: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "binary").write_bytes(b"\xff\xfetoken\n")
    for path in (str(tmp_path / "binary"), "/dev/zero"):
        monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", path)
        with pytest.raises(PipelineError, match="requires its token"):
            connect_client("http://head:8265")
    assert [len(token) for token in asked] == [7, 10_000]


def test_a_file_of_the_token_that_cannot_be_read_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(ConfigError, match=r"RAY_AUTH_TOKEN_PATH names .*none, which cannot be"):
        connect_client("http://head:8265")
