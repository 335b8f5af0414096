"""Deploy to a Prefect server: make it match `flows.deployments`.

A second deploy with the same settings changes nothing. Deployments, automations and schedules of
ours that the settings no longer request are removed.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from json import JSONDecodeError
from pathlib import Path
from typing import Any, cast

import httpx
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.exceptions import ObjectNotFound, PrefectHTTPStatusError
from pydantic import ValidationError

from data_prep.core.errors import ConfigError, PipelineError
from dpnet.pipeline.config import validated
from flows.deployments import DeploySettings, automations, deployments
from flows.forms import SECTIONS, refuse_credentials
from flows.server_changes import ServerChanges

log = logging.getLogger(__name__)

ALERT_URL = "DPNET_ALERT_URL"


def deploy(settings: DeploySettings, *, dry_run: bool = False) -> list[str]:
    """Create, update and remove everything that differs from the settings.

    Args:
        settings: The settings of the deploy file.
        dry_run: Only list the changes.

    Returns:
        One line for each change.

    Raises:
        PipelineError: A setting is wrong, or the server cannot be used.
    """
    _check_parameters(settings)
    dataset = _watched_dataset(settings)
    _warn_of_relative_source(settings)
    without_server = dry_run and not has_server()
    with nullcontext(_empty_server()) if without_server else connected() as client:
        changes = ServerChanges(client, dry_run)
        changes.apply_pool(settings.pool, settings.trainings)
        if not without_server:
            changes.check_secrets(settings.secrets)
        ids = {
            each.entrypoint: changes.apply_deployment(settings, each)
            for each in deployments(settings)
        }
        changes.remove_deployments_except(set(ids.values()))
        alerts = changes.apply_alerts(os.environ.get(ALERT_URL))
        retrain = ids["flows.new_data.retrain"]
        changes.apply_automations(automations(settings, dataset, retrain, alerts))
        return changes.lines


def _check_parameters(settings: DeploySettings) -> None:
    refuse_credentials(settings.overrides, "overrides of the deploy file")
    for section, values in settings.parameters.items():
        if section not in SECTIONS:
            raise ConfigError(
                f"parameters.{section} is not a section of the forms. Use one of"
                f" {', '.join(SECTIONS)}; set other options in overrides."
            )
        given = [f"parameters.{section}.{name}={value}" for name, value in values.items()]
        refuse_credentials(given, "the deploy file")
        validated(SECTIONS[section], dict(values), (), f"parameters.{section}.")


def _watched_dataset(settings: DeploySettings) -> str:
    """Return the name of the dataset that `watch-raw-data` watches.

    If the config is a file that only the workers have, the settings must give the name.
    """
    from dpnet.pipeline.config import load_config

    name = settings.parameters.get("images", {}).get("name")
    if name:
        return str(name)
    try:
        return load_config(settings.config, settings.overrides).images.name
    except ConfigError as error:
        raise ConfigError(
            f"{error} If only the workers have this file, set parameters.images.name to the name of"
            " the watched dataset."
        ) from None


def _warn_of_relative_source(settings: DeploySettings) -> None:
    """Warn of a source that the pods of flow runs will not have."""
    from dpnet.pipeline.chain import SAMPLE
    from dpnet.pipeline.config import load_config

    launch = [f"launch.{k}={v}" for k, v in settings.parameters.get("launch", {}).items()]
    source = settings.parameters.get("images", {}).get("source")
    try:
        config = load_config(settings.config, [*settings.overrides, *launch])
    except ConfigError:  # only the workers have the file
        return
    source = source or config.images.source
    relative = source != SAMPLE and "://" not in source and not Path(source).is_absolute()
    if config.launch.launcher == "kuberay" and relative:
        log.warning(
            "images.source is %r, a relative path, which no pod has: set it to"
            " s3://BUCKET/FOLDER, or to the absolute path of a volume of the pods.",
            source,
        )


def has_server() -> bool:
    """Return whether a Prefect server is configured."""
    from prefect.settings import get_current_settings

    return bool(get_current_settings().api.url)


class _EmptyServer:
    """A client of a new server: it has nothing, so a dry run lists everything."""

    def read_deployments(self, **_: Any) -> list[Any]:
        return []

    def read_automations(self, **_: Any) -> list[Any]:
        return []

    def __getattr__(self, name: str) -> Any:
        def missing(*_: Any, **__: Any) -> None:
            raise ObjectNotFound(LookupError(name))

        return missing


def _empty_server() -> SyncPrefectClient:
    return cast(SyncPrefectClient, _EmptyServer())


@contextmanager
def connected() -> Iterator[SyncPrefectClient]:
    """Connect to the configured Prefect API, and raise its errors as PipelineError."""
    from prefect.settings import get_current_settings

    url = get_current_settings().api.url
    if not url:
        raise PipelineError(
            "no Prefect server is configured. Run `dpnet up` and set PREFECT_API_URL to the address"
            " that it prints, or to the address of your own server."
        )
    try:
        with get_client(sync_client=True) as client:
            client.hello()
            _check_version(client, url)
            yield client
    except (httpx.RequestError, httpx.InvalidURL) as error:
        raise PipelineError(
            f"the Prefect API at {url} cannot be reached: {type(error).__name__}. Start that"
            " server, for example with `dpnet up`, or set PREFECT_API_URL to another one."
        ) from error
    except PrefectHTTPStatusError as error:
        if error.response.status_code in (401, 403):
            raise PipelineError(
                f"the Prefect API at {url} refused the credentials. Set PREFECT_API_AUTH_STRING to"
                " its user:password."
            ) from error
        raise PipelineError(
            f"the Prefect API at {url} refused a request with status"
            f" {error.response.status_code}: {error.response.text[:300]}."
        ) from error
    except RuntimeError as error:  # another version
        raise PipelineError(f"the Prefect API at {url} cannot be used: {error}.") from error
    except (ValidationError, JSONDecodeError) as error:  # of an answer
        raise _no_prefect(url) from error


def _check_version(client: SyncPrefectClient, url: str) -> None:
    try:
        client.raise_for_api_version_mismatch()
    except (ValueError, TypeError) as error:  # the answer is no version
        raise _no_prefect(url) from error


def _no_prefect(url: str) -> PipelineError:
    return PipelineError(
        f"the server at {url} does not answer like a Prefect API: set PREFECT_API_URL to the"
        " address of one, such as http://127.0.0.1:4200/api."
    )
