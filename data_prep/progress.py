"""Progress: a bar on a terminal, plain lines in a log. Both go to standard error."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

PLAIN_EVERY_S = 10.0
listeners: list[Callable[[str], None]] = []  # are told too, where nobody reads standard error


def say(message: str) -> None:
    """One plain line for people; standard output is kept for results."""
    print(message, file=sys.stderr, flush=True)
    for listener in listeners:
        listener(message)


class Progress:
    """Counts `unit`s of one task. `update` takes the new absolute count and a short note."""

    def __init__(self, title: str, total: int, unit: str) -> None:
        self.title, self.total, self.unit = title, total, unit
        self._start = self._last_line = time.monotonic()
        self._first: int | None = None
        self._shown = 0
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> Progress:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            self._bar = Bar(
                TextColumn("{task.description:<16}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn(self.unit),
                TimeRemainingColumn(compact=True),
                TextColumn("{task.fields[note]}"),
                console=Console(stderr=True),
            )
            self._bar.start()
            self._task = self._bar.add_task(self.title, total=self.total, note="")
        return self

    def update(self, count: int, note: str = "") -> None:
        if self._first is None:
            self._first = self._shown = count
            self._start = time.monotonic()  # what came before the first was no work of this kind
        if self._bar is not None:
            self._bar.update(self._task, completed=count, note=note)
            return
        now = time.monotonic()
        finished = count == self.total and count > self._shown
        if finished or (count < self.total and now - self._last_line >= PLAIN_EVERY_S):
            self._last_line, self._shown = now, count
            speed = (count - self._first) / max(now - self._start, 1e-9)
            share = 100 * count // max(self.total, 1)
            text = f"{self.title}: {count}/{self.total} {self.unit} ({share} %)"
            if speed > 0:
                text += f", {speed:.1f}/s"
            if count < self.total and speed > 0:
                text += f", {_duration((self.total - count) / speed)} left"
            say(f"{text}, {note}" if note else text)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()


def _duration(seconds: float) -> str:
    """As "40 s", "12 min" or "5.5 h"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
