"""The whole configuration: one tree, composed of what each stage defines beside its code.

A config is a packaged name (`demo`) or the path of a YAML file; `--set a.b=c` changes one option.
Everything wrong with one is told in a sentence that names the option and what it may be.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Self, TypeVar

import annotated_types
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from data_prep.core.errors import ConfigError
from data_prep.core.manifest import StageRef
from data_prep.images.settings import ImagesSettings
from data_prep.masks.settings import MasksSettings
from dpnet.evaluation.settings import EvaluateSettings
from dpnet.pipeline.settings import CostSettings
from dpnet.registry.settings import RegisterSettings
from dpnet.training.job import TrainRequest
from dpnet.training.settings import LaunchSettings, LossSettings, ModelSettings, TrainSettings

Model = TypeVar("Model", bound=BaseModel)


class Config(BaseModel):
    """Everything the pipeline can be told."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        max_length=60,
        description="Name of the experiment: part of the run's folder.",
    )
    root: str | None = Field(
        None, description="Where everything is stored: a folder or s3://bucket/prefix."
    )
    images: ImagesSettings
    masks: MasksSettings
    model: ModelSettings
    losses: LossSettings
    train: TrainSettings
    launch: LaunchSettings
    evaluate: EvaluateSettings
    # `register` is a method of pydantic's classes, so the attribute has another name.
    registry: RegisterSettings = Field(alias="register")
    cost: CostSettings

    @model_validator(mode="before")
    @classmethod
    def _sections_may_be_left_out(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        given = {key: value for key, value in values.items() if value is not None}
        return {**{section: {} for section in _SECTIONS}, **given}

    @model_validator(mode="after")
    def _one_size(self) -> Self:
        if self.images.size != self.masks.size:
            raise ConfigError(
                f"images.size is {self.images.size} but masks.size is {self.masks.size}:"
                " give both the same number of pixels."
            )
        return self

    def training(self, images: StageRef, masks: StageRef) -> TrainRequest:
        """Return the training that this config describes, on the given shards."""
        return TrainRequest(self.name, images, masks, self.model, self.losses, self.train)


@dataclass(frozen=True)
class CheckedConfig:
    """A config that a command has checked, for the flow that runs it.

    Attributes:
        name: Packaged name or path that was given. It is shown; it is not read again.
        overrides: Options that were given, each like train.steps=10. They are shown.
        resolved: The content that was checked.
    """

    name: str
    overrides: Sequence[str]
    resolved: Config


_SECTIONS = (
    "images", "masks", "model", "losses", "train", "launch", "evaluate", "register", "cost",
)  # fmt: skip


def packaged_configs() -> list[str]:
    """Names of the configs that come with the package."""
    files = resources.files("dpnet.configs").iterdir()
    return sorted(f.name.removesuffix(".yaml") for f in files if f.name.endswith(".yaml"))


def load_config(name_or_path: str, overrides: Iterable[str] = ()) -> Config:
    """The config `name_or_path` with `overrides` ("train.steps=10") applied in order.

    Raises ConfigError with one sentence for whatever is wrong.
    """
    values = _parse(_text_of(name_or_path), name_or_path)
    return validated(Config, values, overrides, f"{name_or_path}: ")


def load_settings(model: type[Model], path: Path | None, overrides: Iterable[str] = ()) -> Model:
    """Settings of another kind than `Config`, from a YAML file if one is given, checked alike."""
    if path is None:
        return validated(model, {}, overrides)
    if not path.exists():
        raise ConfigError(f"{path} is no file: check the path.")
    return validated(model, _parse(_read_text(path), str(path)), overrides, f"{path}: ")


def validated(
    model: type[Model], values: dict[str, Any], overrides: Iterable[str], where: str = ""
) -> Model:
    """`values` with `overrides` applied in order as a `model`. Raises ConfigError."""
    for override in overrides:
        _apply(values, override)
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{where}{_sentence(error, model)}") from None


def is_config(text: str) -> bool:
    """Whether `text` names a config: a packaged one, or a YAML file."""
    return text in packaged_configs() or text.lower().endswith((".yaml", ".yml"))


def config_of_source(source: str, overrides: Iterable[str] = ()) -> Config:
    """A config with the defaults for the photographs in `source`, named after it."""
    path = source if "://" in source else str(Path(source).expanduser().absolute())
    stem = re.sub(r"\.(tar\.gz|[A-Za-z0-9]+)$", "", path.rstrip("/").rpartition("/")[2])
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip("._-")[:60] or "photographs"
    values: dict[str, Any] = {"name": name, "images": {"source": path, "name": name}}
    return validated(Config, values, overrides)


def resolve_root(root: str | None, config: Config) -> str:
    """The root that counts: `root`, else DPNET_ROOT, else the config's; local ones absolute."""
    chosen = root or os.environ.get("DPNET_ROOT") or config.root
    if not chosen:
        raise ConfigError(
            "no root is given: say where to store everything with --root DIR, DPNET_ROOT or the"
            " config's `root`."
        )
    return chosen if "://" in chosen else str(Path(chosen).expanduser().absolute())


class _Loader(yaml.SafeLoader):
    """Safe YAML in which only true and false are booleans, as in YAML 1.2: `off` is a word."""


_BOOLEAN = "tag:yaml.org,2002:bool"
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != _BOOLEAN]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_BOOLEAN, re.compile("^(true|True|TRUE|false|False|FALSE)$"), "tTfF")


