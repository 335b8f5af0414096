"""What the flow `retrain` shows and tells of its stage's result, without a server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from prefect.client.schemas.objects import State

from data_prep.core.errors import PipelineError
from data_prep.core.manifest import StageRef
from data_prep.core.storage.local import LocalStore
from dpnet.pipeline.config import Config, config_of_source
from dpnet.pipeline.retrain import NothingToDo
from flows import new_data

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


class Seen:
    """Events sent and artifacts made, in the place of a server."""

    def __init__(self) -> None:
        self.events: list[tuple[Any, ...]] = []
        self.pages: list[str] = []
        self.away = False

    def send(self, *event: Any) -> None:
        if self.away:
            raise PipelineError("the server is away.")
        self.events.append(event)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    seen = Seen()
    monkeypatch.setattr(new_data, "send", seen.send)
    monkeypatch.setattr(
        new_data, "create_markdown_artifact", lambda text, **about: seen.pages.append(text)
    )
    return seen


def outcome(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    result: StageRef | Exception,
    event: dict[str, Any] | None = None,
) -> Any:
    def stage(config: Config, store: LocalStore, call: object) -> StageRef:
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


def test_a_promotion_is_told_of_and_shown_beside_the_champion_before(
    seen: Seen, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    result = outcome(monkeypatch, tmp_path, reference())
    assert result["promoted"]
    ((name, resource, model, payload),) = seen.events
    assert (name, resource, model) == ("dpnet.model.promoted", "dpnet.model.dpnet", "dpnet")
    assert (payload["version"], payload["champion"]["version"]) == (2, 1)
    assert payload["root"] == str(tmp_path / "root")
    (page,) = seen.pages
    assert "| 1 | 20.00 | champion before |" in page
    assert "| 2 | 21.50 | new, promoted to champion |" in page
    assert SUMMARY["reason"] in page


def test_a_challenger_is_shown_and_not_told_of(
    seen: Seen, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    outcome(monkeypatch, tmp_path, reference(promoted=False))
    assert seen.events == []
    assert "kept as challenger" in seen.pages[0]


def test_a_promotion_that_cannot_be_told_of_is_one_all_the_same(
    seen: Seen,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    seen.away = True
    assert outcome(monkeypatch, tmp_path, reference())["promoted"]
    assert "warning: the server is away." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("result", "event", "reason"),
    [
        (NothingToDo("the champion knows them."), None, "The champion knows them."),
        (reference(skipped=True), None, "These images were trained on before: version 2 came"),
        (reference(), {"dataset": "other"}, "The event is of the dataset other, not of own."),
    ],
)
def test_where_nothing_is_to_do_the_run_is_skipped_with_the_reason(
    seen: Seen,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    result: StageRef | Exception,
    event: dict[str, Any] | None,
    reason: str,
) -> None:
    state = outcome(monkeypatch, tmp_path, result, event)
    assert isinstance(state, State)
    assert (state.name, state.is_completed()) == ("Skipped", True)
    assert str(state.message).startswith(reason)
    assert seen.events == []
