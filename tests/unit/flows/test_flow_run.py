"""The errors in the log of a flow run."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Iterator

import pytest
from prefect.logging import get_logger

from data_prep.core.errors import PipelineError
from flows import flow_run


@pytest.fixture
def log() -> Iterator[list[str]]:
    """Return the formatted records of a flow run."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(logging.Formatter().format(record))  # type: ignore[method-assign]
    logger = get_logger("flow_runs")
    logger.addHandler(handler)
    flow_run.shorten_logged_errors()
    yield lines
    logger.removeHandler(handler)
    for name in ("task_runs", "flow_runs"):
        get_logger(name).removeFilter(flow_run._shorten_error)


def log_error(error: Exception, times: int) -> None:
    try:
        raise error
    except Exception as raised:
        for _ in range(times):
            get_logger("flow_runs").error("Encountered an exception: %r", raised, exc_info=True)


def test_a_pipeline_error_is_logged_once_without_a_traceback(log: list[str]) -> None:
    log_error(PipelineError("the disk is full: free some space."), times=3)
    assert log == ["the disk is full: free some space."]


def test_any_other_error_keeps_its_traceback(log: list[str]) -> None:
    log_error(ValueError("odd"), times=1)
    assert "Traceback" in log[0]
    assert "odd" in log[0]


def test_an_error_that_is_not_ours_shows_no_credentials_and_no_controls(log: list[str]) -> None:
    error = ValueError("http://me:hunter2@h refused \x1b[2J")
    log_error(error, times=1)
    with pytest.raises(RuntimeError) as caught, flow_run.without_credentials():
        raise error
    # Prefect logs the traceback and stores the message.
    text = "".join(traceback.format_exception(caught.value))
    assert "ValueError: http://h refused \\x1b[2J" in text
    for shown in (text, *log):
        assert "hunter2" not in shown
        assert "\x1b" not in shown
