"""The parameters of the flows: what a person fills in at the Prefect UI.

A form holds the options of one section of the config that are changed from run to run. They are the
config's own, with their ranges and descriptions; an empty field leaves the config's value. Whatever
else there is can be changed by `overrides`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, Optional

from pydantic import BaseModel, ConfigDict, Field, create_model

from data_prep.images.settings import ImagesSettings
from dpnet.evaluation.settings import EvaluateSettings
from dpnet.training.settings import LaunchSettings, TrainSettings


def _plain(schema: dict[str, Any]) -> None:
    """Of a choice between a value and none, the value alone: the form has no good field for such
    a choice, and an empty field is none anyway."""
    for name, field in schema.get("properties", {}).items():
        choices = field.pop("anyOf", None)
        if choices is not None:
            (kind,) = [choice for choice in choices if choice.get("type") != "null"]
            field |= kind
        if field.get("default", 0) is None:
            del field["default"]
        field["title"] = name


_TRAIN = (  # no boolean: the UI's form sends false for one that nobody has touched
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
    fields: dict[str, Any] = {}
    for place, option in enumerate(options):
        known = section.model_fields[option]
        kind: Any = Optional[Annotated[known.annotation, Field(), *known.metadata]]  # noqa: UP045
        given = Field(None, description=known.description, json_schema_extra={"position": place})
        fields[option] = (kind, given)
    made: type[BaseModel] = create_model(
        name,
        __config__=ConfigDict(extra="forbid", frozen=True, json_schema_extra=_plain),
        __module__=__name__,
        **fields,
    )
    return made


class Images(_form("Images", ImagesSettings, ("source", "name", "size", "mode", "layout"))):  # type: ignore[misc]
    """Which photographs, and how they are cut."""


class Train(_form("Train", TrainSettings, _TRAIN)):  # type: ignore[misc]
    """How long and with what training goes."""


class Launch(_form("Launch", LaunchSettings, ("launcher", "address"))):  # type: ignore[misc]
    """Where training runs."""


class Evaluate(_form("Evaluate", EvaluateSettings, ("split", "max_pairs", "pictures"))):  # type: ignore[misc]
    """What the model is evaluated on."""


SECTIONS: dict[str, type[BaseModel]] = {
    "images": Images,
    "train": Train,
    "launch": Launch,
    "evaluate": Evaluate,
}


def overrides_of(**forms: BaseModel) -> list[str]:
    """What was filled in, each as "train.steps=10"; a JSON value is a YAML value."""
    return [
        f"{section}.{option}={json.dumps(value, ensure_ascii=False)}"
        for section, form in forms.items()
        for option, value in form.model_dump(mode="json", exclude_none=True).items()
    ]
