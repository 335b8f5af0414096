"""Measure the time of a job, and estimate the rest."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from dpnet.serving.limits import RequestError

_SURE = 4  # tiles after which an estimate may end a job; ours
_MARGIN = 1.25  # by which it must be above the limit, because it is an estimate; ours
_ADVICE = "paint a smaller hole, or send a smaller photo."


class Pace:
    """The time of one job. Only its own computing counts."""

    def __init__(self, limit_s: float, clock: Callable[[], float]) -> None:
        self._limit, self._clock = limit_s, clock
        self._start, self._away = clock(), 0.0
        self._first: tuple[int, float] | None = None  # the first finished tile, and its time

    @property
    def seconds(self) -> float:
        """Return how long the job was computed."""
        return self._clock() - self._start - self._away

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Do not count the time of the block."""
        before = self._clock()
        yield
        self._away += self._clock() - before

    def check(self, done: int, total: int) -> float | None:
        """Return about how many seconds are left, or None if that is not known.

        The first tile does not count, because a model's first call takes longer.

        Args:
            done: finished tiles.
            total: all tiles.

        Raises:
            RequestError: the job took too long, or surely will.
        """
        seconds = self.seconds
        if seconds > self._limit:
            raise RequestError(504, f"the photo was not filled within {self._limit:g} s: {_ADVICE}")
        if self._first is None and done:
            self._first = done, seconds
        if self._first is None or done in (self._first[0], total):
            return None
        tiles, after = self._first
        left = (seconds - after) / (done - tiles) * (total - done)
        needed = seconds + left
        if done >= _SURE and needed > _MARGIN * self._limit:
            raise RequestError(
                504,
                f"the photo needs about {_time(needed)}, and the limit is {_time(self._limit)}:"
                f" {_ADVICE}",
            )
        return left


def _time(seconds: float) -> str:
    return f"{seconds / 60:.0f} minutes" if seconds >= 120 else f"{seconds:.3g} s"
