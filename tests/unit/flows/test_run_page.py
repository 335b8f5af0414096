"""The page of a flow run: what it copies to the run's log, without a server."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from data_prep.core.logs import has_started
from data_prep.core.manifest import StageRef
from data_prep.core.progress import Moment
from data_prep.core.storage.local import LocalStore
from dpnet.pipeline.config import load_config
from flows import flow_run
from flows.run_page import RunPage, links, progress_line, training_text


@pytest.fixture
def run_log(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Return the level and the message of each record in the run's log."""
    records: list[tuple[str, str]] = []
    logger = logging.Logger("the log of a run", logging.DEBUG)
    handler = logging.Handler()
    handler.emit = lambda record: records.append((record.levelname, record.getMessage()))  # type: ignore[method-assign]
    logger.addHandler(handler)
    monkeypatch.setattr(flow_run, "get_run_logger", lambda: logger)
    return records


@pytest.fixture
def page(run_log: list[tuple[str, str]], tmp_path: Path) -> RunPage:
    return RunPage(load_config("demo"), LocalStore(tmp_path))


def test_messages_of_our_packages_reach_the_runs_log_with_their_levels(
    page: RunPage, run_log: list[tuple[str, str]]
) -> None:
    with page:
        logging.getLogger("data_prep.images.stage").info("images: %d new", 3)
        logging.getLogger("dpnet.training.loop").warning("100 % of the steps were skipped")
    assert run_log == [
        ("INFO", "images: 3 new"),
        ("WARNING", "100 % of the steps were skipped"),
    ]


def test_debug_messages_and_other_packages_stay_out_of_the_runs_log(
    page: RunPage, run_log: list[tuple[str, str]]
) -> None:
    with page:
        logging.getLogger("dpnet.training.loop").debug("a detail")
        logging.getLogger("urllib3").warning("a retry")
    assert run_log == []


def test_nothing_reaches_the_runs_log_after_the_run(
    page: RunPage, run_log: list[tuple[str, str]]
) -> None:
    with pytest.raises(ValueError, match="it failed"), page:
        raise ValueError("it failed")
    logging.getLogger("dpnet.training.loop").info("too late")
    assert run_log == []


@pytest.mark.parametrize(
    ("moment", "line"),
    [
        (Moment("train", 0, 40, "steps"), "train: 0 of 40 steps"),
        (
            Moment("train", 10, 40, "steps", "loss 0.5", per_second=2.0, seconds_left=15.0),
            "train: 10 of 40 steps, 2.0/s, 15 s left, loss 0.5",
        ),
        (
            Moment("train", 40, 40, "steps", per_second=2.0, seconds_left=0.0),
            "train: 40 of 40 steps, 2.0/s",
        ),
    ],
)
def test_the_progress_line_has_the_speed_and_the_time_left_once_they_are_known(
    moment: Moment, line: str
) -> None:
    assert progress_line(moment) == line


@pytest.mark.parametrize("of_worker", [True, False])
def test_a_process_that_a_worker_started_logs_to_standard_error(
    of_worker: bool, page: RunPage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flows.run_page.survive_closed_output", lambda: None)
    if of_worker:
        monkeypatch.setenv("PREFECT__FLOW_RUN_ID", "a flow run")
    with page:
        assert has_started() == of_worker


def test_where_training_runs_is_shown_with_links_and_without_passwords() -> None:
    facts = ["The RayJob a/b-1 died (*Killed*).", "Ray dashboard: http://me:secret@head:8265"]
    assert training_text(facts) == (
        "* The RayJob a/b-1 died (\\*Killed\\*).\n"
        "* Ray dashboard: [http://head:8265](http://head:8265)"
    )


def test_a_run_with_a_version_links_the_page_that_fills_photos(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, store = load_config("demo"), LocalStore(tmp_path)
    folder = "registry/dpnet/0123456789ab"
    registered = StageRef("register", "dpnet", folder, "r" * 64, "c" * 64, 0.1, False)
    monkeypatch.delenv("DPNET_SERVE_URL", raising=False)
    assert links(config, store, [registered]) == {}
    monkeypatch.setenv("DPNET_SERVE_URL", "http://127.0.0.1:8400")
    assert links(config, store, [registered]) == {"try it": "http://127.0.0.1:8400"}
    assert links(config, store, []) == {}
