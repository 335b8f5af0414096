"""Logging: what a terminal shows, what a log file gets."""

from __future__ import annotations

import io
import logging
import re
import sys

import pytest

from data_prep.core.logs import PACKAGES, add_handler, remove_handler, start_logging

log = logging.getLogger("data_prep.some.module")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_elsewhere_than_on_a_terminal_each_record_is_one_line_with_time_level_and_module(
    capsys: pytest.CaptureFixture[str],
) -> None:
    start_logging()
    log.info("2 photos")
    log.warning("1 photo is broken")
    first, second = capsys.readouterr().err.splitlines()
    assert re.fullmatch(
        r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ INFO data_prep.some.module: 2 photos", first
    )
    assert second.endswith("Z WARNING data_prep.some.module: 1 photo is broken")


def test_on_a_terminal_sentences_stand_alone_and_only_warnings_name_their_level(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    start_logging()
    log.info("2 photos")
    log.warning("1 photo is broken")
    assert terminal.getvalue() == "2 photos\nwarning: 1 photo is broken\n"


def test_a_second_start_does_not_print_twice(capsys: pytest.CaptureFixture[str]) -> None:
    start_logging()
    start_logging()
    log.info("once")
    assert capsys.readouterr().err.count("once") == 1


def test_a_closed_or_missing_standard_error_stops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    closed = io.StringIO()
    closed.close()
    start_logging()
    for stream in (closed, None):
        monkeypatch.setattr(sys, "stderr", stream)
        log.info("nobody reads this")


def test_an_added_handler_gets_every_record_until_it_is_removed() -> None:
    records: list[logging.LogRecord] = []

    class Keeping(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            records.append(record)

    handler = Keeping()
    add_handler(handler)
    log.info("seen")
    remove_handler(handler)
    log.info("not seen")
    assert [record.message if hasattr(record, "message") else record.msg for record in records] == [
        "seen"
    ]
    assert all(handler not in logging.getLogger(name).handlers for name in PACKAGES)
