"""The password of `dpnet up`: made once, kept private, and shown only to log in."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from data_prep.core.errors import ConfigError
from data_prep.core.password_file import (
    keep_password,
    new_password,
    password_file,
    stored_password,
)
from flows.local_server.children import with_password
from flows.local_server.password import login_url


def test_a_password_is_made_once_and_only_the_user_may_read_it(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        made = keep_password(tmp_path / "up")
    finally:
        os.umask(before)
    # Before the second call, which would correct it.
    assert password_file(tmp_path / "up").stat().st_mode & 0o777 == 0o600
    assert made.startswith("dpnet:")
    assert len(made) > 30
    assert keep_password(tmp_path / "up") == made == stored_password(tmp_path / "up")
    assert (tmp_path / "up").stat().st_mode & 0o777 == 0o700
    assert os.listdir(tmp_path / "up") == ["password"]


def test_two_passwords_are_never_the_same() -> None:
    assert new_password() != new_password()


def test_a_password_of_another_process_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = os.link

    def slow_link(new: Path, file: Path) -> None:
        file.write_text("written-by-another-process\n")
        link(new, file)

    monkeypatch.setattr(os, "link", slow_link)
    assert keep_password(tmp_path) == "dpnet:written-by-another-process"


@pytest.mark.parametrize("text", ["", "short", "has:a-colon-and-is-long", "two words long enough"])
def test_a_file_without_a_password_is_refused(text: str, tmp_path: Path) -> None:
    password_file(tmp_path).write_text(text)
    with pytest.raises(ConfigError, match="Delete the file"):
        keep_password(tmp_path)


@pytest.mark.parametrize("name", ["PREFECT_API_AUTH_STRING", "PREFECT_SERVER_API_AUTH_STRING"])
def test_the_users_own_password_wins_and_no_other_is_made(name: str, tmp_path: Path) -> None:
    environ = {name: "admin:secret1"}
    assert with_password(environ, tmp_path) == environ
    assert not password_file(tmp_path).exists()
    assert with_password({}, tmp_path) == {"PREFECT_API_AUTH_STRING": stored_password(tmp_path)}


def test_the_login_address_has_the_password_only_after_the_hash(tmp_path: Path) -> None:
    made = keep_password(tmp_path)
    address, _, key = login_url("http://127.0.0.1:4200", tmp_path, {}).partition("#")
    assert address == "http://127.0.0.1:4200/login"
    assert key == made


def test_the_users_own_password_is_in_no_address(tmp_path: Path) -> None:
    keep_password(tmp_path)
    environ = {"PREFECT_API_AUTH_STRING": "admin:secret1"}
    assert login_url("http://127.0.0.1:4200", tmp_path, environ) == "http://127.0.0.1:4200"
