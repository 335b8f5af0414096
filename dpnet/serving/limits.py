"""The limits of a server, and the error that a client gets with its HTTP status."""

from __future__ import annotations

from dataclasses import dataclass

from data_prep.core.errors import PipelineError

STOPPED = "the server is stopping: send the photo again when it runs."
CLIENT_CLOSED = 499  # no status of HTTP; the metrics count it, and no client reads it


@dataclass(frozen=True)
class ServeLimits:
    """The limits of one request and of all open ones.

    Attributes:
        bytes: most bytes of an upload: the photo, the mask and the form around them.
        pixels: most pixels of a photo.
        seconds: the longest time of computing, without the time of waiting.
        queue: most requests that are read, waiting or computed at the same time.
        idle_seconds: the longest time without a byte of an upload.
        upload_seconds: the longest time of an upload.
    """

    bytes: int = 100_000_000
    pixels: int = 40_000_000
    seconds: float = 600.0
    queue: int = 32
    idle_seconds: float = 15.0
    upload_seconds: float = 300.0

    @property
    def bytes_at_once(self) -> int:
        """Return the most bytes of all uploads that are in memory at the same time."""
        return 4 * self.bytes

    @property
    def pixels_at_once(self) -> int:
        """Return the most pixels of all photos that wait at the same time."""
        return 4 * self.pixels


class RequestError(PipelineError):
    """A request that is refused or fails; the message is for the client.

    Attributes:
        status: the HTTP status.
        retry_after: seconds after which the same request may work, or None.
    """

    def __init__(self, status: int, message: str, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.status, self.retry_after = status, retry_after
