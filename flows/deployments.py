"""What `dpnet deploy` puts on a Prefect server: deployments, automations, limits and blocks.

All of it is here as plain values, made from `DeploySettings`; `flows.deploy` compares them with the
server's. Flows are named by their module, so a worker needs the installed package and no checkout.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any
from uuid import UUID

from prefect.client.schemas.schedules import CronSchedule
from prefect.events.schemas.automations import AutomationCore
from pydantic import BaseModel, ConfigDict, Field, field_validator

from flows.local_server.children import HEARTBEAT_S, POOL

TAG = "dpnet"
QUEUE = "training"  # of the pool: its limit is how many trainings run at once
ALERTS = "dpnet-alerts"  # the block that alerts go through
MISSED = 4  # heartbeats without which a run is taken for dead
PREFIX = "dpnet: "  # of our automations' names


class DeploySettings(BaseModel):
    """What is deployed, and with what parameters."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    config: str = Field(
        "demo", description="A packaged config, or a YAML file's path on the workers' machines."
    )
    root: str = Field(
        "",
        description="Where everything is stored; empty: the workers' DPNET_ROOT or the config's.",
    )
    parameters: dict[str, dict[str, Any]] = Field(
        {}, description="What the forms begin with, by section, as {train: {steps: 1000}}."
    )
    overrides: list[str] = Field([], description="Other options, each like images.quality=90.")
    pool: str = Field(POOL, min_length=1, description="Work pool, made where it is missing.")
    trainings: int = Field(
        2, ge=1, le=1000, description="Runs that may train at once; others wait in the queue."
    )
    timezone: str = Field("UTC", description="Of the schedules.")
    watch: str | None = Field(
        "*/15 * * * *", description="When the sources are looked at, as cron; null: never."
    )
    min_new: int = Field(
        1, ge=1, description="Pictures that must be new or changed for a change to be announced."
    )
    quiet_minutes: float = Field(
        0, ge=0, description="For which a changed source must have stood still before that."
    )
    retrain: str | None = Field(
        "0 3 * * 0", description="When to retrain without an announcement, as cron; null: never."
    )
    stuck_minutes: float = Field(
        30, ge=1, description="Without progress after which a run is told to be stuck."
    )
    secrets: dict[str, str] = Field(
        {},
        description="Environment variables of the runs that come from Prefect Secret blocks, as"
        " {AWS_SECRET_ACCESS_KEY: name-of-the-block}.",
    )

    @field_validator("watch", "retrain")
    @classmethod
    def _is_cron(cls, value: str | None) -> str | None:
        try:
            CronSchedule(cron=value or "* * * * *")
        except ValueError:
            raise ValueError("a cron expression, as */15 * * * *") from None
        return value

    @field_validator("timezone")
    @classmethod
    def _is_timezone(cls, value: str) -> str:
        try:
            CronSchedule(cron="* * * * *", timezone=value)
        except ValueError:
            raise ValueError("the name of a time zone, as Europe/Berlin") from None
        return value


@dataclass(frozen=True)
class Deployment:
    """A deployment of the flow `module.function`, under the flow's name."""

    entrypoint: str
    sections: tuple[str, ...] = ()  # the form's
    trains: bool = False
    cron: str | None = None
    parameters: dict[str, Any] = field(default_factory=dict)

    def flow(self) -> Any:
        from prefect.flows import load_flow_from_entrypoint

        return load_flow_from_entrypoint(self.entrypoint)


def deployments(settings: DeploySettings) -> list[Deployment]:
    """All deployments, in the order of the UI's list."""
    data = ("images",)
    training = ("images", "train", "launch")
    all_ = (*training, "evaluate")
    watching = {"min_new": settings.min_new, "quiet_minutes": settings.quiet_minutes}
    return [
        Deployment("flows.pipeline.dpnet_pipeline", all_, trains=True),
        Deployment("flows.pipeline.prepare_images", data),
        Deployment("flows.pipeline.prepare_masks"),
        Deployment("flows.pipeline.train_model", training, trains=True),
        Deployment("flows.pipeline.evaluate_model", all_, trains=True),
        Deployment("flows.pipeline.register_model", all_, trains=True),
        Deployment("flows.new_data.watch_raw_data", data, cron=settings.watch, parameters=watching),
        Deployment("flows.new_data.retrain", all_, trains=True, cron=settings.retrain),
    ]


def parameters(settings: DeploySettings, deployment: Deployment) -> dict[str, Any]:
    """What the deployment's form begins with."""
    given = {name: settings.parameters.get(name, {}) for name in deployment.sections}
    return {
        "config": settings.config,
        "root": settings.root,
        **given,
        "overrides": list(settings.overrides),
        **deployment.parameters,
    }


