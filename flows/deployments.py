"""The deployments and automations that `dpnet deploy` creates on a Prefect server.

They are plain values made from `DeploySettings`. `flows.deploy` compares them with the server's. A
deployment names its flow by module, so a worker needs the installed package and no checkout.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from prefect.client.schemas.schedules import CronSchedule
from prefect.events.schemas.automations import AutomationCore
from pydantic import BaseModel, ConfigDict, Field, field_validator

from flows.champion_events import PROMOTED
from flows.local_server.children import HEARTBEAT_S, POOL
from flows.schedules import check_cron, next_dates

TAG = "dpnet"
QUEUE = "training"  # of the work pool; its limit is the number of parallel trainings
ALERTS = "dpnet-alerts"  # the notification block that sends alerts
MISSED_HEARTBEATS = 4  # after which a run counts as crashed
PREFIX = "dpnet: "  # of the names of our automations
PROGRESS = "dpnet.progress"  # the event that a run sends while it makes progress

_STATE = "prefect.flow-run."
_ENDS = [f"{_STATE}{name}" for name in ("Completed", "Failed", "Crashed", "Cancelled", "Skipped")]
_RUN = {"prefect.resource.id": f"{_STATE}*"}
_OURS = {"prefect.resource.role": "tag", "prefect.resource.id": f"prefect.tag.{TAG}"}
_PAYLOAD = {  # the event's payload as a dictionary; a plain template would make it a string
    "__prefect_kind": "json",
    "value": {"__prefect_kind": "jinja", "template": "{{ event.payload | tojson }}"},
}


class DeploySettings(BaseModel):
    """The settings of `dpnet deploy`: the parameters of the deployments, and their schedules."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    config: str = Field(
        "demo",
        description="A packaged config, or the path of a YAML file on the workers' machines.",
    )
    root: str = Field(
        "",
        description="A folder or s3://bucket/prefix that stores everything. If empty, the workers'"
        " DPNET_ROOT or the config's root.",
    )
    parameters: dict[str, dict[str, Any]] = Field(
        {}, description="First values of the forms, by section, such as {train: {steps: 1000}}."
    )
    overrides: list[str] = Field(
        [], description="Other options to change, such as images.quality=90."
    )
    pool: str = Field(
        POOL, min_length=1, description="Name of the work pool. It is created if it is missing."
    )
    trainings: int = Field(
        2, ge=1, le=1000, description="How many runs may train at the same time. Others wait."
    )
    timezone: str = Field("UTC", min_length=1, description="Time zone of the schedules.")
    watch: str | None = Field(
        "*/15 * * * *",
        description="When to check the source for new photos, as five fields of cron; null means"
        " never.",
    )
    min_new: int = Field(
        1, ge=1, description="How many new or changed photos are needed to announce a change."
    )
    quiet_minutes: float = Field(
        0,
        ge=0,
        description="How many minutes a changed source must be unchanged before the announcement.",
    )
    retrain: str | None = Field(
        "0 3 * * 0",
        description="When to retrain without an announcement, as five fields of cron; null means"
        " never.",
    )
    stuck_minutes: float = Field(
        30, ge=1, description="Minutes without progress after which a run is reported as stuck."
    )
    secrets: dict[str, str] = Field(
        {},
        description="Environment variables of the runs with values from Prefect Secret blocks, such"
        " as {AWS_SECRET_ACCESS_KEY: name-of-the-block}.",
    )

    @field_validator("watch", "retrain")
    @classmethod
    def _is_cron(cls, value: str | None) -> str | None:
        if value is not None:
            check_cron(value)
        return value

    @field_validator("timezone")
    @classmethod
    def _is_timezone(cls, value: str) -> str:
        try:
            CronSchedule(cron="* * * * *", timezone=value)
        except ValueError:
            raise ValueError("the name of a time zone such as Europe/Berlin") from None
        return value


@dataclass(frozen=True)
class Deployment:
    """A deployment of one flow, under the flow's name."""

    entrypoint: str  # module.function
    sections: tuple[str, ...] = ()  # of its form
    trains: bool = False  # its runs wait in the queue of the trainings
    cron: str | None = None
    parameters: dict[str, Any] = field(default_factory=dict)

    def flow(self) -> Any:
        """Import the flow."""
        from prefect.flows import load_flow_from_entrypoint

        return load_flow_from_entrypoint(self.entrypoint)


def deployments(settings: DeploySettings) -> list[Deployment]:
    """Return all deployments."""
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


