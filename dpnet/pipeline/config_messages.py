"""Sentences about invalid configs: the option, its value, and the values that are allowed."""

from __future__ import annotations

import difflib
import json
import types
import typing
from collections.abc import Iterable, Iterator
from typing import Any

import annotated_types
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails


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
        known = list(_options(model))
        siblings = [o for o in known if o.rpartition(".")[0] == option.rpartition(".")[0]]
        # The same name in another section is a likelier mistake than a similar name in this one.
        elsewhere = [o for o in known if o.rpartition(".")[2] == option.rpartition(".")[2]]
        guesses = difflib.get_close_matches(option, siblings, 1, 0.7) or elsewhere
        known_here = f"the options here are {', '.join(siblings)}"
        hint = f"the nearest is {guesses[0]}" if guesses else known_here
        return f"{option} is not an option: {hint}"
    if error["type"] == "missing":
        return f"{option} is missing: give {_allowed(_field(model, error['loc']))}"
    if error["type"] == "value_error" and option:  # from a check in our models
        allowed = str(error["ctx"]["error"])
    else:
        allowed = _allowed(_field(model, error["loc"]))
    return f"{option} is {_short(error['input'])}: it must be {allowed or error['msg']}"


def _short(value: Any) -> str:
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _options(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Yield the dotted names of a model's options, sections included."""
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
            case _ if getattr(rule, "pattern", None):
                yield f"that matches {rule.pattern}"
