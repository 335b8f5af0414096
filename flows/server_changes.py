"""The changes that make a Prefect server match our deployments, limits, blocks and automations.

Objects of ours that are already as they should be are left unchanged. Objects that others have made
are never changed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import DeploymentScheduleCreate, WorkPoolCreate
from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterTags
from prefect.client.schemas.objects import WorkPool
from prefect.client.schemas.schedules import CronSchedule
from prefect.events.schemas.automations import AutomationCore
from prefect.exceptions import ObjectNotFound
from prefect.utilities.callables import parameter_schema
from pydantic import SecretStr

from data_prep.core.errors import ConfigError
from flows.deployments import (
    ALERTS,
    PREFIX,
    QUEUE,
    TAG,
    Deployment,
    DeploySettings,
    job_variables,
    parameters,
)

_NO_ID = UUID(int=0)  # of an object that a dry run does not create


class ServerChanges:
    """The changes that make a Prefect server match our deployments.

    Attributes:
        client: A client of the Prefect API.
        dry_run: Only list the changes.
        lines: One line for each change.
    """

    def __init__(self, client: SyncPrefectClient, dry_run: bool) -> None:
        self.client, self.dry_run = client, dry_run
        self.lines: list[str] = []

    def _change(self, line: str, act: Callable[[], Any]) -> Any:
        """Note a change, make it unless this is a dry run, and return its result."""
        self.lines.append(line)
        return None if self.dry_run else act()

    def apply_pool(self, name: str, trainings: int) -> None:
        """Create the work pool, and set the limit of parallel trainings."""
        pool: WorkPool | None
        try:
            pool = self.client.read_work_pool(name)
        except ObjectNotFound:
            new = WorkPoolCreate(name=name, type="process", base_job_template=_template())
            pool = self._change(
                f"create work pool {name} (process)", lambda: self.client.create_work_pool(new)
            )
        if pool is None:  # a dry run
            self.lines.append(f"create limit of {trainings} on work queue {name}/{QUEUE}")
            return
        try:
            queue = self.client.read_work_queue_by_name(QUEUE, work_pool_name=name)
        except ObjectNotFound:
            self._change(
                f"create limit of {trainings} on work queue {name}/{QUEUE}",
                lambda: self.client.create_work_queue(
                    QUEUE, work_pool_name=name, concurrency_limit=trainings
                ),
            )
            return
        if queue.concurrency_limit != trainings:
            self._change(
                f"update limit on work queue {name}/{QUEUE}: {queue.concurrency_limit} ->"
                f" {trainings}",
                lambda: self.client.update_work_queue(queue.id, concurrency_limit=trainings),
            )

    def check_secrets(self, blocks: dict[str, str]) -> None:
        """Raise PipelineError if the server lacks a Secret block that the settings name."""
        for variable, name in blocks.items():
            try:
                self.client.read_block_document_by_name(name, "secret", include_secrets=False)
            except ObjectNotFound:
                raise ConfigError(
                    f"secrets.{variable} cannot be used: the server has no Secret block {name!r}."
                    " Create it in the UI under Blocks, or name another block."
                ) from None

    def apply_deployment(self, settings: DeploySettings, deployment: Deployment) -> UUID:
        """Create or update a deployment, and return its id."""
        flow = deployment.flow()
        schedules = []
        if deployment.cron:
            schedule = CronSchedule(cron=deployment.cron, timezone=settings.timezone)
            schedules = [DeploymentScheduleCreate(schedule=schedule, active=True)]
        fields: dict[str, Any] = {
            "description": flow.description,
            "entrypoint": deployment.entrypoint,
            "parameters": parameters(settings, deployment),
            "parameter_openapi_schema": _schema(flow),
            "enforce_parameter_schema": True,
            "work_pool_name": settings.pool,
            "work_queue_name": QUEUE if deployment.trains else "default",
            "job_variables": job_variables(settings),
            "tags": [TAG],
            "pull_steps": [],
            "path": None,
        }
        name = f"{flow.name}/{flow.name}"
        try:
            existing = self.client.read_deployment_by_name(name)
        except ObjectNotFound:
            existing = None
        if existing is not None:
            differing = [
                field for field, value in fields.items() if _stored_value(existing, field) != value
            ]
            if _schedules(existing.schedules) != _schedules(schedules):
                differing.append("schedule")
            if not differing:
                return existing.id
            line = f"update deployment {name}: {', '.join(differing)}"
        else:
            line = f"create deployment {name}"
        created = self._change(
            line,
            lambda: self.client.create_deployment(
                self.client.create_flow(flow), flow.name, schedules=schedules, **fields
            ),
        )
        return created or (existing.id if existing else _NO_ID)

    def remove_deployments_except(self, kept: set[UUID]) -> None:
        """Remove deployments of ours that an earlier version has created."""
        ours = DeploymentFilter(tags=DeploymentFilterTags(all_=[TAG]))
        for each in self.client.read_deployments(deployment_filter=ours, limit=200):
            if each.id not in kept and (each.entrypoint or "").startswith("flows."):
                self._change(
                    f"remove deployment {each.name}",
                    lambda each=each: self.client.delete_deployment(each.id),  # type: ignore[misc]
                )

    def apply_alerts(self, url: str | None) -> UUID | None:
        """Create or update the notification block from an Apprise URL, and return its id.

        Without a URL, the existing block stays. Return None if there is no block.
        """
        from prefect.blocks.notifications import SlackWebhook

        try:
            existing = self.client.read_block_document_by_name(ALERTS, "slack-webhook")
        except ObjectNotFound:
            existing = None
        if url is None:
            return existing.id if existing else None
        # Prefect's block of this name accepts every URL of Apprise, also mail.
        block = SlackWebhook(url=SecretStr(apprise_url(url)))
        if existing is not None and existing.data.get("url") == block.url.get_secret_value():
            return existing.id
        line = f"{'update' if existing else 'create'} notification block {ALERTS}"
        return self._change(line, lambda: block.save(ALERTS, overwrite=True)) or (
            existing.id if existing else _NO_ID
        )

    def apply_automations(self, automations: list[AutomationCore]) -> None:
        """Create, update and remove automations of ours."""
        existing = {
            each.name: each
            for each in self.client.read_automations(limit=200)
            if each.name.startswith(PREFIX)
        }
        for each in automations:
            old = existing.pop(each.name, None)
            if old is None:
                self._change(
                    f"create automation {each.name}",
                    lambda each=each: self.client.create_automation(each),  # type: ignore[misc]
                )
            elif differing := [f for f in _COMPARED if _comparable(old, f) != _comparable(each, f)]:
                self._change(
                    f"update automation {each.name}: {', '.join(differing)}",
                    lambda old=old, each=each: self.client.update_automation(old.id, each),  # type: ignore[misc]
                )
        for old in existing.values():
            self._change(
                f"remove automation {old.name}",
                lambda old=old: self.client.delete_automation(old.id),  # type: ignore[misc]
            )


_COMPARED = ("description", "trigger", "actions")


def _comparable(automation: AutomationCore, field: str) -> Any:
    """Return a field as JSON values, without the ids and empty values that the server adds."""

    def without_additions(value: Any) -> Any:
        if isinstance(value, dict):
            return {
                k: without_additions(v)
                for k, v in value.items()
                if k != "id" and v not in (None, {}, [])
            }
        if isinstance(value, list):
            items = [without_additions(item) for item in value]
            return sorted(items) if all(isinstance(item, str) for item in items) else items
        return value

    return without_additions(automation.model_dump(mode="json")[field])


def _stored_value(existing: Any, field: str) -> Any:
    value = getattr(existing, field)
    return list(value) if field in ("tags", "pull_steps") and value is not None else value


def _schedules(schedules: Any) -> list[tuple[str, str]]:
    return sorted((each.schedule.cron, each.schedule.timezone or "UTC") for each in schedules)


def _schema(flow: Any) -> dict[str, Any]:
    """Return the JSON schema of the form, without empty parts, like `prefect deploy`."""
    schema: dict[str, Any] = parameter_schema(flow).model_dump_for_openapi()
    # Otherwise the server accepts an unknown parameter, and the run crashes.
    closed = {"additionalProperties": False}
    return {name: part for name, part in schema.items() if part != {}} | closed


def _template() -> dict[str, Any]:
    from prefect.workers.process import ProcessWorker

    return ProcessWorker.get_default_base_job_template()


def apprise_url(url: str) -> str:
    """Return the Apprise URL of an alert URL. An unknown http(s) URL gets JSON."""
    if url.startswith(("https://hooks.slack.com/", "https://hooks.slack-gov.com/")):
        return url
    for plain, scheme in (("https://", "jsons://"), ("http://", "json://")):
        if url.startswith(plain):
            return scheme + url.removeprefix(plain)
    return url
