"""Calls in a process of their own: results, errors, crashes, time limits."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time

import pytest

from data_prep.core.apart import KILLS, Apart, DeathError
from data_prep.core.errors import PipelineError
from data_prep.pictures.limits import PhotoError


def act(what: str, value: int = 0) -> object:
    match what:
        case "crash":
            ctypes.string_at(0)
        case "abort":
            os.abort()
        case "exit":
            os._exit(value)
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "sleep":
            time.sleep(600)
        case "fail":
            raise PhotoError("it is broken")
        case "print":
            print("text on standard output", flush=True)
        case "odd":
            raise Odd(1, 2)
        case "stop":
            sys.exit(3)
    return os.getpid(), "x" * value


class Odd(Exception):
    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one} and {two}")


def test_calls_share_one_other_process() -> None:
    with Apart(act, 60) as apart:
        first, second = apart("", 3), apart("print", value=1 << 20)
    assert first[1] == "xxx"  # type: ignore[index]
    assert second == (first[0], "x" * (1 << 20))  # type: ignore[index]
    assert first[0] != os.getpid()  # type: ignore[index]


def test_an_error_of_the_function_is_raised_here() -> None:
    with Apart(act, 60) as apart:
        with pytest.raises(PhotoError, match=r"^it is broken$"):
            apart("fail")
        with pytest.raises(RuntimeError, match="Odd: 1 and 2"):
            apart("odd")
        assert apart("", 1)


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("crash", r"its decoder crashed \(SIGSEGV\)"),
        ("abort", r"its decoder crashed \(SIGABRT\)"),
        ("exit", r"its decoder ended the process \(exit status 7\)"),
        ("stop", r"its decoder ended the process \(exit status 3\)"),
        ("sleep", r"its decoder did not finish within 2 s"),
    ],
)
def test_a_call_that_ends_its_process_fails_with_a_reason_and_the_next_one_works(
    what: str, reason: str
) -> None:
    with Apart(act, 2 if what == "sleep" else 60) as apart:
        with pytest.raises(DeathError, match=f"^{reason}$"):
            apart(what, 7)
        assert apart("", 2)[1] == "xx"  # type: ignore[index]


def test_a_process_that_is_killed_from_outside_is_started_again() -> None:
    with Apart(act, 60) as apart, pytest.raises(PipelineError, match=f"was killed {KILLS} times"):
        apart("kill")


def test_the_process_ends_with_the_block() -> None:
    with Apart(act, 60) as apart:
        process = apart("", 1)[0]  # type: ignore[index]
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)
