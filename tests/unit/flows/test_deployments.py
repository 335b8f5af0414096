"""The deployments and automations of `dpnet deploy`, without a server."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import yaml

from data_prep.core.errors import ConfigError, PipelineError
from dpnet.pipeline.config import load_settings
from flows.deploy import deploy
from flows.deployments import (
    DeploySettings,
    automations,
    deployments,
    job_variables,
    parameters,
    scheduled,
)
from flows.schedules import check_cron
from flows.server_changes import apprise_url

FILE = Path(__file__).parents[3] / "infra" / "prefect.yaml"


def settings(*overrides: str) -> DeploySettings:
    return load_settings(DeploySettings, None, overrides)


def test_prefect_yaml_has_the_same_deployments_and_the_same_trigger() -> None:
    s = DeploySettings()
    file = yaml.safe_load(FILE.read_text())
    assert file["pull"] == []
    assert [each["entrypoint"] for each in file["deployments"]] == [
        each.entrypoint for each in deployments(s)
    ]
    for theirs, mine in zip(file["deployments"], deployments(s), strict=True):
        assert theirs["name"] == mine.flow().name
        assert theirs["parameters"] == parameters(s, mine)
        crons = [each["cron"] for each in theirs.get("schedules", [])]
        assert crons == ([mine.cron] if mine.cron else [])
        for cron in crons:
            check_cron(cron)
        assert theirs["work_pool"]["name"] == s.pool
        assert theirs["work_pool"]["work_queue_name"] == ("training" if mine.trains else "default")
        assert theirs["work_pool"]["job_variables"] == job_variables(s)
    (trigger,) = file["deployments"][-1]["triggers"]
    retrain = automations(s, "demo", uuid4(), None)[1]
    assert (trigger["name"], trigger["description"]) == (retrain.name, retrain.description)


def test_the_parameters_of_every_deployment_fit_its_flow() -> None:
    s = settings("parameters.train.steps=7", "parameters.images.name=cats")
    for each in deployments(s):
        each.flow().validate_parameters(parameters(s, each))


def test_job_variables_name_the_secret_blocks_and_hold_no_secret() -> None:
    env = job_variables(settings("secrets.AWS_SECRET_ACCESS_KEY=the-block"))["env"]
    assert env["AWS_SECRET_ACCESS_KEY"] == "{{ prefect.blocks.secret.the-block }}"


def test_without_a_notification_block_there_are_no_alerts_but_all_other_automations() -> None:
    without = automations(DeploySettings(), "cats", uuid4(), None)
    with_alerts = automations(DeploySettings(), "cats", uuid4(), uuid4())
    assert [each.name for each in without] == [each.name for each in with_alerts][:2]
    bodies = [action.body for each in with_alerts[2:] for action in each.actions]  # type: ignore[union-attr]
    assert len(bodies) == 5
    assert any("30 min" in body for body in bodies)


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("watch='every day'", "watch is .* must be a cron expression of exactly five fields"),
        ("watch=''", "watch is .* must be a cron expression of exactly five fields .* or null"),
        ("retrain='0 0 3 * * *'", "retrain is .* must be a cron expression of exactly five"),
        ("retrain='@daily'", "retrain is .* must be a cron expression of exactly five fields"),
        ("retrain='61 * * * *'", "retrain is .* must be a cron expression such as"),
        ("watch='0 0 31 2 *'", "watch is .* must be a cron expression with a date that comes"),
        ("watch='0 0 31 4,6 *'", "watch is .* must be a cron expression with a date that comes"),
        ("timezone=Mars", "must be the name of a time zone"),
        ("timezone=''", "timezone is .* must be text of length 1 at least"),
        ("trainings=0", "trainings is 0: it must be a whole number of at least 1"),
        ("pol=x", "pol is not an option: the nearest is pool"),
        ("parameters.train.steps=0", "parameters.train.steps is 0: it must be a whole number"),
        ("parameters.train.step=1", "parameters.train.step is not an option: the nearest is steps"),
        ("parameters.trein.steps=1", "parameters.trein is not a section"),
        ("config=nowhere.yaml", "'nowhere.yaml' is neither .* set parameters.images.name"),
    ],
)
def test_a_wrong_setting_is_refused_before_the_server_is_contacted(
    override: str, sentence: str
) -> None:
    with pytest.raises(ConfigError, match=sentence):
        deploy(settings(override))


@pytest.mark.parametrize("cron", ["0 0 29 2 *", "0 3 * * SUN", " 0 3 * * 0 ", "0 0 L * *"])
def test_a_schedule_with_a_date_is_accepted(cron: str) -> None:
    dates = scheduled(settings(f"watch='{cron}'", "timezone=Europe/Berlin"))["watch-raw-data"]
    assert len(set(dates)) == 3
    assert dates == sorted(dates)
    assert dates[0].tzinfo is not None


def test_a_deployment_without_a_schedule_has_no_next_date() -> None:
    assert list(scheduled(settings("watch=null"))) == ["retrain"]


def test_a_deploy_file_with_an_unknown_key_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "deploy.yaml"
    file.write_text("trainigs: 3")
    with pytest.raises(ConfigError, match=r"deploy\.yaml: trainigs is not an option: .* trainings"):
        load_settings(DeploySettings, file)


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("https://hooks.slack.com/services/T/B/X", "https://hooks.slack.com/services/T/B/X"),
        ("https://example.org/hook", "jsons://example.org/hook"),
        ("http://localhost:9/hook", "json://localhost:9/hook"),
        ("mailto://me@example.org", "mailto://me@example.org"),
    ],
)
def test_a_webhook_becomes_an_apprise_url(url: str, expected: str) -> None:
    from apprise import Apprise

    assert apprise_url(url) == expected
    known: Any = Apprise()
    assert known.add(expected)


def test_a_dry_run_without_a_server_lists_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flows.deploy.has_server", lambda: False)
    monkeypatch.setenv("DPNET_ALERT_URL", "https://example.org/hook")
    lines = deploy(settings("secrets.AWS_SECRET_ACCESS_KEY=the-block"), dry_run=True)
    assert lines[:2] == [
        "create work pool dpnet (process)",
        "create limit of 2 on work queue dpnet/training",
    ]
    names = {each.flow().name for each in deployments(DeploySettings())}
    assert {f"create deployment {name}/{name}" for name in names} <= set(lines)
    assert "create notification block dpnet-alerts" in lines
    assert sum(line.startswith("create automation ") for line in lines) == 7


@pytest.mark.parametrize(
    ("launcher", "source", "warned"),
    [
        ("kuberay", "data/photos", True),
        ("kuberay", "/photos", False),
        ("kuberay", "s3://bucket/photos", False),
        ("local", "data/photos", False),
    ],
)
def test_a_relative_source_that_no_pod_has_is_warned_of(
    launcher: str,
    source: str,
    warned: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("flows.deploy.has_server", lambda: False)
    for options in (
        (f"overrides=[launch.launcher={launcher},images.source={source}]",),
        (f"parameters.launch.launcher={launcher}", f"parameters.images.source={source}"),
    ):
        caplog.clear()
        deploy(settings(*options), dry_run=True)
        assert ("images.source is 'data/photos', a relative path" in caplog.text) == warned


def test_a_deploy_without_a_server_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class NoServer:
        class api:
            url = None

    monkeypatch.setattr("prefect.settings.get_current_settings", NoServer)
    with pytest.raises(PipelineError, match="no Prefect server is configured"):
        deploy(settings())
