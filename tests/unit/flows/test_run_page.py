"""The log of a flow run, as its page shows it."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
from prefect.logging import get_logger

from data_prep.core.errors import PipelineError
from flows import run_page as story


@pytest.fixture
def log() -> Iterator[list[str]]:
    """What is logged about a flow run, formatted."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(logging.Formatter().format(record))  # type: ignore[method-assign]
    logger = get_logger("flow_runs")
    logger.addHandler(handler)
    story.tell_errors_in_a_sentence()
    yield lines
    logger.removeHandler(handler)
    for name in ("task_runs", "flow_runs"):
        get_logger(name).removeFilter(story._in_a_sentence)


def logged(error: Exception, times: int) -> None:
    try:
        raise error
    except Exception as raised:
        for _ in range(times):
            get_logger("flow_runs").error("Encountered an exception: %r", raised, exc_info=True)


def test_an_error_of_ours_is_one_line_that_says_what_to_do(log: list[str]) -> None:
    logged(PipelineError("the disk is full: free some space."), times=3)
    assert log == ["the disk is full: free some space."]


def test_an_error_that_nobody_foresaw_keeps_its_traceback(log: list[str]) -> None:
    logged(ValueError("odd"), times=1)
    assert "Traceback" in log[0]
    assert "odd" in log[0]
