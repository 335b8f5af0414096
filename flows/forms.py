"""The parameters of the flows: the forms that a person fills in in the Prefect UI.

A form has some options of one section of the config, those that people change from run to run. It
takes their ranges and descriptions from the config. An empty field keeps the config's value. The
parameter `overrides` can change every other option.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Optional

from pydantic import BaseModel, ConfigDict, Field, create_model

from data_prep.core.errors import ConfigError
from data_prep.core.redact import has_credentials
from data_prep.images.settings import ImagesSettings
from dpnet.evaluation.settings import EvaluateSettings
from dpnet.training.settings import LaunchSettings, TrainSettings


def _simplify(schema: dict[str, Any]) -> None:
    """Replace each choice between a value and null by the value.

    The UI has no good field for such a choice, and it sends null for an empty field anyway.
    """
    for name, field in schema.get("properties", {}).items():
        choices = field.pop("anyOf", None)
        if choices is not None:
            (kind,) = [choice for choice in choices if choice.get("type") != "null"]
            field |= kind
        if field.get("default", 0) is None:
            del field["default"]
        field["title"] = name


_TRAIN = (  # without booleans: the UI sends false for an untouched checkbox
    "steps",
    "batch_size",
    "workers",
    "min_workers",
    "init_from",
    "checkpoint_every",
    "validate_every",
    "seed",
)


def _form(name: str, section: type[BaseModel], options: Sequence[str]) -> type[BaseModel]:
    """Return a model with `options` of a section, each optional, in this order."""
    fields: dict[str, Any] = {}
    for position, option in enumerate(options):
        known = section.model_fields[option]
        kind: Any = Optional[Annotated[known.annotation, Field(), *known.metadata]]  # noqa: UP045
        extra: dict[str, Any] = {"position": position}
        fields[option] = (kind, Field(None, description=known.description, json_schema_extra=extra))
    form: type[BaseModel] = create_model(
        name,
        __config__=ConfigDict(extra="forbid", frozen=True, json_schema_extra=_simplify),
        __module__=__name__,
        **fields,
    )
    return form


class Images(_form("Images", ImagesSettings, ("source", "name", "size", "mode", "layout"))):  # type: ignore[misc]
    """The photos, and how to cut them."""


class Train(_form("Train", TrainSettings, _TRAIN)):  # type: ignore[misc]
    """The length of training, and its options."""


class Launch(_form("Launch", LaunchSettings, ("launcher", "address"))):  # type: ignore[misc]
    """The machines that train."""


class Evaluate(_form("Evaluate", EvaluateSettings, ("split", "max_pairs", "pictures"))):  # type: ignore[misc]
    """The pairs of photo and mask to evaluate on."""


SECTIONS: dict[str, type[BaseModel]] = {
    "images": Images,
    "train": Train,
    "launch": Launch,
    "evaluate": Evaluate,
}


def refuse_credentials(overrides: Iterable[str], where: str) -> None:
    """Refuse options with credentials, because Prefect stores and shows parameters as they are.

    Args:
        overrides: Options such as "register.tracking_uri=http://host".
        where: What has the options, for the message.

    Raises:
        ConfigError: An option contains a password or a token.
    """
    for each in overrides:
        if has_credentials(each):
            option = each.partition("=")[0]
            raise ConfigError(
                f"{where} cannot have the value of {option}: it contains a password or a token, and"
                " Prefect shows parameters. Set it in the worker's environment, for example"
                " MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or in a Secret block that"
                " `secrets` of the deploy file names."
            )


def overrides_of(**forms: BaseModel) -> list[str]:
    """Return the filled-in fields as overrides, such as "train.steps=10".

    A value is written as JSON, which is also YAML.
    """
    return [
        f"{section}.{option}={json.dumps(value, ensure_ascii=False)}"
        for section, form in forms.items()
        for option, value in form.model_dump(mode="json", exclude_none=True).items()
    ]
