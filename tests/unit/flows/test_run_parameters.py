"""Parameters of a flow run with a secret: they are refused, and shown nowhere."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from data_prep.core.errors import PipelineError
from flows import flow_run, pipeline
from flows.forms import Evaluate, Images, Launch, Train

SECRET = "hunter2-must-not-be-seen"
ADDRESS = f"http://me:{SECRET}@127.0.0.1:9"
PARAMETERS: list[dict[str, Any]] = [
    {"images": Images(source=f"s3://me:{SECRET}@bucket/photos")},
    {"train": Train(init_from=ADDRESS)},
    {"launch": Launch(address=ADDRESS)},
    {"overrides": [f"register.tracking_uri={ADDRESS}"]},
    {"overrides": [f"register.tracking_uri=http://h/?api_key={SECRET}"]},
    {"config": f"{ADDRESS}/mine.yaml"},
    {"root": f"s3://me:{SECRET}@bucket/root"},
    {"root": ADDRESS},
]


@pytest.mark.parametrize("given", PARAMETERS, ids=str)
def test_a_run_with_a_secret_is_refused_and_its_name_and_error_do_not_show_it(
    given: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    parameters = {
        "config": "demo", "root": str(tmp_path), "images": Images(), "train": Train(),
        "launch": Launch(), "evaluate": Evaluate(), "overrides": [], **given,
    }  # fmt: skip
    with pytest.raises(PipelineError) as caught:
        pipeline.dpnet_pipeline.fn(**parameters)
    assert SECRET not in str(caught.value)
    assert not list(tmp_path.iterdir())
    run = SimpleNamespace(flow_run=SimpleNamespace(parameters=parameters))
    monkeypatch.setattr(flow_run, "runtime", run)
    name = flow_run.run_name()
    assert SECRET not in name
    assert "127.0.0.1" in name or "bucket" in name or "***" in name


def test_a_name_with_controls_gives_a_name_of_a_run_that_can_be_shown(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    evil = "a\x1b[2J\n\u202eb"
    parameters = {"config": evil, "images": Images(source=evil), "root": evil, "overrides": [evil]}
    run = SimpleNamespace(flow_run=SimpleNamespace(parameters=parameters))
    monkeypatch.setattr(flow_run, "runtime", run)
    assert flow_run.run_name().isprintable()
    assert flow_run.run_name().count("\\x1b") >= 2
