"""The whole configuration: one section for each stage, with the settings of that stage.

A config is a packaged name (`demo`) or the path of a YAML file; `--set a.b=c` changes one option.
An error is one sentence with the option, its value and the allowed values.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from data_prep.core.errors import ConfigError
from data_prep.core.manifest import StageRef
from data_prep.core.paths import NAME
from data_prep.core.storage.uri import normal_uri
from data_prep.images.settings import ImagesSettings
from data_prep.masks.settings import MasksSettings
from dpnet.evaluation.settings import EvaluateSettings
from dpnet.pipeline.config_messages import error_sentence
from dpnet.pipeline.settings import CostSettings
from dpnet.pipeline.yaml_text import YamlError, read_yaml
from dpnet.registry.settings import RegisterSettings
from dpnet.training.job import TrainRequest
from dpnet.training.settings import LaunchSettings, LossSettings, ModelSettings, TrainSettings

Model = TypeVar("Model", bound=BaseModel)


class Config(BaseModel):
    """All settings of the pipeline."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(
        pattern=NAME,
        max_length=60,
        description="Name of the experiment. The run's folder begins with it.",
    )
    root: str | None = Field(
        None, description="Folder or s3://bucket/prefix under which everything is stored."
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
                " set both to the same number of pixels."
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


_LONGEST = 1 << 20  # characters of a file
_SECTIONS = (
    "images", "masks", "model", "losses", "train", "launch", "evaluate", "register", "cost",
)  # fmt: skip


_BUILT: dict[str, tuple[type[BaseModel], str]] = {
    "images": (ImagesSettings, "masks"),
    "masks": (MasksSettings, "images"),
}
_TOP = ("name", "root", *_SECTIONS)


def packaged_configs() -> list[str]:
    """Return the names of the configs in the package."""
    files = resources.files("dpnet.configs").iterdir()
    return sorted(f.name.removesuffix(".yaml") for f in files if f.name.endswith(".yaml"))


def load_config(name_or_path: str, overrides: Iterable[str] = ()) -> Config:
    """Load the config `name_or_path` and apply `overrides` ("train.steps=10") in order.

    Raises ConfigError with one sentence if anything in it is invalid.
    """
    values = _parse(_text_of(name_or_path), name_or_path)
    return validated(Config, values, overrides, f"{name_or_path}: ")


def load_settings(model: type[Model], path: Path | None, overrides: Iterable[str] = ()) -> Model:
    """Load settings of another model than `Config`, from a YAML file if one is given."""
    if path is None:
        return validated(model, {}, overrides)
    if not path.exists():
        raise ConfigError(f"the file {path} does not exist: check the path.")
    return validated(model, _parse(_read_text(path), str(path)), overrides, f"{path}: ")


def validated(
    model: type[Model], values: dict[str, Any], overrides: Iterable[str], where: str = ""
) -> Model:
    """Apply `overrides` to `values` in order, and check them as a `model`.

    Args:
        model: Kind of settings.
        values: Nested options. They are changed.
        overrides: Options such as "train.steps=10".
        where: Start of an error message: the file, a colon and a space.

    Raises:
        ConfigError: An option is unknown, missing or out of range.
    """
    for override in overrides:
        _apply(values, override)
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{where}{error_sentence(error, model)}") from None


def overrides_of(section: str, overrides: Iterable[str]) -> list[str]:
    """Return the options of a command that builds one section, with that section in each name.

    There `size=64` means images.size or masks.size. The config demands one size for both, so the
    other section gets it too, unless it is wrong: one mistake gives one error.
    """
    model, other = _BUILT[section]
    found = []
    for override in overrides:
        name = override.partition("=")[0].strip()
        own = "." not in name and (name in model.model_fields or name not in _TOP)
        found.append(f"{section}.{override.strip()}" if own else override)
    sizes = [o.partition("=")[2] for o in found if o.startswith(f"{section}.size=")]
    rule: TypeAdapter[int] = TypeAdapter(Annotated[int, *model.model_fields["size"].metadata])
    with suppress(ValidationError):
        found += [f"{other}.size={rule.validate_python(size)}" for size in sizes]
    return found


def is_config(text: str) -> bool:
    """Return whether `text` names a packaged config or a YAML file."""
    return text in packaged_configs() or text.lower().endswith((".yaml", ".yml"))


def config_of_source(source: str, overrides: Iterable[str] = ()) -> Config:
    """Return a config with all defaults for the photos in `source`, named after the source."""
    path = normal_uri(source)
    stem = re.sub(r"\.(tar\.gz|[A-Za-z0-9]+)$", "", path.rstrip("/").rpartition("/")[2])
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip("._-")[:60] or "photographs"
    values: dict[str, Any] = {"name": name, "images": {"source": path, "name": name}}
    return validated(Config, values, overrides)


def resolve_root(root: str | None, config: Config) -> str:
    """Return `root`, else DPNET_ROOT, else the config's root. A folder becomes an absolute path."""
    chosen = root or os.environ.get("DPNET_ROOT") or config.root
    if not chosen:
        raise ConfigError(
            "no root is given, so there is no place to store results: use --root DIR, DPNET_ROOT or"
            " the config's `root`."
        )
    return normal_uri(chosen)


def _text_of(name_or_path: str) -> str:
    known = packaged_configs()
    if name_or_path in known:
        return (resources.files("dpnet.configs") / f"{name_or_path}.yaml").read_text("utf-8")
    if Path(name_or_path).expanduser().is_dir():
        raise ConfigError(
            f"{name_or_path!r} is a folder, but this command needs a config: give a packaged one"
            f" ({', '.join(known)}) or a YAML file. A config names a folder of photos as"
            " images.source and a folder of mask files as masks.external."
        )
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
        with path.open(encoding="utf-8") as file:
            text = file.read(_LONGEST + 1)
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not UTF-8 text: give a YAML file.") from None
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}): check the file.") from None
    if len(text) > _LONGEST:
        raise ConfigError(f"{path} has more than {_LONGEST} characters: give a YAML file.")
    return text


def _parse(text: str, where: str) -> dict[str, Any]:
    try:
        values = read_yaml(text)
    except YamlError as error:
        raise ConfigError(f"{where} {error}.") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{where} holds no options: write a YAML mapping of sections.")
    return values


def _apply(values: dict[str, Any], override: str) -> None:
    """Set one option, such as "a.b=c", in the nested `values`."""
    option, equals, text = override.partition("=")
    parts = option.strip().split(".")
    if not equals or not all(parts):
        raise ConfigError(
            f"--set {override!r} is not valid: write option=value, such as train.steps=10."
        )
    try:
        value = read_yaml(text)
    except YamlError as error:
        raise ConfigError(f"--set {override!r}: the value {error}.") from None
    for part in parts[:-1]:
        if not isinstance(values.get(part), dict):
            values[part] = {}
        values = values[part]
    values[parts[-1]] = value