def job_variables(settings: DeploySettings) -> dict[str, Any]:
    """Of every run's process: heartbeats, and secrets that only the worker resolves."""
    secrets = {
        name: f"{{{{ prefect.blocks.secret.{block} }}}}" for name, block in settings.secrets.items()
    }
    return {"env": {"PREFECT_FLOWS_HEARTBEAT_FREQUENCY": str(HEARTBEAT_S), **secrets}}


def automations(
    settings: DeploySettings, dataset: str, retrain: UUID, alerts: UUID | None
) -> list[AutomationCore]:
    """What happens by itself. `dataset` is the name of the config's; `retrain` the deployment's id;
    `alerts` the block that notifies, None where nobody is told."""
    heartbeat, changed = "prefect.flow-run.heartbeat", "dpnet.raw-data.changed"
    found = [
        _automation(
            "a run without heartbeat has crashed",
            "Its process and its worker are gone; Retry goes on where it stopped.",
            _absence([heartbeat], [heartbeat, *_ENDS], timedelta(seconds=MISSED * HEARTBEAT_S)),
            {
                "type": "change-flow-run-state",
                "state": "CRASHED",
                "message": "Its process is gone: Retry goes on where it stopped.",
            },
        ),
        _automation(
            "retrain on new data",
            f"watch-raw-data has announced a change of {dataset}.",
            _presence(changed, {"prefect.resource.id": f"dpnet.dataset.{dataset}"}),
            {
                "type": "run-deployment",
                "source": "selected",
                "deployment_id": str(retrain),
                "parameters": {"event": _PAYLOAD},
            },
        ),
    ]
    return found if alerts is None else found + _alerts(settings, alerts)


def _alerts(settings: DeploySettings, block: UUID) -> list[AutomationCore]:
    """Notifications of what somebody should know."""
    run, page = "{{ flow_run.name }}", "{{ flow_run | ui_url }}"
    stuck = f"{settings.stuck_minutes:g} min"

    def tell(of: str, trigger: dict[str, Any], body: str) -> AutomationCore:
        notify = {
            "type": "send-notification",
            "block_document_id": str(block),
            "subject": f"dpnet: {of}",
            "body": body,
        }
        return _automation(f"tell of {of}", f"By the block {ALERTS}.", trigger, notify)

    state = "{{ flow_run.state.message }}"
    return [
        *(
            tell(
                f"{name.lower()} runs", _presence(f"{_STATE}{name}", _RUN), f"{run}: {state} {page}"
            )
            for name in ("Failed", "Crashed", "Late")
        ),
        tell(
            "stuck runs",
            _absence(
                [f"{_STATE}Running", PROGRESS],
                [PROGRESS, *_ENDS],
                timedelta(minutes=settings.stuck_minutes),
            ),
            f"{run} has made no progress for {stuck}. {page}",
        ),
        tell(
            "promotions",
            _presence("dpnet.model.promoted", {"prefect.resource.id": "dpnet.model.*"}),
            "{{ event.payload.reason }}",
        ),
    ]


PROGRESS = "dpnet.progress"
_STATE = "prefect.flow-run."
_ENDS = [f"{_STATE}{name}" for name in ("Completed", "Failed", "Crashed", "Cancelled", "Skipped")]
_RUN = {"prefect.resource.id": f"{_STATE}*"}
_OURS = {"prefect.resource.role": "tag", "prefect.resource.id": f"prefect.tag.{TAG}"}
_PAYLOAD = {  # of the event, as a dictionary; a plain template would give its text
    "__prefect_kind": "json",
    "value": {"__prefect_kind": "jinja", "template": "{{ event.payload | tojson }}"},
}


def _presence(event: str, match: dict[str, str]) -> dict[str, Any]:
    """Something has happened."""
    trigger = {"expect": [event], "match": match, "for_each": ["prefect.resource.id"]}
    if match is _RUN:
        trigger["match_related"] = _OURS
    return {"type": "event", "posture": "Reactive", "threshold": 1, "within": 0, **trigger}


def _absence(after: list[str], expect: list[str], within: timedelta) -> dict[str, Any]:
    """Something has not happened to a run of ours for so long."""
    return {
        "type": "event",
        "posture": "Proactive",
        "after": after,
        "expect": expect,
        "match": _RUN,
        "match_related": _OURS,
        "for_each": ["prefect.resource.id"],
        "threshold": 1,
        "within": within.total_seconds(),
    }


def _automation(
    name: str, description: str, trigger: dict[str, Any], action: dict[str, Any]
) -> AutomationCore:
    return AutomationCore.model_validate(
        {
            "name": f"{PREFIX}{name}",
            "description": description,
            "trigger": trigger,
            "actions": [action],
        }
    )
