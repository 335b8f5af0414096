"""The guard in front of servers on this machine: who is let in, and who is not."""

from __future__ import annotations

import asyncio
import base64
import json
from typing import Any

import pytest

from data_prep.core.asgi_guard import Guard, Page
from data_prep.core.web_guard import has_password, is_password

PORT = 4321
OWN = f"127.0.0.1:{PORT}"
PASSWORD = "dpnet:a long:password"
BASIC = "Basic " + base64.b64encode(PASSWORD.encode()).decode()


def may_enter(headers: Any) -> bool:
    """Let in who has the password."""
    return has_password(headers, PASSWORD)


async def inner(scope: Any, receive: Any, send: Any) -> None:
    """An application that allows every origin, as Prefect's does."""
    if scope["type"] == "websocket":
        await send({"type": "websocket.accept"})
        return
    headers = [(b"access-control-allow-origin", b"*")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": b"secret"})


def ask(
    path: str = "/api/flows",
    method: str = "GET",
    kind: str = "http",
    guard: Guard | None = None,
    **headers: str,
) -> dict[str, Any]:
    """The answer to one request; header names have `_` in place of `-`."""
    sent: list[dict[str, Any]] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b""}

    given = {"host": OWN, **headers}
    raw = [(name.replace("_", "-").encode(), value.encode()) for name, value in given.items()]
    scope = {"type": kind, "method": method, "path": path, "headers": raw}
    asyncio.run((guard or Guard(inner, PORT))(scope, receive, send))
    if kind == "websocket":
        return {"accepted": sent[0]["type"] == "websocket.accept"}
    return {
        "status": sent[0]["status"],
        "headers": {name.decode(): value.decode() for name, value in sent[0]["headers"]},
        "body": sent[1]["body"].decode(),
    }


@pytest.mark.parametrize("host", [OWN, f"localhost:{PORT}", f"[::1]:{PORT}", f"LOCALHOST:{PORT}"])
def test_the_server_answers_under_its_own_addresses(host: str) -> None:
    assert ask(host=host)["status"] == 200


@pytest.mark.parametrize(
    "host", ["evil.example", f"evil.example:{PORT}", "127.0.0.1", "127.0.0.1:80", "", f"{OWN}.evil"]
)
def test_another_host_header_is_refused(host: str) -> None:
    answer = ask(host=host)
    assert (answer["status"], "secret" in answer["body"]) == (403, False)
    assert not ask(kind="websocket", host=host)["accepted"]


@pytest.mark.parametrize(
    "origin", ["http://evil.example", "null", f"https://{OWN}", "http://127.0.0.1:9999", ""]
)
@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS"])
def test_a_request_of_another_origin_is_refused(origin: str, method: str) -> None:
    assert ask(method=method, origin=origin)["status"] == 403
    assert not ask(kind="websocket", origin=origin)["accepted"]


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
def test_what_another_site_embeds_is_refused_and_a_link_is_followed(site: str) -> None:
    embedded = {"sec_fetch_site": site, "sec_fetch_mode": "no-cors"}
    assert ask(**embedded)["status"] == 403
    link = {"sec_fetch_site": site, "sec_fetch_mode": "navigate", "sec_fetch_dest": "document"}
    assert ask(**link)["status"] == 200
    assert ask(**link | {"sec_fetch_dest": "iframe"})["status"] == 403
    assert ask(method="POST", **link)["status"] == 403


def test_its_own_pages_and_programs_are_served() -> None:
    assert ask(origin=f"http://{OWN}", sec_fetch_site="same-origin")["status"] == 200
    assert ask(method="POST")["status"] == 200
    assert ask(kind="websocket", origin=f"http://{OWN}")["accepted"]


def test_no_answer_allows_other_origins_or_frames_of_other_pages() -> None:
    headers = ask()["headers"]
    assert not [name for name in headers if name.startswith("access-control-")]
    assert headers["x-frame-options"] == "SAMEORIGIN"


def test_with_a_password_every_other_request_is_refused() -> None:
    guard = Guard(inner, PORT, may_enter=may_enter, unguarded=["/health"])
    refused = ask(guard=guard)
    assert (refused["status"], refused["headers"]["www-authenticate"]) == (
        401,
        'Basic realm="dpnet"',
    )
    assert ask(guard=guard, authorization=BASIC)["status"] == 200
    assert ask(guard=guard, path="/health")["status"] == 200
    assert ask(guard=guard, path="/health/more")["status"] == 401
    assert not ask(guard=guard, kind="websocket")["accepted"]
    assert ask(guard=guard, authorization=BASIC, host="evil.example")["status"] == 403


@pytest.mark.parametrize(
    "header", ["", "Basic", "Basic !", "Bearer " + BASIC[6:], BASIC[:-4], BASIC + "AAAA"]
)
def test_another_password_is_refused(header: str) -> None:
    assert not is_password(header, PASSWORD)
    assert is_password(BASIC, PASSWORD)


LOGIN = Page(b"log in", "text/html", "default-src 'none'")


def test_a_login_page_needs_no_password_and_the_right_host() -> None:
    guard = Guard(inner, PORT, may_enter=may_enter, pages={"/login": LOGIN})
    answer = ask("/login", guard=guard, sec_fetch_site="none")
    assert (answer["status"], answer["body"]) == (200, "log in")
    assert answer["headers"]["content-security-policy"] == LOGIN.policy
    assert answer["headers"]["cache-control"] == "no-store"
    assert ask("/login", "POST", guard=guard)["status"] == 401
    assert ask("/login", guard=guard, host="evil.example")["status"] == 403
    assert ask("/login")["body"] == "secret"  # without the page it is an address as any other


def test_a_browser_without_the_password_gets_the_page_that_asks_and_a_program_a_sentence() -> None:
    guard = Guard(inner, PORT, may_enter=may_enter, ask=LOGIN, wrong="no token", as_json=True)
    page = ask("/", guard=guard, accept="text/html,*/*")
    assert (page["status"], page["body"]) == (401, "log in")
    refused = ask("/", guard=guard, accept="*/*")
    assert (refused["status"], json.loads(refused["body"])) == (401, {"error": "no token."})
    assert "www-authenticate" not in refused["headers"]  # the browser would ask in its own window
    assert ask("/", guard=guard, authorization=BASIC)["status"] == 200


def test_a_proxy_with_tls_may_be_in_front_of_a_server_with_a_name() -> None:
    guard = Guard(inner, PORT, names=["serve.example"])
    for scheme in ("http", "https"):
        own = {"host": "serve.example", "origin": f"{scheme}://serve.example"}
        assert ask(method="POST", guard=guard, **own)["status"] == 200
    other = {"host": "serve.example", "origin": "https://evil.example"}
    assert ask(method="POST", guard=guard, **other)["status"] == 403
