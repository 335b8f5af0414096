"""The token of a server: who may enter with it, and what the browser keeps."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest

from data_prep.core.errors import ConfigError
from data_prep.core.listener import open_listener
from data_prep.core.web_guard import SERVER_NAMES
from dpnet.serving.login import TOKEN, has_token, login_address, login_cookie
from dpnet.serving.server import address_of

KEY = "a-long-token-of-this-test"
COOKIE = login_cookie(KEY, 8400).partition(";")[0]


def basic(user: str, word: str) -> str:
    return "Basic " + base64.b64encode(f"{user}:{word}".encode()).decode()


@pytest.mark.parametrize(
    "headers",
    [
        {"authorization": [f"Bearer {KEY}"]},
        {"authorization": [f"bearer {KEY} "]},
        {"authorization": [basic("dpnet", KEY)]},
        {"cookie": [COOKIE]},
        {"cookie": ["other=1", f"x=y; {COOKIE}"]},
    ],
)
def test_the_token_is_taken_from_a_header_or_from_the_cookie(headers: dict[str, list[str]]) -> None:
    assert has_token(KEY, 8400)(headers)


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": [""]},
        {"authorization": ["Bearer "]},
        {"authorization": [f"Bearer {KEY}x"]},
        {"authorization": [f"Bearer {KEY}", f"Bearer {KEY}"]},
        {"authorization": [basic("root", KEY)]},
        {"authorization": ["Bearer wrong"], "cookie": [COOKIE]},
        {"cookie": [f"dpnet-serve-8400={KEY}"]},  # the cookie is not the token itself
        {"cookie": [COOKIE.replace("8400", "8401")]},
        {"cookie": [COOKIE[:-1]]},
        {"cookie": ["\x00=;;=" + COOKIE[:5]]},
    ],
)
def test_everything_else_is_refused(headers: dict[str, list[str]]) -> None:
    assert not has_token(KEY, 8400)(headers)


def test_no_script_and_no_other_site_gets_the_cookie() -> None:
    assert {"HttpOnly", "SameSite=Strict"} <= set(login_cookie(KEY, 8400).split("; "))
    assert KEY not in login_cookie(KEY, 8400)


def test_the_address_has_the_token_only_after_the_hash() -> None:
    assert login_address("http://h:1", "a/b c") == "http://h:1/login#a%2Fb%20c"


def test_a_server_on_loopback_needs_no_token_and_one_for_others_has_a_kept_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv(TOKEN, raising=False)
    with open_listener("127.0.0.1", 0) as listener:
        found = address_of(listener, "127.0.0.1")
        assert (found.token, found.names, found.login_url) == ("", (), found.url)
    with open_listener("0.0.0.0", 0) as listener:
        found = address_of(listener, "0.0.0.0")
        assert len(found.token) > 30
        assert found.login_url.endswith(f"/login#{found.token}")
        assert address_of(listener, "0.0.0.0").token == found.token
    kept = tmp_path / ".cache/dpnet/serve/password"
    assert kept.read_text().strip() == found.token
    assert kept.stat().st_mode & 0o777 == 0o600


def test_a_token_of_the_environment_is_used_and_a_short_one_is_refused_for_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with open_listener("0.0.0.0", 0) as listener:
        monkeypatch.setenv(TOKEN, KEY)
        found = address_of(listener, "0.0.0.0")
        assert (found.token, found.login_url) == (KEY, found.url)  # logs keep what is printed
        monkeypatch.setenv(TOKEN, "short")
        with pytest.raises(ConfigError, match="at least 16"):
            address_of(listener, "0.0.0.0")
    with open_listener("127.0.0.1", 0) as listener:
        monkeypatch.setenv(SERVER_NAMES, "serve,serve.dpnet.svc")  # a proxy on this machine
        monkeypatch.setenv(TOKEN, "short")
        with pytest.raises(ConfigError, match="at least 16"):
            address_of(listener, "127.0.0.1")
        monkeypatch.setenv(TOKEN, KEY)
        assert address_of(listener, "127.0.0.1").names == ("serve", "serve.dpnet.svc")
        monkeypatch.delenv(SERVER_NAMES)
        monkeypatch.setenv(TOKEN, "short")  # the password that a user has set for `dpnet up`
        assert address_of(listener, "127.0.0.1").token == "short"
