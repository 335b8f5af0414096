"""Keep other web pages and other users out of a server on this machine.

`Guard` is in front of the ASGI applications of Prefect, MLflow and `dpnet serve`. It refuses

* a `Host` that is not this server's own address: DNS rebinding,
* an `Origin` that is not this server's own, and requests that the browser marks as made by the
  page of another site: cross-site requests,
* requests without the password or token, where the server behind it does not ask for one itself.

It also forbids other pages to show the server's pages in a frame (clickjacking).
`data_prep/core/web_guard.py` has the rules.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Collection, Mapping, MutableMapping
from typing import Any, NamedTuple

from data_prep.core.web_guard import (
    ASK_PASSWORD,
    PROTECTIVE,
    WRONG_PASSWORD,
    Headers,
    own_host,
    refusal,
)

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


class Page(NamedTuple):
    """A page that needs no password, such as one that asks for it.

    Attributes:
        body: The bytes.
        kind: Its media type.
        policy: Its Content-Security-Policy.
    """

    body: bytes
    kind: str
    policy: str


class Guard:
    """An ASGI application in front of another one."""

    def __init__(
        self,
        app: App,
        port: int,
        *,
        may_enter: Callable[[Headers], bool] = lambda headers: True,
        unguarded: Collection[str] = (),
        pages: Mapping[str, Page] | None = None,
        ask: Page | None = None,
        names: Collection[str] = (),
        wrong: str = WRONG_PASSWORD,
        as_json: bool = False,
        protective: Mapping[str, str] | None = None,
    ) -> None:
        """Guard `app`.

        Args:
            app: The ASGI application that answers what is let through.
            port: The port that the server listens on.
            may_enter: Returns whether the headers of a request carry the password; not needed
                where `app` asks for it itself.
            unguarded: Paths that need no password, such as a health check.
            pages: Pages that need no password, by path.
            ask: The answer to a browser that opens a page without the password; None lets the
                browser ask for it itself (HTTP basic authentication).
            names: Names of this server, if other machines reach it; see `own_host`.
            wrong: Why a request without the password is refused.
            as_json: Refuse with `{"error": …}` and not with plain text.
            protective: Headers of every answer that does not have them; None means `PROTECTIVE`.
        """
        self._app, self._may_enter, self._unguarded = app, may_enter, frozenset(unguarded)
        self._is_own = own_host(port, names)
        self._schemes = ("http", "https") if names else ("http",)  # a proxy may add TLS
        self._pages, self._ask = dict(pages or {}), ask
        self._wrong, self._as_json = wrong, as_json
        headers = dict(PROTECTIVE) if protective is None else protective
        self._protective = [
            (name.lower().encode(), each.encode()) for name, each in headers.items()
        ]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or let the application answer it."""
        if scope["type"] not in ("http", "websocket"):  # the server's start and end
            await self._app(scope, receive, send)
            return
        headers = _headers(scope)
        reason = refusal(scope.get("method", "GET"), headers, self._is_own, self._schemes)
        page = self._pages.get(scope["path"]) if scope.get("method") in ("GET", "HEAD") else None
        if reason is not None:
            await self._refuse(scope, send, 403, reason)
        elif page is not None:
            await self._answer_page(send, 200, page)
        elif scope["path"] in self._unguarded or self._may_enter(headers):
            await self._app(scope, receive, self._with_headers(send))
        elif self._ask is not None and any("text/html" in v for v in headers.get("accept", ())):
            await self._answer_page(send, 401, self._ask)
        else:
            await self._refuse(scope, send, 401, self._wrong)

    async def _refuse(self, scope: Scope, send: Send, status: int, reason: str) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008, "reason": reason})
            return
        extra = []
        if status == 401 and self._ask is None:
            extra = [(ASK_PASSWORD[0].lower().encode(), ASK_PASSWORD[1].encode())]
        if self._as_json:
            body, kind = json.dumps({"error": f"{reason}."}), "application/json"
        else:
            body, kind = f"{reason}\n", "text/plain; charset=utf-8"
        await self._answer(send, status, body.encode(), kind, extra)

    async def _answer_page(self, send: Send, status: int, page: Page) -> None:
        extra = [
            (b"content-security-policy", page.policy.encode()),
            (b"cache-control", b"no-store"),
        ]
        await self._answer(send, status, page.body, page.kind, extra)

    async def _answer(
        self, send: Send, status: int, body: bytes, kind: str, extra: list[tuple[bytes, bytes]]
    ) -> None:
        length, own = str(len(body)).encode(), {name for name, _ in extra}
        headers = [
            (b"content-type", kind.encode()),
            (b"content-length", length),
            *(each for each in self._protective if each[0] not in own),
            *extra,
        ]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    def _with_headers(self, send: Send) -> Send:
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
                message["headers"] = [*kept, *(h for h in self._protective if h[0] not in names)]
            await send(message)

        return sending


def _headers(scope: Scope) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name, value in scope["headers"]:
        found.setdefault(name.decode("latin-1").lower(), []).append(value.decode("latin-1"))
    return found
