"""HTTP connections that slow clients cannot hold open.

uvicorn limits the time between two requests only. These connections also limit the time of a
request's headers, of an upload that was refused and is still being sent, and of an answer that the
client does not read.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

IDLE_S = 15.0  # until a request has begun, and after an answer
STALL_S = 30.0  # without a byte of an answer


class PatientProtocol(H11Protocol):
    """A connection that ends if its client sends or reads nothing for too long."""

    idle_s = IDLE_S
    stall_s = STALL_S

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._idle: asyncio.TimerHandle | None = None
        self._stall: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start to wait for a request."""
        super().connection_made(transport)
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop all timers."""
        super().connection_lost(exc)
        self._stop(self._idle)
        self._stop(self._stall)
        self._idle = self._stall = None

    def data_received(self, data: bytes) -> None:
        """Take bytes of a request. Only a whole head ends the wait, not a part of it."""
        super().data_received(data)
        self._wait()

    def on_response_complete(self) -> None:
        """Start to wait for the next request, or for the rest of one that was refused."""
        super().on_response_complete()
        self._wait()

    def _wait(self) -> None:
        """Start the timer, unless it runs or a request is being answered."""
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop(self._idle)
            self._idle = None
        elif self._idle is None and not self.transport.is_closing():
            self._idle = self.loop.call_later(self.idle_s, self._end)

    def pause_writing(self) -> None:
        """Start to look whether the client reads its answer."""
        super().pause_writing()
        self._look(self.transport.get_write_buffer_size() + 1)

    def resume_writing(self) -> None:
        """Stop to look: the client reads."""
        super().resume_writing()
        self._stop(self._stall)
        self._stall = None

    def _look(self, before: int) -> None:
        left = self.transport.get_write_buffer_size()
        if left >= before:
            self.transport.abort()
        else:
            self._stall = self.loop.call_later(self.stall_s, self._look, left)

    def _end(self) -> None:
        self._idle = None
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()

    def _stop(self, timer: asyncio.TimerHandle | None) -> None:
        if timer is not None:
            timer.cancel()
