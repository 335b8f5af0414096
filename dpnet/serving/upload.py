"""Read the upload of a request into memory, within the limits of size and time.

Starlette's own reader of forms writes uploads to disk above 1 MB. This one never does.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

from dpnet.serving.limits import RequestError, ServeLimits

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
RETRY_S = 5  # after which a client should try again; ours


class ClientGoneError(Exception):
    """The client has closed its connection."""


class Room:
    """The requests that are open and the bytes of their uploads. Use it from one event loop."""

    def __init__(self, limits: ServeLimits) -> None:
        self._limits = limits
        self.requests = self.bytes = self.pixels = 0

    @contextmanager
    def place(self) -> Iterator[Place]:
        """Take a place for one request. Raises RequestError if there is none."""
        if self.requests >= self._limits.queue:
            raise RequestError(
                429, f"the server is busy with {self.requests} requests: try again soon.", RETRY_S
            )
        place = Place(self, self._limits)
        self.requests += 1
        try:
            yield place
        finally:
            self.requests -= 1
            place.release()


class Place:
    """The memory that one request uses."""

    def __init__(self, room: Room, limits: ServeLimits) -> None:
        self._room, self._limits = room, limits
        self._bytes = self._pixels = 0

    def add_bytes(self, count: int) -> None:
        """Count bytes of an upload. Raises RequestError if all uploads together have too many."""
        if self._room.bytes + count > self._limits.bytes_at_once:
            raise _busy("bytes")
        self._room.bytes += count
        self._bytes += count

    def add_pixels(self, count: int) -> None:
        """Count pixels of a photo. Raises RequestError if all photos together have too many."""
        if self._room.pixels + count > self._limits.pixels_at_once:
            raise _busy("pixels")
        self._room.pixels += count
        self._pixels += count

    def release_bytes(self) -> None:
        """Say that the upload is not in memory any more."""
        self._room.bytes -= self._bytes
        self._bytes = 0

    def release(self) -> None:
        """Give everything back."""
        self.release_bytes()
        self._room.pixels -= self._pixels
        self._pixels = 0


def _busy(what: str) -> RequestError:
    return RequestError(
        429, f"the photos of other requests use all {what} in memory: try again soon.", RETRY_S
    )


async def read_upload(
    receive: Receive, announced: str | None, limits: ServeLimits, place: Place
) -> bytearray:
    """Read the body of a request.

    Args:
        receive: gives the next message of the connection.
        announced: the header Content-Length, or None.
        limits: of size and time.
        place: counts the bytes of all requests.

    Raises:
        RequestError: the body is too large or too slow, or there is no room for it.
        ClientGoneError: the client has closed the connection.
    """
    if announced is not None and announced.isdecimal():
        _check_size(int(announced), limits)
    body = bytearray()
    deadline = time.monotonic() + limits.upload_seconds
    while True:
        wait = min(limits.idle_seconds, deadline - time.monotonic())
        try:
            message = await asyncio.wait_for(receive(), max(wait, 0))
        except TimeoutError:
            raise RequestError(
                408,
                f"the upload has sent nothing for {limits.idle_seconds:g} s, or takes longer than"
                f" {limits.upload_seconds:g} s: send it again over a faster connection.",
            ) from None
        if message["type"] == "http.disconnect":
            raise ClientGoneError
        chunk = message.get("body", b"")
        _check_size(len(body) + len(chunk), limits)
        place.add_bytes(len(chunk))
        body += chunk
        if not message.get("more_body", False):
            return body


def _check_size(size: int, limits: ServeLimits) -> None:
    if size > limits.bytes:
        raise RequestError(
            413, f"the upload has more than {limits.bytes:,} bytes: send a smaller photo."
        )
