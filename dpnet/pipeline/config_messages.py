"""Sentences about invalid configs: the option, its value, and the values that are allowed."""

from __future__ import annotations

import difflib
import json
import types
import typing
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import annotated_types
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from data_prep.core.paths import NAME, NAME_IN_WORDS


def error_sentence(error: ValidationError, model: type[BaseModel]) -> str:
    """Return pydantic's first error as a sentence, with the number of further errors."""
    errors = error.errors(include_url=False)
    # A misspelt name first: it may be meant for an option that is reported as missing.
    errors.sort(key=lambda each: each["type"] != "extra_forbidden")
    more = f" ({len(errors) - 1} more after this one)" if len(errors) > 1 else ""
    return f"{_describe(errors[0], model)}{more}."


def _describe(error: ErrorDetails, model: type[BaseModel]) -> str:
    option = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        return f"{option} is not an option: {_hint(option, error['input'], model)}"
    if error["type"] == "missing":
        return f"{option} is missing: give {_allowed(_field(model, error['loc']))}"
    if error["type"] == "value_error" and option:  # from a check in our models
        allowed = str(error["ctx"]["error"])
    else:
        allowed = _allowed(_field(model, error["loc"]))
    return f"{option} is {_short(error['input'])}: it must be {allowed or error['msg']}"


def _hint(option: str, value: Any, model: type[BaseModel]) -> str:
    """Return the options that an unknown one may be meant for, else those of its section."""
    known, (section, _, name) = _options(model), option.rpartition(".")
    siblings = [each for each in known if each.rpartition(".")[0] == section]
    # A mapping is meant for a section, and any other value for an option.
    fitting = {each for each, is_section in known.items() if is_section == isinstance(value, dict)}
    near = _similar(name, [each for each in siblings if each in fitting], 0.7)[:1]
    for cutoff in (1.0, 0.7):  # the same name in another section, then a similar name
        near = near or _similar(name, [each for each in known if each in fitting], cutoff)[:3]
    if not near:
        return f"the options here are {', '.join(siblings)}"
    return f"the nearest {'is' if len(near) == 1 else 'are'} {', '.join(near)}"


def _similar(name: str, options: Sequence[str], cutoff: float) -> list[str]:
    """Return the options whose name without its section is most like `name`, in their order."""
    names = [each.rpartition(".")[2] for each in options]
    close = difflib.get_close_matches(name, names, 1, cutoff)
    return [each for each, own in zip(options, names, strict=True) if own in close]


def _short(value: Any) -> str:
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _options(model: type[BaseModel], prefix: str = "") -> dict[str, bool]:
    """Return the dotted names of a model's options and sections; True for a section."""
    found: dict[str, bool] = {}
    for name, field in model.model_fields.items():
        option = f"{prefix}{field.alias or name}"
        section = _section(field.annotation)
        found[option] = section is not None
        if section is not None:
            found |= _options(section, f"{option}.")
    return found


def _section(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return None


def _field(model: type[BaseModel], location: tuple[int | str, ...]) -> FieldInfo | None:
    """Return the field at an error's location; None inside lists and mappings."""
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
    """Return kind and range of a field's values in words."""
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
            case _ if getattr(rule, "pattern", None) == NAME:
                yield f"and made of {NAME_IN_WORDS}"
            case _ if getattr(rule, "pattern", None):
                yield f"that matches {rule.pattern}"
