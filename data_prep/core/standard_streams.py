"""Make the standard streams of a process usable, whatever its parent has given it."""

from __future__ import annotations

import io
import os
import sys


def prepare_streams() -> None:
    """Open closed standard streams on /dev/null, and escape what the terminal cannot show.

    A process of ours calls it first. Otherwise the next opened file gets the number of the closed
    stream, and a library that writes to standard error writes into that file.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != number:
                os.dup2(opened, number)
                os.close(opened)
            os.set_inheritable(number, True)
        if getattr(sys, name) is None:
            mode = "r" if name == "stdin" else "w"
            setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and not _shows_everything(stream.encoding):
            stream.reconfigure(errors="backslashreplace")


def _shows_everything(encoding: str) -> bool:
    return encoding.lower().replace("_", "-").startswith("utf-")
