"""Logging: sentences on a terminal, one record a line everywhere else.

Every module logs to `logging.getLogger(__name__)`. A command calls `start_logging` once. Code that
uses these packages as a library configures logging itself, as with any library.
"""

from __future__ import annotations

import logging
import sys
import time

PACKAGES = ("data_prep", "dpnet", "flows")
_TIMED = "%(asctime)sZ %(levelname)s %(name)s: %(message)s"


class _Sentences(logging.Formatter):
    """The message alone, after its level where that is a warning or worse."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        level = record.levelname.lower()
        return f"{level}: {text}" if record.levelno >= logging.WARNING else text


class _StandardError(logging.Handler):
    """Writes to what is standard error at that moment: tests and Prefect replace it."""

    def __init__(self) -> None:
        super().__init__()
        self._timed = logging.Formatter(_TIMED, "%Y-%m-%dT%H:%M:%S")
        self._timed.converter = time.gmtime
        self._sentences = _Sentences()

    def emit(self, record: logging.LogRecord) -> None:
        stream = sys.stderr
        if stream is None:  # the process has none
            return
        try:
            form = self._sentences if stream.isatty() else self._timed
            print(form.format(record), file=stream, flush=True)
        except (OSError, ValueError):  # the reader is gone: the work goes on without it
            pass


def start_logging(level: int = logging.INFO) -> None:
    """Send what our packages log to standard error. A second call changes nothing."""
    for name in PACKAGES:
        logger = logging.getLogger(name)
        if not any(isinstance(handler, _StandardError) for handler in logger.handlers):
            logger.addHandler(_StandardError())
        logger.setLevel(level)
        logger.propagate = False  # Prefect's handlers at the root would print each line again


def add_handler(handler: logging.Handler) -> None:
    """Send what our packages log to `handler` too, from level INFO."""
    for name in PACKAGES:
        logger = logging.getLogger(name)
        logger.addHandler(handler)
        if logger.getEffectiveLevel() > logging.INFO:
            logger.setLevel(logging.INFO)


def remove_handler(handler: logging.Handler) -> None:
    """Undo `add_handler`."""
    for name in PACKAGES:
        logging.getLogger(name).removeHandler(handler)