def _text_of(name_or_path: str) -> str:
    known = packaged_configs()
    if name_or_path in known:
        return (resources.files("dpnet.configs") / f"{name_or_path}.yaml").read_text("utf-8")
    try:
        return _read_text(Path(name_or_path).expanduser())
    except FileNotFoundError:
        guess = difflib.get_close_matches(name_or_path, known, 1)
        raise ConfigError(
            f"{name_or_path!r} is neither a packaged config ({', '.join(known)}) nor a file"
            + (f": the nearest is {guess[0]}." if guess else ": check the path.")
        ) from None


def _read_text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not text in UTF-8: give a YAML file.") from None
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.") from None


def _parse(text: str, where: str) -> dict[str, Any]:
    try:
        values = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" at line {mark.line + 1}" if mark else ""
        raise ConfigError(
            f"{where} is not valid YAML{line}: {getattr(error, 'problem', None) or error}."
        ) from None
    if not isinstance(values, dict):
        raise ConfigError(f"{where} holds no options: it must be a YAML mapping of sections.")
    return values


def _apply(values: dict[str, Any], override: str) -> None:
    """Put one `a.b=c` into the nested `values`."""
    option, equals, text = override.partition("=")
    parts = option.strip().split(".")
    if not equals or not all(parts):
        raise ConfigError(f"--set {override!r} is not of the form option=value, as train.steps=10.")
    try:
        value = yaml.load(text, _Loader)
    except yaml.YAMLError:
        raise ConfigError(f"--set {override!r}: {text!r} is no YAML value: quote it.") from None
    for part in parts[:-1]:
        if not isinstance(values.get(part), dict):
            values[part] = {}
        values = values[part]
    values[parts[-1]] = value


def _sentence(error: ValidationError, model: type[BaseModel]) -> str:
    """The first of pydantic's errors as a sentence; the others are counted."""
    errors = error.errors(include_url=False)
    # A misspelt name first: what is missing may be what it was meant to be.
    errors.sort(key=lambda each: each["type"] != "extra_forbidden")
    more = f" ({len(errors) - 1} more after this one)" if len(errors) > 1 else ""
    return f"{_describe(errors[0], model)}{more}."


def _describe(error: ErrorDetails, model: type[BaseModel]) -> str:
    option = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        known = list(_options(model))
        siblings = [o for o in known if o.rpartition(".")[0] == option.rpartition(".")[0]]
        # A name that exists in another section is the likelier slip than a similar one in this.
        elsewhere = [o for o in known if o.rpartition(".")[2] == option.rpartition(".")[2]]
        guesses = difflib.get_close_matches(option, siblings, 1, 0.7) or elsewhere
        known_here = f"the options here are {', '.join(siblings)}"
        return f"{option} is no option: {f'the nearest is {guesses[0]}' if guesses else known_here}"
    if error["type"] == "missing":
        return f"{option} is missing: give {_allowed(_field(model, error['loc']))}"
    if error["type"] == "value_error" and option:  # of a check of ours
        allowed = str(error["ctx"]["error"])
    else:
        allowed = _allowed(_field(model, error["loc"]))
    return f"{option} is {_short(error['input'])}: it must be {allowed or error['msg']}"


def _short(value: Any) -> str:
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _options(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Dotted names of a model's options, sections included."""
    for name, field in model.model_fields.items():
        option = f"{prefix}{field.alias or name}"
        yield option
        if section := _section(field.annotation):
            yield from _options(section, f"{option}.")


def _section(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return None


def _field(model: type[BaseModel], location: tuple[int | str, ...]) -> FieldInfo | None:
    """The field that an error's location leads to, None inside lists and dicts."""
    inner: type[BaseModel] | None = model
    field = None
    for part in location:
        if inner is None:
            return None
        names = {f.alias or name: f for name, f in inner.model_fields.items()}
        field = names.get(str(part))
        inner = _section(field.annotation) if field else None
    return field


_KINDS = {
    int: "a whole number",
    float: "a number",
    str: "text",
    bool: "true or false",
    type(None): "null",
}


def _allowed(field: FieldInfo | None) -> str:
    """What a field may be, in words: kind and range."""
    if field is None:
        return ""
    if section := _section(field.annotation):
        return f"a section with the options {', '.join(section.model_fields)}"
    return " ".join(filter(None, [_kind(field.annotation), *_bounds(field.metadata)]))


def _kind(annotation: Any) -> str:
    origin = typing.get_origin(annotation)
    parts = typing.get_args(annotation)
    if origin is typing.Annotated:
        rules = [rule for part in parts[1:] for rule in getattr(part, "metadata", [part])]
        return " ".join([_kind(parts[0]), *_bounds(rules)])
    if origin is typing.Literal:
        return f"one of {', '.join(map(str, parts))}" if len(parts) > 1 else str(parts[0])
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_kind(part) for part in parts)
    if origin in (list, tuple, set, frozenset):
        return "a list"
    if origin is dict:
        return "a mapping"
    return _KINDS.get(annotation, getattr(annotation, "__name__", str(annotation)))


def _bounds(metadata: Iterable[Any]) -> Iterator[str]:
    for rule in metadata:
        match rule:
            case annotated_types.Ge(ge=bound):
                yield f"of at least {bound}"
            case annotated_types.Gt(gt=bound):
                yield f"above {bound}"
            case annotated_types.Le(le=bound):
                yield f"and at most {bound}"
            case annotated_types.Lt(lt=bound):
                yield f"and below {bound}"
            case annotated_types.MaxLen(max_length=bound):
                yield f"of length {bound} at most"
            case annotated_types.MinLen(min_length=bound):
                yield f"of length {bound} at least"
            case _ if getattr(rule, "pattern", None):
                yield f"that matches {rule.pattern}"
