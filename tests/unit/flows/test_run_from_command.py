"""The flow that a command runs, without a Prefect server."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from data_prep.core.storage.store import Store
from dpnet.cli.commands import pipeline as commands
from dpnet.pipeline.config import Config
from flows import pipeline, run_from_command

CONFIG = "name: mine\nimages: {source: sample-photographs, name: mine}\ntrain: {steps: 10}\n"


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Return the parameters and the config of each flow that runs."""
    found: list[Any] = []

    def flow(**options: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        def shown(function: Callable[..., Any]) -> Callable[..., Any]:
            def run(*parameters: Any) -> Any:
                found.append(parameters)
                return function(*parameters)

            return run

        return shown

    def run_chain(config: Config, store: Store, *rest: Any, **options: Any) -> list[Any]:
        found.append(config)
        return []

    class Page:
        show_plan = show_results = run_stage = staticmethod(lambda *given: None)

    monkeypatch.setattr(pipeline, "flow", flow)
    monkeypatch.setattr(pipeline, "run_chain", run_chain)
    monkeypatch.setattr(pipeline, "summarize", lambda *given: {})
    monkeypatch.setattr(pipeline, "RunPage", lambda *given: nullcontext(Page()))
    monkeypatch.setattr(run_from_command, "_embedded_prefect", lambda home: nullcontext())
    monkeypatch.setattr(run_from_command, "_configured_api", lambda: None)
    monkeypatch.setattr(commands, "as_text", lambda *given: "")
    return found


def test_a_config_file_that_changes_after_the_check_has_no_effect(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ran: list[Any]
) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(CONFIG)
    # The last thing that the command does before it runs the flow.
    monkeypatch.setattr(
        commands, "check_root", lambda store: file.write_text(CONFIG.replace("10", "-1"))
    )
    root = str(tmp_path / "root")
    args = Namespace(config=str(file), set=["train.batch_size=3"], root=root, debug=False)
    commands.run(args)
    parameters, config = ran
    assert (config.train.steps, config.train.batch_size) == (10, 3)
    assert parameters == (str(file), root, ["train.batch_size=3"])  # the run is named after them
    assert "steps: -1" in file.read_text()
