"""Logging: the text on a terminal, the lines in a log, and the records that go elsewhere."""

from __future__ import annotations

import io
import logging
import re
import subprocess
import sys

import pytest

from data_prep.core.logs import (
    PACKAGES,
    Forward,
    add_handler,
    has_started,
    remove_handler,
    start_logging,
)
from data_prep.core.pool import run_tasks

log = logging.getLogger("data_prep.some.module")
START = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_in_a_log_each_record_is_one_line_with_time_level_and_module(
    capsys: pytest.CaptureFixture[str],
) -> None:
    start_logging()
    log.info("2 photos")
    log.warning("1 photo is broken")
    first, second = capsys.readouterr().err.splitlines()
    assert re.fullmatch(rf"{START} INFO data_prep.some.module: 2 photos", first)
    assert re.fullmatch(rf"{START} WARNING data_prep.some.module: 1 photo is broken", second)


def test_in_a_log_each_line_of_a_long_message_has_time_level_and_module(
    capsys: pytest.CaptureFixture[str],
) -> None:
    start_logging()
    log.info("stack of worker 0:\n  loop.py, line 7\r\n  step.py, line 9")
    log.info("")
    lines = capsys.readouterr().err.splitlines()
    texts = ["stack of worker 0:", "  loop.py, line 7", "  step.py, line 9", ""]
    for line, text in zip(lines, texts, strict=True):
        assert re.fullmatch(rf"{START} INFO data_prep.some.module: {re.escape(text)}", line)


def test_in_a_log_a_traceback_has_time_level_and_module_too(
    capsys: pytest.CaptureFixture[str],
) -> None:
    start_logging()
    try:
        raise ValueError("broken")
    except ValueError:
        log.exception("it failed")
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].endswith("ERROR data_prep.some.module: ValueError: broken")
    assert all(re.match(rf"{START} ERROR ", line) for line in lines)


def test_on_a_terminal_only_warnings_and_errors_show_their_level(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    start_logging()
    log.info("2 photos:\na.png, b.png")
    log.warning("1 photo is broken")
    log.error("all are broken")
    assert terminal.getvalue() == (
        "2 photos:\na.png, b.png\nwarning: 1 photo is broken\nerror: all are broken\n"
    )


def test_a_second_start_does_not_write_twice(capsys: pytest.CaptureFixture[str]) -> None:
    assert not has_started()
    start_logging()
    start_logging()
    assert has_started()
    log.info("once")
    assert capsys.readouterr().err.count("once") == 1


def test_a_closed_or_missing_standard_error_stops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    closed = io.StringIO()
    closed.close()
    start_logging()
    for stream in (closed, None):
        monkeypatch.setattr(sys, "stderr", stream)
        log.info("nobody reads this")
        log.info("nor %d this", "is")
        assert has_started()


def test_a_reader_that_has_ended_does_not_end_the_process() -> None:
    code = (
        "import logging, sys; from data_prep.core.logs import start_logging; start_logging();"
        "sys.stdin.read(); logging.getLogger('data_prep').info('nobody reads this');"
        "print('continued', flush=True); import os; os._exit(0)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stderr is not None
        process.stderr.close()
        process.stderr = None
        out, _ = process.communicate(b"", timeout=30)
    assert out == b"continued\n"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_character_that_the_log_cannot_hold_is_escaped(
    encoding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = io.BytesIO()
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(data, encoding))
    start_logging()
    log.info("照片 %s", "caf\udce9.png")
    assert data.getvalue().decode(encoding).endswith(": \\u7167\\u7247 caf\\udce9.png\n")


def test_a_message_that_does_not_fit_its_arguments_is_reported_and_stops_nothing(
    capsys: pytest.CaptureFixture[str],
) -> None:
    start_logging()
    log.info("%d photos", "two")
    assert "--- Logging error ---" in capsys.readouterr().err


def test_an_added_handler_gets_every_record_until_it_is_removed() -> None:
    seen: list[tuple[int, str, str]] = []
    handler = Forward(lambda *record: seen.append(record))
    add_handler(handler)
    log.info("%d photos", 2)
    log.warning("broken")
    remove_handler(handler)
    log.info("not seen")
    assert seen == [
        (logging.INFO, "data_prep.some.module", "2 photos"),
        (logging.WARNING, "data_prep.some.module", "broken"),
    ]
    assert all(handler not in logging.getLogger(name).handlers for name in PACKAGES)


def test_a_handler_whose_reader_fails_stops_nothing() -> None:
    def fail(level: int, name: str, text: str) -> None:
        raise RuntimeError("the server is away")

    seen: list[str] = []
    failing, working = Forward(fail), Forward(lambda level, name, text: seen.append(text))
    add_handler(failing)
    add_handler(working)
    log.info("2 photos")
    remove_handler(failing)
    remove_handler(working)
    assert seen == ["2 photos"]


def log_task(number: int) -> int:
    logging.getLogger("data_prep.some.task").info("task %d", number)
    return number


@pytest.mark.parametrize("started", [True, False])
def test_worker_processes_log_if_their_parent_does(
    started: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    if started:
        start_logging()
    assert list(run_tasks(log_task, range(3), 2)) == [0, 1, 2]
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == (3 if started else 0)
    assert all(re.fullmatch(rf"{START} INFO data_prep.some.task: task \d", line) for line in lines)
