"""Uploads: their limits of size and time, and the memory of all of them together."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

from dpnet.serving.limits import RequestError, ServeLimits
from dpnet.serving.upload import ClientGoneError, Receive, Room, read_upload

LIMITS = ServeLimits(bytes=100, pixels=50, queue=2, idle_seconds=0.05, upload_seconds=0.2)


def sender(chunks: Sequence[bytes | None], pause: float = 0.0, *, cut: bool = False) -> Receive:
    """Return a connection that sends chunks; None never comes."""
    left = list(chunks)

    async def receive() -> dict[str, Any]:
        await asyncio.sleep(pause)
        if not left and cut:
            return {"type": "http.disconnect"}
        chunk = left.pop(0)
        if chunk is None:
            await asyncio.Event().wait()
        return {"type": "http.request", "body": chunk, "more_body": bool(left) or cut}

    return receive


def read(receive: Receive, announced: str | None = None, room: Room | None = None) -> bytes:
    """Read an upload."""

    async def reading() -> bytes:
        with (room or Room(LIMITS)).place() as place:
            return bytes(await read_upload(receive, announced, LIMITS, place))

    return asyncio.run(reading())


def test_an_upload_of_the_limit_is_read_and_one_byte_more_is_refused() -> None:
    assert read(sender([b"x" * 60, b"y" * 40]), "100") == b"x" * 60 + b"y" * 40
    with pytest.raises(RequestError, match="more than 100 bytes") as error:
        read(sender([b"x" * 60, b"y" * 41]))  # not announced: chunked
    assert error.value.status == 413


def test_an_upload_that_announces_too_much_is_refused_before_anything_is_sent() -> None:
    with pytest.raises(RequestError) as error:
        read(sender([None]), "10000000000")
    assert error.value.status == 413


@pytest.mark.parametrize(
    "receive", [sender([b"x", None]), sender([b"x"] * 50, 0.03)], ids=["silent", "slow"]
)
def test_a_slow_upload_ends(receive: Receive) -> None:
    with pytest.raises(RequestError, match="send it again") as error:
        read(receive, "90")
    assert error.value.status == 408


def test_a_client_that_goes_is_noticed() -> None:
    with pytest.raises(ClientGoneError):
        read(sender([b"x"], cut=True), "90")


def test_more_requests_than_the_queue_are_asked_to_come_back() -> None:
    room = Room(LIMITS)
    with room.place(), room.place():
        with pytest.raises(RequestError, match="busy with 2 requests") as error, room.place():
            pass
        assert (error.value.status, error.value.retry_after) == (429, 5)
    with room.place():
        assert room.requests == 1
    assert room.requests == 0


def test_the_bytes_and_pixels_of_all_requests_have_a_bound() -> None:
    room = Room(LIMITS)
    with room.place() as first, room.place() as second:
        first.add_bytes(400)
        first.add_pixels(200)
        for add in (second.add_bytes, second.add_pixels):
            with pytest.raises(RequestError) as error:
                add(1)
            assert error.value.status == 429
        first.release_bytes()
        second.add_bytes(1)
        assert (room.bytes, room.pixels) == (1, 200)
    assert (room.bytes, room.pixels, room.requests) == (0, 0, 0)
