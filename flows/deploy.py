"""Make a Prefect server hold what `flows.deployments` says, and nothing else of ours.

What is there already is left alone, so deploying twice does nothing the second time. Deployments,
automations and schedules of ours that are no longer asked for are removed; what others have made is
not touched.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from uuid import UUID

import httpx
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import DeploymentScheduleCreate, WorkPoolCreate
from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterTags
from prefect.client.schemas.objects import WorkPool
from prefect.client.schemas.schedules import CronSchedule
from prefect.events.schemas.automations import AutomationCore
from prefect.exceptions import ObjectNotFound, PrefectHTTPStatusError
from prefect.utilities.callables import parameter_schema
from pydantic import SecretStr

from data_prep.core.errors import ConfigError, PipelineError
from dpnet.pipeline.config import validated
from flows import deployments as wanted
from flows.deployments import ALERTS, PREFIX, QUEUE, TAG, Deployment, DeploySettings
from flows.forms import SECTIONS

ALERT_URL = "DPNET_ALERT_URL"
_NO_ID = UUID(int=0)  # of what a dry run would make


def deploy(settings: DeploySettings, *, dry_run: bool = False) -> list[str]:
    """Create or update everything; a line for each thing that differed, none if nothing did.

    With `dry_run` nothing is changed. Raises PipelineError where the server cannot be used.
    """
    _check_parameters(settings)
    dataset = _dataset(settings)
    with connected() as client:
        server = _Server(client, dry_run)
        server.pool(settings.pool, settings.trainings)
        server.secrets(settings.secrets)
        ids = {
            each.entrypoint: server.deployment(settings, each)
            for each in wanted.deployments(settings)
        }
        server.remove_deployments(set(ids.values()))
        alerts = server.alerts(os.environ.get(ALERT_URL))
        retrain = ids["flows.new_data.retrain"]
        server.automations(wanted.automations(settings, dataset, retrain, alerts))
        return server.lines


def _check_parameters(settings: DeploySettings) -> None:
    for section, given in settings.parameters.items():
        if section not in SECTIONS:
            raise ConfigError(
                f"parameters.{section} is no section of the forms: they have"
                f" {', '.join(SECTIONS)}; other options go into overrides."
            )
        validated(SECTIONS[section], dict(given), (), f"parameters.{section}.")


def _dataset(settings: DeploySettings) -> str:
    """The name of the dataset that is watched. The config may be a file of the workers' machine,
    and its name then has to be given."""
    from dpnet.pipeline.config import load_config

    given = settings.parameters.get("images", {}).get("name")
    if given:
        return str(given)
    try:
        return load_config(settings.config, settings.overrides).images.name
    except ConfigError as error:
        raise ConfigError(
            f"{error} If it lies on the workers' machines alone, give parameters.images.name, the"
            " name of the dataset that is watched."
        ) from None


@contextmanager
def connected() -> Iterator[SyncPrefectClient]:
    """A client of the Prefect API that is configured. Its errors become PipelineError."""
    from prefect.settings import get_current_settings

    url = get_current_settings().api.url
    if not url:
        raise PipelineError(
            "no Prefect server is known: run `dpnet up` and set PREFECT_API_URL to the address that"
            " it prints, or to that of your own server."
        )
    try:
        with get_client(sync_client=True) as client:
            client.hello()
            client.raise_for_api_version_mismatch()
            yield client
    except (httpx.TransportError, httpx.InvalidURL) as error:
        raise PipelineError(
            f"the Prefect API at {url} cannot be reached ({type(error).__name__}): start that"
            " server, as with `dpnet up`, or set PREFECT_API_URL to another."
        ) from error
    except PrefectHTTPStatusError as error:
        if error.response.status_code in (401, 403):
            raise PipelineError(
                f"the Prefect API at {url} wants other credentials: set PREFECT_API_AUTH_STRING to"
                " its user:password."
            ) from error
        raise PipelineError(
            f"the Prefect API at {url} refused what it was asked"
            f" ({error.response.status_code}: {error.response.text[:300]})."
        ) from error
    except RuntimeError as error:  # of a version mismatch, or an answer that is no Prefect's
        raise PipelineError(f"the Prefect API at {url} cannot be used: {error}.") from error


class _Server:
    """A Prefect server and the lines that tell what was changed there."""

    def __init__(self, client: SyncPrefectClient, dry_run: bool) -> None:
        self.client, self.dry_run = client, dry_run
        self.lines: list[str] = []

    def _change(self, line: str, act: Callable[[], Any]) -> Any:
        self.lines.append(line)
        return None if self.dry_run else act()

    def pool(self, name: str, trainings: int) -> None:
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

    def secrets(self, blocks: dict[str, str]) -> None:
        for variable, name in blocks.items():
            try:
                self.client.read_block_document_by_name(name, "secret", include_secrets=False)
            except ObjectNotFound:
                raise PipelineError(
                    f"secrets.{variable} names the Secret block {name!r}, which the server does not"
                    " have: make it in the UI under Blocks, or name another."
                ) from None

    def deployment(self, settings: DeploySettings, deployment: Deployment) -> UUID:
        flow = deployment.flow()
        schedules = []
        if deployment.cron:
            schedule = CronSchedule(cron=deployment.cron, timezone=settings.timezone)
            schedules = [DeploymentScheduleCreate(schedule=schedule, active=True)]
        fields: dict[str, Any] = {
            "description": flow.description,
            "entrypoint": deployment.entrypoint,
            "parameters": wanted.parameters(settings, deployment),
            "parameter_openapi_schema": _schema(flow),
            "enforce_parameter_schema": True,
            "work_pool_name": settings.pool,
            "work_queue_name": QUEUE if deployment.trains else "default",
            "job_variables": wanted.job_variables(settings),
            "tags": [TAG],
            "pull_steps": [],
            "path": None,
        }
        name = f"{flow.name}/{flow.name}"
        try:
            there = self.client.read_deployment_by_name(name)
        except ObjectNotFound:
            there = None
        if there is not None:
            differing = [field for field, value in fields.items() if _is(there, field) != value]
            if _schedules(there.schedules) != _schedules(schedules):
                differing.append("schedule")
            if not differing:
                return there.id
            line = f"update deployment {name}: {', '.join(differing)}"
        else:
            line = f"create deployment {name}"
        made = self._change(
            line,
            lambda: self.client.create_deployment(
                self.client.create_flow(flow), flow.name, schedules=schedules, **fields
            ),
        )
        return made or (there.id if there else _NO_ID)

    def remove_deployments(self, kept: set[UUID]) -> None:
        """Those that an earlier version has deployed."""
        ours = DeploymentFilter(tags=DeploymentFilterTags(all_=[TAG]))
        for each in self.client.read_deployments(deployment_filter=ours, limit=200):
            if each.id not in kept and (each.entrypoint or "").startswith("flows."):
                self._change(
                    f"remove deployment {each.name}",
                    lambda each=each: self.client.delete_deployment(each.id),  # type: ignore[misc]
                )

    def alerts(self, url: str | None) -> UUID | None:
        """The block that alerts go through, from an Apprise URL; the one that is there without."""
        from prefect.blocks.notifications import SlackWebhook

        try:
            there = self.client.read_block_document_by_name(ALERTS, "slack-webhook")
        except ObjectNotFound:
            there = None
        if url is None:
            return there.id if there else None
        # Prefect's block of this name takes whatever Apprise knows, mail too.
        block = SlackWebhook(url=SecretStr(apprise_url(url)))
        if there is not None and there.data.get("url") == block.url.get_secret_value():
            return there.id
        line = f"{'update' if there else 'create'} notification block {ALERTS}"
        return self._change(line, lambda: block.save(ALERTS, overwrite=True)) or (
            there.id if there else _NO_ID
        )

    def automations(self, automations: list[AutomationCore]) -> None:
        there = {
            each.name: each
            for each in self.client.read_automations(limit=200)
            if each.name.startswith(PREFIX)
        }
        for each in automations:
            old = there.pop(each.name, None)
            if old is None:
                self._change(
                    f"create automation {each.name}",
                    lambda each=each: self.client.create_automation(each),  # type: ignore[misc]
                )
            elif differing := [f for f in _COMPARED if _plain(old, f) != _plain(each, f)]:
                self._change(
                    f"update automation {each.name}: {', '.join(differing)}",
                    lambda old=old, each=each: self.client.update_automation(old.id, each),  # type: ignore[misc]
                )
        for old in there.values():
            self._change(
                f"remove automation {old.name}",
                lambda old=old: self.client.delete_automation(old.id),  # type: ignore[misc]
            )


_COMPARED = ("description", "trigger", "actions")


def _plain(automation: AutomationCore, field: str) -> Any:
    """A field as values that compare, without what the server adds."""

    def tidy(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: tidy(v) for k, v in value.items() if k != "id" and v not in (None, {}, [])}
        if isinstance(value, list):
            items = [tidy(item) for item in value]
            return sorted(items) if all(isinstance(item, str) for item in items) else items
        return value

    return tidy(automation.model_dump(mode="json")[field])


def _is(there: Any, field: str) -> Any:
    value = getattr(there, field)
    return list(value) if field in ("tags", "pull_steps") and value is not None else value


def _schedules(schedules: Any) -> list[tuple[str, str]]:
    return sorted((each.schedule.cron, each.schedule.timezone or "UTC") for each in schedules)


def _schema(flow: Any) -> dict[str, Any]:
    """What the form is made of; an empty part would differ from what `prefect deploy` leaves."""
    schema: dict[str, Any] = parameter_schema(flow).model_dump_for_openapi()
    # Else a parameter that there is none of would be found by the run, which it crashes.
    closed = {"additionalProperties": False}
    return {name: part for name, part in schema.items() if part != {}} | closed


def _template() -> dict[str, Any]:
    from prefect.workers.process import ProcessWorker

    return ProcessWorker.get_default_base_job_template()


def apprise_url(url: str) -> str:
    """An Apprise URL. Of http(s) Apprise knows only some services' own; others take JSON."""
    if url.startswith(("https://hooks.slack.com/", "https://hooks.slack-gov.com/")):
        return url
    for plain, scheme in (("https://", "jsons://"), ("http://", "json://")):
        if url.startswith(plain):
            return scheme + url.removeprefix(plain)
    return url
