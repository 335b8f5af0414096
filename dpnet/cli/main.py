"""The command `dpnet`: signals, results and how failures are told.

Exit status: 0 done, 1 failed (one sentence on standard error), 2 wrong usage, 130 stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType

from data_prep.core.errors import PipelineError, storage_error
from data_prep.core.logs import start_logging
from dpnet.cli.arguments import build_parser

STOPPED = 130
_STOPPED = "stopped; the same command resumes."


def main(argv: Sequence[str] | None = None) -> int:
    """Carry out the command in `argv` and return its exit status."""
    _stop_on_signals()
    start_logging()
    try:
        args = build_parser().parse_args(argv)
    except KeyboardInterrupt:
        print(f"dpnet: {_STOPPED}", file=sys.stderr, flush=True)
        return 130
    try:
        from dpnet.cli import commands

        result, text = getattr(commands, args.command)(args)
        print(json.dumps(result) if args.json else text, flush=True)
        return 0 if result["ok"] else 1
    except BrokenPipeError:  # its reader, `head` perhaps, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except BaseException as error:
        return _tell(error, args)


def _tell(error: BaseException, args: argparse.Namespace) -> int:
    """Say on standard error why it ended; the exit status."""
    if args.debug:
        import traceback

        traceback.print_exception(error)
    sentence, status = _explain(error)
    print(f"dpnet: {sentence}", file=sys.stderr, flush=True)
    if args.json:
        print(json.dumps({"ok": False, "error": sentence}), flush=True)
    return status


def _explain(error: BaseException) -> tuple[str, int]:
    if signal.getsignal(signal.SIGINT) is _end:
        # It was told to stop, whatever Prefect has made of that: a cancelled future, perhaps.
        return _STOPPED, STOPPED
    match error:
        case PipelineError():
            return " ".join(str(error).split()), 1
        case OSError():
            where = error.filename if isinstance(error.filename, str) else "the storage"
            return str(storage_error(error, where)), 1
        case Exception():
            text = " ".join(str(error).split())
            return (
                f"internal error: {type(error).__name__}: {text};"
                " run again with --debug for the traceback.",
                1,
            )
    # KeyboardInterrupt, and what Prefect and Ray make of SIGTERM while they are at work.
    return _STOPPED, STOPPED


def _stop_on_signals() -> None:
    """Ctrl-C and SIGTERM raise KeyboardInterrupt once; after that they end the process at once."""

    def stop(number: int, frame: FrameType | None) -> None:
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, _end)
        raise KeyboardInterrupt

    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, stop)


def _end(number: int, frame: FrameType | None) -> None:
    os.write(sys.stderr.fileno(), f"dpnet: {_STOPPED}\n".encode())
    os._exit(STOPPED)