def scheduled(settings: DeploySettings) -> dict[str, list[datetime]]:
    """Return the next dates of each deployment that has a schedule, by the flow's name."""
    return {
        each.flow().name: next_dates(each.cron, settings.timezone)
        for each in deployments(settings)
        if each.cron
    }


def parameters(settings: DeploySettings, deployment: Deployment) -> dict[str, Any]:
    """Return the first values of the deployment's form."""
    sections = {name: settings.parameters.get(name, {}) for name in deployment.sections}
    return {
        "config": settings.config,
        "root": settings.root,
        **sections,
        "overrides": list(settings.overrides),
        **deployment.parameters,
    }


def job_variables(settings: DeploySettings) -> dict[str, Any]:
    """Return the job variables of every run: heartbeats, and secrets that the worker resolves."""
    secrets = {
        name: f"{{{{ prefect.blocks.secret.{block} }}}}" for name, block in settings.secrets.items()
    }
    return {"env": {"PREFECT_FLOWS_HEARTBEAT_FREQUENCY": str(HEARTBEAT_S), **secrets}}


def automations(
    settings: DeploySettings, dataset: str, retrain: UUID, alerts: UUID | None
) -> list[AutomationCore]:
    """Return the automations.

    Args:
        settings: The settings of the deploy file.
        dataset: The name of the dataset that the announcements are about.
        retrain: The id of the deployment `retrain`.
        alerts: The id of the notification block; None for no alerts.
    """
    heartbeat, changed = "prefect.flow-run.heartbeat", "dpnet.raw-data.changed"
    always = [
        _automation(
            "a run without heartbeat has crashed",
            "Marks a run as crashed when its process and its worker are gone.",
            _absence(
                [heartbeat], [heartbeat, *_ENDS], timedelta(seconds=MISSED_HEARTBEATS * HEARTBEAT_S)
            ),
            {
                "type": "change-flow-run-state",
                "state": "CRASHED",
                "message": "The process of this run is gone. Retry resumes where it stopped.",
            },
        ),
        _automation(
            "retrain on new data",
            f"Starts retrain when watch-raw-data announces a change of {dataset}.",
            _presence(changed, {"prefect.resource.id": f"dpnet.dataset.{dataset}"}),
            {
                "type": "run-deployment",
                "source": "selected",
                "deployment_id": str(retrain),
                "parameters": {"event": _PAYLOAD},
            },
        ),
    ]
    return always if alerts is None else always + _alerts(settings, alerts)


def _alerts(settings: DeploySettings, block: UUID) -> list[AutomationCore]:
    """Return the automations that send alerts."""
    run, page = "{{ flow_run.name }}", "{{ flow_run | ui_url }}"
    stuck = f"{settings.stuck_minutes:g} min"

    def alert(about: str, trigger: dict[str, Any], body: str) -> AutomationCore:
        notify = {
            "type": "send-notification",
            "block_document_id": str(block),
            "subject": f"dpnet: {about}",
            "body": body,
        }
        return _automation(
            f"alert about {about}", f"Sends an alert with the block {ALERTS}.", trigger, notify
        )

    state = "{{ flow_run.state.message }}"
    return [
        *(
            alert(
                f"{name.lower()} runs", _presence(f"{_STATE}{name}", _RUN), f"{run}: {state} {page}"
            )
            for name in ("Failed", "Crashed", "Late")
        ),
        alert(
            "stuck runs",
            _absence(
                [f"{_STATE}Running", PROGRESS],
                [PROGRESS, *_ENDS],
                timedelta(minutes=settings.stuck_minutes),
            ),
            f"{run} has made no progress for {stuck}. {page}",
        ),
        alert(
            "promotions",
            _presence(PROMOTED, {"prefect.resource.id": "dpnet.model.*"}),
            "{{ event.payload.reason }}",
        ),
    ]


def _presence(event: str, match: dict[str, str]) -> dict[str, Any]:
    """Return a trigger for an event that happens."""
    trigger = {"expect": [event], "match": match, "for_each": ["prefect.resource.id"]}
    if match is _RUN:
        trigger["match_related"] = _OURS
    return {"type": "event", "posture": "Reactive", "threshold": 1, "within": 0, **trigger}


def _absence(after: list[str], expect: list[str], within: timedelta) -> dict[str, Any]:
    """Return a trigger for a run of ours that sends none of the events `expect` in time.

    Args:
        after: The events that start the waiting time.
        expect: The events that end it.
        within: The waiting time.
    """
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
