"""Keep other web pages and other users out of a server on this machine.

`Guard` is in front of Prefect's and MLflow's servers and refuses

* a `Host` that is not this server's own address: DNS rebinding,
* an `Origin` that is not this server's own, and requests that the browser marks as made by the
  page of another site: cross-site requests,
* requests without the password, where the server behind it does not ask for one itself.

It also forbids other pages to show the server's pages in a frame (clickjacking).
`data_prep/core/web_guard.py` has the rules.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Awaitable, Callable, Collection, MutableMapping
from typing import Any

from data_prep.core.web_guard import (
    ASK_PASSWORD,
    PROTECTIVE,
    WRONG_PASSWORD,
    Headers,
    has_password,
    own_host,
    refusal,
)
from flows.local_server.password import LOGIN

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

# The key is in the fragment of the address (after #), which no browser sends to a server. The
# storage belongs to this origin, port included. Prefect's pages take their password from there.
_SCRIPT = """
const key = location.hash.slice(1);
if (key) localStorage.setItem("prefect-password", btoa(decodeURIComponent(key)));
location.replace("/");
"""
_PAGE = f"<!doctype html><title>Log in</title><script>{_SCRIPT}</script>".encode()
_SCRIPT_HASH = base64.b64encode(hashlib.sha256(_SCRIPT.encode()).digest()).decode()
_PROTECTIVE = [(name.lower().encode(), value.encode()) for name, value in PROTECTIVE]


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
        names: Collection[str] = (),
    ) -> None:
        """Guard `app`.

        Args:
            app: The ASGI application that answers what is let through.
            port: The port that the server listens on.
            password: `user:password` that every request must carry (HTTP basic authentication);
                None where `app` asks for it itself.
            unguarded: Paths that need no password, such as a health check.
            login_page: Serve `LOGIN`, a page that puts the key after `#` where Prefect's pages
                look for their password.
            names: Names of this server, if other machines reach it; see `own_host`.
        """
        self._app, self._password, self._unguarded = app, password, frozenset(unguarded)
        self._is_own = own_host(port, names)
        self._login_page = login_page

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or let the application answer it."""
        if scope["type"] not in ("http", "websocket"):  # the server's start and end
            await self._app(scope, receive, send)
            return
        headers = _headers(scope)
        reason = refusal(scope.get("method", "GET"), headers, self._is_own)
        if reason is not None:
            await _refuse(scope, send, 403, reason)
        elif self._login_page and scope["type"] == "http" and scope["path"] == LOGIN:
            policy = f"default-src 'none'; script-src 'sha256-{_SCRIPT_HASH}'"
            extra = [(b"content-security-policy", policy.encode()), (b"cache-control", b"no-store")]
            await _answer(send, 200, _PAGE, b"text/html; charset=utf-8", extra)
        elif not self._may_enter(scope, headers):
            await _refuse(scope, send, 401, WRONG_PASSWORD)
        else:
            await self._app(scope, receive, _with_headers(send))

    def _may_enter(self, scope: Scope, headers: Headers) -> bool:
        if self._password is None or scope["path"] in self._unguarded:
            return True
        return has_password(headers, self._password)


def _headers(scope: Scope) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name, value in scope["headers"]:
        found.setdefault(name.decode("latin-1").lower(), []).append(value.decode("latin-1"))
    return found


def _with_headers(send: Send) -> Send:
    """Return a `send` that adds the protective headers and removes those that allow origins."""

    async def sending(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            names = {name.lower() for name, _ in message.get("headers", [])}
            # Prefect allows every origin; none but its own gets this far.
            kept = [
                (name, value)
                for name, value in message.get("headers", [])
                if not name.lower().startswith(b"access-control-")
            ]
            message["headers"] = [*kept, *(h for h in _PROTECTIVE if h[0] not in names)]
        await send(message)

    return sending


async def _refuse(scope: Scope, send: Send, status: int, reason: str) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008, "reason": reason})
        return
    ask = [(ASK_PASSWORD[0].lower().encode(), ASK_PASSWORD[1].encode())] if status == 401 else []
    await _answer(send, status, f"{reason}\n".encode(), b"text/plain; charset=utf-8", ask)


async def _answer(
    send: Send, status: int, body: bytes, kind: bytes, extra: list[tuple[bytes, bytes]]
) -> None:
    length = str(len(body)).encode()
    headers = [(b"content-type", kind), (b"content-length", length), *_PROTECTIVE, *extra]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
