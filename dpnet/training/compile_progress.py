"""Tell what torch.compile is doing: before the first step it can take minutes. Needs only torch."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from data_prep.core.text import duration


class CompileProgress:
    """Counts the graphs that torch compiles.

    Args:
        tell: Gets a line such as "compiling the generator: 12 graphs, 41 s" after each graph.
        clock: Returns seconds.

    Attributes:
        graphs: Graphs compiled so far.
    """

    def __init__(
        self, tell: Callable[[str], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._tell, self._clock, self._start = tell, clock, clock()
        self._part, self.graphs = "the network", 0

    def begin(self, part: str) -> None:
        """Name the part that runs for the first time now."""
        self._part = part
        self._say()

    def add(self, _: Any = None) -> None:
        """Count a graph."""
        self.graphs += 1
        self._say()

    def _say(self) -> None:
        spent = duration(self._clock() - self._start)
        self._tell(f"compiling {self._part}: {self.graphs} graphs, {spent}")


@contextmanager
def compile_progress(tell: Callable[[str], None]) -> Iterator[CompileProgress]:
    """Tell about each graph that torch compiles while in the block."""
    from torch._dynamo.callback import callback_handler  # seconds to import

    progress = CompileProgress(tell)
    callback_handler.register_end_callback(progress.add)
    try:
        yield progress
    finally:
        callback_handler.remove_end_callback(progress.add)
