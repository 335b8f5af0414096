"""Progress: a bar on a terminal, log records elsewhere. Both go to standard error.

To show progress in another place too, for example in a browser, add a function to `watchers`.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal

from data_prep.core.text import duration, printable

log = logging.getLogger(__name__)

PLAIN_EVERY_S = 10.0


@dataclass(frozen=True)
class Moment:
    """The progress of a task at one moment.

    Attributes:
        title: name of the task.
        count: finished units.
        total: all units.
        unit: name of the units, such as "files".
        note: a short note, such as the current loss.
        per_second: mean speed of this process, without the units that an earlier run had finished;
            None before the second count.
        seconds_left: the remaining time at this speed; None before the second count.
        state: whether the task has just started, is running, or has ended, with or without error.
    """

    title: str
    count: int
    total: int
    unit: str
    note: str = ""
    per_second: float | None = None
    seconds_left: float | None = None
    state: Literal["started", "running", "done", "failed"] = "running"


# Functions that receive every count. They run in the counting thread, so they must be quick.
watchers: list[Callable[[Moment], None]] = []


class Progress:
    """A task with a count of units. It shows a bar on a terminal and logs lines elsewhere."""

    def __init__(self, title: str, total: int, unit: str) -> None:
        self.title, self.total, self.unit = title, total, unit
        self._start = self._last_line = time.monotonic()
        self._first: int | None = None
        self._count = self._shown = 0
        self._note = ""
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
                TextColumn("{task.fields[note]}", markup=False),
                console=Console(stderr=True),
            )
            self._bar.start()
            self._task = self._bar.add_task(self.title, total=self.total, note="")
        _notify(Moment(self.title, 0, self.total, self.unit, state="started"))
        return self

    def update(self, count: int, note: str = "", *, resumed: int = 0) -> None:
        """Set the absolute count of finished units.

        Args:
            count: finished units, those of an earlier run too.
            note: a short note, such as the current loss.
            resumed: the units since the last call that an earlier run had finished. They are not
                part of the speed.
        """
        if self._first is None:
            self._first = self._shown = count
        else:
            self._first += resumed
        if count <= self._first:
            self._start = time.monotonic()  # the time before it was spent on other work
        note = printable(note)
        self._count, self._note = count, note
        moment = self._moment("running")
        _notify(moment)
        if self._bar is not None:
            self._bar.update(self._task, completed=count, note=note)
            return
        now = time.monotonic()
        finished = count == self.total and count > self._shown
        if finished or (count < self.total and now - self._last_line >= PLAIN_EVERY_S):
            self._last_line, self._shown = now, count
            share = 100 * count // max(self.total, 1)
            text = f"{self.title}: {count}/{self.total} {self.unit} ({share} %)"
            if moment.per_second is not None:
                text += f", {moment.per_second:.1f}/s"
            if count < self.total and moment.seconds_left is not None:
                text += f", {duration(moment.seconds_left)} left"
            log.info(f"{text}, {note}" if note else text)

    def _moment(self, state: Literal["running", "done", "failed"]) -> Moment:
        per_second = seconds_left = None
        if self._first is not None and self._count > self._first:
            elapsed = max(time.monotonic() - self._start, 1e-9)
            per_second = (self._count - self._first) / elapsed
            seconds_left = max(self.total - self._count, 0) / per_second
        return Moment(
            self.title,
            self._count,
            self.total,
            self.unit,
            self._note,
            per_second,
            seconds_left,
            state,
        )

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        _notify(self._moment("done" if kind is None else "failed"))


def _notify(moment: Moment) -> None:
    for watcher in list(watchers):
        with suppress(Exception):  # a failing watcher must not stop the task
            watcher(moment)
