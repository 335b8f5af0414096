"""Keep other web pages and other users out of a server on this machine.

A server on the loopback address is not private: every page in the user's browser can send it
requests, a domain name can be pointed at it (DNS rebinding), and every user of the machine can
reach its port. So `Guard` stands in front of Prefect's and MLflow's servers and refuses

* a `Host` that is not this server's own address: DNS rebinding,
* an `Origin` that is not this server's own, and requests that the browser marks as made by the
  page of another site: cross-site requests,
* requests without the password, where the server behind it does not ask for one itself.

It also forbids other pages to show the server's pages in a frame (clickjacking).
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
from collections.abc import Awaitable, Callable, Collection, MutableMapping
from typing import Any

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

LOGIN = "/login"
_NAMES = ("127.0.0.1", "localhost", "[::1]")
# The key is in the fragment of the address (after #), which no browser sends to a server. The
# storage belongs to this origin, port included. Prefect's pages take their password from there.
_SCRIPT = """
const key = location.hash.slice(1);
if (key) localStorage.setItem("prefect-password", btoa(decodeURIComponent(key)));
location.replace("/");
"""
_PAGE = f"<!doctype html><title>Log in</title><script>{_SCRIPT}</script>".encode()
_SCRIPT_HASH = base64.b64encode(hashlib.sha256(_SCRIPT.encode()).digest()).decode()
_FRAMES = [
    (b"x-frame-options", b"SAMEORIGIN"),
    (b"referrer-policy", b"same-origin"),
    (b"x-content-type-options", b"nosniff"),
]


class Guard:
    """An ASGI application in front of another one."""

    def __init__(
        self,
        app: App,
        port: int,
        *,
        password: str | None = None,
        unguarded: Collection[str] = (),
        login_page: bool = False,
    ) -> None:
        """Guard `app`.

        Args:
            app: the ASGI application that answers what is let through.
            port: the port that the server listens on.
            password: `user:password` that every request must carry (HTTP basic authentication);
                None where `app` asks for it itself.
            unguarded: paths that need no password, such as a health check.
            login_page: serve `LOGIN`, a page that puts the key after `#` where Prefect's pages
                look for their password.
        """
        self._app, self._password, self._unguarded = app, password, frozenset(unguarded)
        self._hosts = frozenset(f"{name}:{port}" for name in _NAMES)
        self._origins = frozenset(f"http://{host}" for host in self._hosts)
        self._login_page = login_page

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):  # the server's start and end
            await self._app(scope, receive, send)
            return
        headers = _headers(scope)
        reason = self.refused(scope, headers)
        if reason is not None:
            await _refuse(scope, send, 403, reason)
        elif self._login_page and scope["type"] == "http" and scope["path"] == LOGIN:
            policy = f"default-src 'none'; script-src 'sha256-{_SCRIPT_HASH}'"
            extra = [(b"content-security-policy", policy.encode()), (b"cache-control", b"no-store")]
            await _answer(send, 200, _PAGE, b"text/html; charset=utf-8", extra)
        elif not self._may_enter(scope, headers):
            await _refuse(scope, send, 401, "the password is missing or wrong")
        else:
            await self._app(scope, receive, _with_headers(send))

    def refused(self, scope: Scope, headers: dict[bytes, list[bytes]]) -> str | None:
        """Return why a request is not let in; None if it may go on to the password."""
        hosts = [value.decode("latin-1").lower() for value in headers.get(b"host", [])]
        if len(hosts) != 1 or hosts[0] not in self._hosts:
            return "this server answers only under its own address"
        origins = [value.decode("latin-1").lower() for value in headers.get(b"origin", [])]
        if any(origin not in self._origins for origin in origins):
            return "this server answers only its own pages"
        site = [value.decode("latin-1") for value in headers.get(b"sec-fetch-site", [])]
        if any(value not in ("same-origin", "none") for value in site):
            mode = headers.get(b"sec-fetch-mode", [b""])[0]
            # A link to this server that somebody follows shows nothing to the other page.
            if scope.get("method") != "GET" or mode != b"navigate":
                return "this server answers only its own pages"
        return None

    def _may_enter(self, scope: Scope, headers: dict[bytes, list[bytes]]) -> bool:
        if self._password is None or scope["path"] in self._unguarded:
            return True
        given = headers.get(b"authorization", [])
        return len(given) == 1 and is_password(given[0].decode("latin-1"), self._password)


def is_password(header: str, password: str) -> bool:
    """Return whether an `Authorization` header carries `password` (as `user:password`)."""
    scheme, _, value = header.partition(" ")
    if scheme.lower() != "basic":
        return False
    try:
        given = base64.b64decode(value.strip(), validate=True)
    except (binascii.Error, ValueError):
        return False
    return hmac.compare_digest(given, password.encode())


def _headers(scope: Scope) -> dict[bytes, list[bytes]]:
    found: dict[bytes, list[bytes]] = {}
    for name, value in scope["headers"]:
        found.setdefault(name.lower(), []).append(value)
    return found


def _with_headers(send: Send) -> Send:
    async def sending(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            names = {name.lower() for name, _ in message.get("headers", [])}
            # Prefect allows every origin; none but its own gets this far.
            kept = [
                (name, value)
                for name, value in message.get("headers", [])
                if not name.lower().startswith(b"access-control-")
            ]
            message["headers"] = [*kept, *(h for h in _FRAMES if h[0] not in names)]
        await send(message)

    return sending


async def _refuse(scope: Scope, send: Send, status: int, reason: str) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008, "reason": reason})
        return
    extra = [(b"www-authenticate", b'Basic realm="dpnet"')] if status == 401 else []
    await _answer(send, status, f"{reason}\n".encode(), b"text/plain; charset=utf-8", extra)


async def _answer(
    send: Send, status: int, body: bytes, kind: bytes, extra: list[tuple[bytes, bytes]]
) -> None:
    length = str(len(body)).encode()
    headers = [(b"content-type", kind), (b"content-length", length), *_FRAMES, *extra]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
