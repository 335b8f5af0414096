"""What the flow `retrain` shows and announces about its stage's result, without a server."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import small_root
from prefect.client.schemas.objects import State

from data_prep.core.errors import PipelineError
from data_prep.core.manifest import StageRef
from data_prep.core.storage.local import LocalStore
from dpnet.pipeline.config import Config, config_of_source
from dpnet.pipeline.retrain import NothingToDo
from flows import flow_run, new_data

SUMMARY = {
    "model": "dpnet",
    "images": {"name": "own", "version": 2, "added": 3, "changed": 1, "removed": 0},
    "started_from": 1,
    "champion": {"version": 1, "hole_psnr": 20.004},
    "version": 2,
    "hole_psnr": 21.5,
    "pairs_digest": "p" * 64,
    "promoted": True,
    "reason": "Its hole PSNR of 21.50 dB is above the 20.00 dB of version 1.",
}


class FakeServer:
    """The events sent and the artifacts created, instead of a server."""

    def __init__(self) -> None:
        self.events: list[tuple[Any, ...]] = []
        self.pages: list[str] = []
        self.is_down = False

    def send_event(self, *event: Any) -> None:
        if self.is_down:
            raise PipelineError("the server does not answer.")
        self.events.append(event)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> FakeServer:
    server = FakeServer()
    monkeypatch.setattr(flow_run, "send_event", server.send_event)
    monkeypatch.setattr(
        new_data, "create_markdown_artifact", lambda text, **about: server.pages.append(text)
    )
    return server


def test_the_result_of_watching_is_in_the_runs_log(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    records: list[str] = []
    run_log = logging.Logger("the log of a run")
    run_log.addFilter(lambda record: records.append(record.getMessage()) or True)  # type: ignore[func-returns-value]

    def check_source(*arguments: Any, **options: Any) -> dict[str, Any]:
        logging.getLogger("flows.new_data").info("watch own: nothing is new")
        return {"announced": False, "reason": "Nothing is new."}

    monkeypatch.setattr(flow_run, "get_run_logger", lambda: run_log)
    monkeypatch.setattr(new_data, "check_source", check_source)
    state = new_data.watch_raw_data.fn("demo", str(tmp_path))
    assert isinstance(state, State)
    assert (state.name, state.message) == ("Skipped", "Nothing is new.")
    assert records == ["watch own: nothing is new"]


def run_flow(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    result: StageRef | Exception,
    event: dict[str, Any] | None = None,
    *,
    register: bool = False,
) -> Any:
    """Run the flow with a stage that returns or raises `result`, and may register a champion."""

    def stage(config: Config, store: LocalStore, call: object) -> StageRef:
        if register:
            small_root.champion(small_root.new_store(store.folder))
        if isinstance(result, Exception):
            raise result
        return result

    monkeypatch.setattr(new_data, "retrain_stage", stage)
    config = config_of_source(str(tmp_path / "own"))
    return new_data.retrain_once(config, LocalStore(tmp_path / "root"), event)


def reference(*, skipped: bool = False, **changed: Any) -> StageRef:
    digest = "d" * 64
    folder = "retrains/dpnet/dddddddddddd"
    summary = {**SUMMARY, **changed}
    return StageRef("retrain", "dpnet", folder, digest, digest, 1.0, skipped, summary)


def test_a_new_champion_is_announced_and_shown_next_to_the_previous_one(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    result = run_flow(monkeypatch, tmp_path, reference(), register=True)
    assert result["promoted"]
    ((name, resource, model, payload, number),) = server.events
    assert (name, resource, model) == ("dpnet.model.promoted", "dpnet.model.dpnet", "dpnet")
    assert (payload["version"], payload["how"]) == (1, "always")
    assert payload["root"] == str(tmp_path / "root")
    assert number.version == 5
    (page,) = server.pages
    assert "| 1 | 20.00 | previous champion |" in page
    assert "| 2 | 21.50 | new, promoted to champion |" in page
    assert SUMMARY["reason"] in page


def test_a_challenger_is_shown_but_not_announced(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run_flow(monkeypatch, tmp_path, reference(promoted=False))
    assert server.events == []
    assert "kept as challenger" in server.pages[0]


def test_a_champion_that_cannot_be_announced_still_counts(
    server: FakeServer,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    server.is_down = True
    assert run_flow(monkeypatch, tmp_path, reference(), register=True)["promoted"]
    assert ("flows.champion_events", logging.WARNING, "the server does not answer.") in (
        caplog.record_tuples
    )


@pytest.mark.parametrize(
    ("result", "event", "reason"),
    [
        (NothingToDo("there is nothing to do."), None, "There is nothing to do."),
        (reference(skipped=True), None, "A model was trained on these images before: they made"),
        (reference(), {"dataset": "other"}, "The event is about the dataset other, not about own."),
    ],
)
def test_a_run_with_nothing_to_do_is_skipped_with_the_reason(
    server: FakeServer,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    result: StageRef | Exception,
    event: dict[str, Any] | None,
    reason: str,
) -> None:
    state = run_flow(monkeypatch, tmp_path, result, event)
    assert isinstance(state, State)
    assert (state.name, state.is_completed()) == ("Skipped", True)
    assert str(state.message).startswith(reason)
    assert server.events == []
