"""Logging: sentences on a terminal, lines with time, level and module everywhere else.

Every module logs to `logging.getLogger(__name__)`. A process of ours calls `start_logging` once at
its start. A program that uses these packages as a library configures logging itself.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TextIO

from data_prep.core.redact import redact
from data_prep.core.text import printable

PACKAGES = ("data_prep", "dpnet", "flows")


class PrintableLines(logging.Formatter):
    """The message without credentials. What cannot be shown is escaped, except line breaks."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the text of a record."""
        return printable(redact(super().format(record)), newlines=True)


class _Sentences(PrintableLines):
    """The message only; the level in front of it if that is WARNING or higher."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        level = record.levelname.lower()
        return f"{level}: {text}" if record.levelno >= logging.WARNING else text


class _TimedLines(PrintableLines):
    """Each line of the message with time (UTC), level and module.

    A log is read line by line, so no line may be without them. A line break in a file name can then
    not look like a record either.
    """

    def __init__(self) -> None:
        super().__init__()
        self.converter = time.gmtime

    def format(self, record: logging.LogRecord) -> str:
        at = self.formatTime(record, "%Y-%m-%dT%H:%M:%S")
        start = f"{at}Z {record.levelname} {record.name}:"
        return "\n".join(f"{start} {line}" for line in super().format(record).splitlines() or [""])


class _StandardError(logging.Handler):
    """Write to the current standard error: a progress bar, Prefect and tests replace it."""

    def __init__(self) -> None:
        super().__init__()
        self._sentences, self._timed_lines = _Sentences(), _TimedLines()

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record; never fail."""
        stream = sys.stderr
        if stream is None:  # a process without standard error
            return
        try:
            form = self._sentences if stream.isatty() else self._timed_lines
            text = form.format(record)
            try:
                _write(stream, text)
            except UnicodeEncodeError:
                encoding = stream.encoding or "ascii"
                _write(stream, text.encode(encoding, "backslashreplace").decode(encoding))
        except (OSError, ValueError):  # nobody reads it any more; the work continues
            pass
        except Exception:  # a message that does not fit its arguments
            with suppress(OSError, ValueError):
                self.handleError(record)


def _write(stream: TextIO, text: str) -> None:
    stream.write(f"{text}\n")  # in one call, so that lines of several threads do not mix
    stream.flush()


class Forward(logging.Handler):
    """Pass each record on as (level, name of the logger, text) to a function."""

    def __init__(self, send: Callable[[int, str, str], object]) -> None:
        super().__init__()
        self.setFormatter(PrintableLines())
        self._send = send

    def emit(self, record: logging.LogRecord) -> None:
        """Pass one record on; never fail."""
        with suppress(Exception):  # the work continues without its log
            self._send(record.levelno, record.name, self.format(record))


def start_logging(level: int = logging.INFO) -> None:
    """Write the records of our packages to standard error. A second call only sets the level."""
    for name in PACKAGES:
        logger = logging.getLogger(name)
        if not _writes(logger):
            logger.addHandler(_StandardError())
        logger.setLevel(level)
        logger.propagate = False  # else Prefect's handlers of the root logger repeat each line


def has_started() -> bool:
    """Return whether this process has called `start_logging`."""
    return all(_writes(logging.getLogger(name)) for name in PACKAGES)


def _writes(logger: logging.Logger) -> bool:
    return any(isinstance(handler, _StandardError) for handler in logger.handlers)


def add_handler(handler: logging.Handler) -> None:
    """Send the records of our packages to `handler` too, from level INFO."""
    for name in PACKAGES:
        logger = logging.getLogger(name)
        logger.addHandler(handler)
        if logger.getEffectiveLevel() > logging.INFO:
            logger.setLevel(logging.INFO)


def remove_handler(handler: logging.Handler) -> None:
    """Stop sending records to `handler`."""
    for name in PACKAGES:
        logging.getLogger(name).removeHandler(handler)
