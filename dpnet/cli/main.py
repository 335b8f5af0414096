"""The command `dpnet`: its signals, results and errors.

README.md says what each exit status means.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Sequence
from importlib import import_module
from types import FrameType
from typing import Any, TextIO

from data_prep.core.environment import ALL, THREADS, wrong_variable
from data_prep.core.errors import ConfigError, PipelineError, storage_error
from data_prep.core.logs import start_logging
from data_prep.core.redact import redact
from data_prep.core.standard_streams import prepare_streams
from data_prep.core.temporary import temporary_folder
from data_prep.core.text import printable
from dpnet.cli.parser import build_parser

DONE, FAILED, WRONG_USAGE, STOPPED = 0, 1, 2, 130  # exit status; 2 is also argparse's
_STOPPED = "stopped; the same command resumes."


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command in `argv` and return its exit status."""
    for name, value in THREADS.items():
        os.environ.setdefault(name, value)
    prepare_streams()
    _stop_on_signals()
    start_logging()
    try:
        args = build_parser().parse_args(argv)
    except KeyboardInterrupt:
        print(f"dpnet: {_STOPPED}", file=sys.stderr, flush=True)
        return STOPPED
    try:
        if wrong := wrong_variable(ALL):
            raise ConfigError(wrong)
        result, text = function_of(args.command)(args)
        try:
            print(json.dumps(result) if args.json else printable(text, newlines=True), flush=True)
        except OSError as error:
            _drop(sys.stdout)
            if isinstance(error, BrokenPipeError):
                raise
            raise PipelineError(
                f"the result cannot be written to standard output: {error.strerror}. Send it"
                " elsewhere. The work itself is done."
            ) from error
        return DONE if result["ok"] else FAILED
    except BrokenPipeError:  # the reader, for example `head`, has ended
        _drop(sys.stdout)
        return FAILED
    except BaseException as error:
        return _report(error, args)


def _drop(stream: TextIO) -> None:
    """Send what a stream still holds to /dev/null, because its file or reader takes no more."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def function_of(command: str) -> Any:
    """Import the function "file.function" of `dpnet/cli/commands`; `--help` needs none of them."""
    file, _, function = command.partition(".")
    return getattr(import_module(f"dpnet.cli.commands.{file}"), function)


def _report(error: BaseException, args: argparse.Namespace) -> int:
    """Print on standard error why the command ended, and return the exit status."""
    sentence, status = _explain(error)
    if status == STOPPED:
        sentence = getattr(args, "stopped", sentence)  # a command may say what has ended
    sentence = printable(redact(sentence))
    lines = [f"dpnet: {sentence}"]
    if args.debug:
        import traceback

        text = "".join(traceback.format_exception(error))
        lines.insert(0, printable(redact(text), newlines=True))
    _print("\n".join(lines), sys.stderr)
    if args.json:
        _print(json.dumps({"ok": False, "error": sentence}), sys.stdout)
    return status


def _print(text: str, stream: TextIO) -> None:
    """Print a text about a failure; the exit status counts, even if nobody reads the text."""
    try:
        print(text, file=stream, flush=True)
    except OSError:
        _drop(stream)


def _explain(error: BaseException) -> tuple[str, int]:
    """Return one sentence about an error, and the exit status."""
    if signal.getsignal(signal.SIGINT) is _end:
        # A signal came. Prefect may turn it into another error, for example a cancelled future.
        return _STOPPED, STOPPED
    match error:
        case PipelineError():
            status = WRONG_USAGE if isinstance(error, ConfigError) else FAILED
            return " ".join(str(error).split()), status
        case OSError():
            where = f"the root or the temporary folder {temporary_folder()}"
            return str(storage_error(error, error.filename or where)), FAILED
        case Exception():
            text = " ".join(str(error).split())
            return (
                f"internal error: {type(error).__name__}: {text};"
                " run again with --debug for the traceback.",
                FAILED,
            )
    # KeyboardInterrupt, or the error that Prefect or Ray raises on SIGTERM.
    return _STOPPED, STOPPED


def _stop_on_signals() -> None:
    """Let Ctrl-C and SIGTERM raise KeyboardInterrupt once, and then end the process at once."""

    def stop(number: int, frame: FrameType | None) -> None:
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, _end)
        raise KeyboardInterrupt

    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, stop)


def _end(number: int, frame: FrameType | None) -> None:
    os.write(sys.stderr.fileno(), f"dpnet: {_STOPPED}\n".encode())
    os._exit(STOPPED)
