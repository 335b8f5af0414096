"""Write docs/config.md from the models of the config: `python docs/make_config.py`.

The script is here and not in a package because only a checkout has the folder docs.
A test compares the file with `config_page()`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from dpnet.pipeline.config import Config
from flows.deployments import DeploySettings

PAGE = Path(__file__).with_name("config.md")

INTRODUCTION = """\
# Options of the config

<!-- Made by docs/make_config.py. Do not edit: run `.venv/bin/python docs/make_config.py`. -->

A config is a YAML file with one section for each stage. Only `name` and `images.source` are
required; every other option has a default. Every default is our choice: the paper publishes none
of these numbers. `images.size` and `masks.size` must be equal.

* `--set SECTION.OPTION=VALUE` changes one option of a command, for example
  `--set train.steps=1000`. `dpnet images build` takes the options of `images` and
  `dpnet model describe` those of `model`, both without the section.
* The command refuses an unknown name, a wrong type or a value out of range before it starts work.
  A key that a section has twice is refused too. An alias (`*name`) is a copy of its anchor.
* The packaged configs are examples: [dpnet/configs](../dpnet/configs).
* The last table has the options of the [deploy file](#deploy-file), which is another file.
"""
DEPLOY = """\
## Deploy file

The settings of `dpnet deploy FILE` ([ui.md](ui.md)). They are at the top level of their own YAML
file. `--set` changes them without a section, for example `--set watch=null`.
"""
_HEAD = "| option | default | allowed | meaning |\n|---|---|---|---|"


def config_page() -> str:
    """Return the text of docs/config.md: a table for each section of the config."""
    fields = {field.alias or name: field for name, field in Config.model_fields.items()}
    sections = {name: model for name, field in fields.items() if (model := _model(field))}
    top = {name: row for name, row in _rows(Config).items() if name not in sections}
    first = f"## Top level\n\n{_HEAD}\n" + "\n".join(top.values()) + "\n"
    deploy = f"{DEPLOY}\n{_HEAD}\n" + "\n".join(_rows(DeploySettings).values()) + "\n"
    tables = [_section(name, model) for name, model in sections.items()]
    return "\n".join([INTRODUCTION, first, *tables, deploy])


def _model(field: FieldInfo) -> type[BaseModel] | None:
    """Return the model of a section, None for a single option."""
    kind = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def _section(name: str, model: type[BaseModel]) -> str:
    sentence = " ".join((model.__doc__ or "").split())
    return f"## `{name}`\n\n{sentence}\n\n{_HEAD}\n" + "\n".join(_rows(model).values()) + "\n"


def _rows(model: type[BaseModel]) -> dict[str, str]:
    """Return the row of each option that is no section, by the option's name."""
    schema = model.model_json_schema()["properties"]
    rows = {}
    for name, field in model.model_fields.items():
        if _model(field):
            continue
        option = field.alias or name
        value = field.get_default(call_default_factory=True)
        default = "required" if field.is_required() else f"`{_value(value)}`"
        cells = (f"`{option}`", default, _allowed(schema[option]), field.description or "")
        rows[option] = f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"
    return rows


def _value(value: Any) -> str:
    """Return a default as YAML writes it, whole numbers without a decimal point."""
    if isinstance(value, dict):
        return f"{{{', '.join(f'{name}: {_value(each)}' for name, each in value.items())}}}"
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return json.dumps(value).strip('"') or '""'


_KINDS = {"integer": "whole number", "number": "number", "string": "text", "null": "`null`"}


def _allowed(field: dict[str, Any]) -> str:
    """Return what a field may be, in words: its values, or its kind and range."""
    if "anyOf" in field:
        return " or ".join(_allowed(part) for part in field["anyOf"])
    if "enum" in field:
        return ", ".join(f"`{value}`" for value in field["enum"])
    kind = field.get("type", "")
    if kind == "boolean":
        return "`true`, `false`"
    if kind == "array":
        item = _allowed(field["items"])
        return f"a list of: {item}"
    if kind == "object":
        values = field["additionalProperties"].get("type")
        return {"number": "names and numbers", "string": "names and text"}.get(values, "sections")
    text = [_KINDS[kind], _range(field)]
    if "pattern" in field:
        text.append("of letters, digits, `.`, `_` and `-`")
    if "maxLength" in field:
        text.append(f"of at most {field['maxLength']} characters")
    return " ".join(filter(None, text))


def _range(field: dict[str, Any]) -> str:
    """Return a number's bounds, "1 to 100" where both count."""
    low, high = field.get("minimum"), field.get("maximum")
    if low is not None and high is not None:
        return f"{_number(low)} to {_number(high)}"
    bounds = [
        f"{words} {_number(field[name])}"
        for name, words in (
            ("exclusiveMinimum", "above"),
            ("minimum", "from"),
            ("exclusiveMaximum", "below"),
            ("maximum", "up to"),
        )
        if name in field
    ]
    return ", ".join(bounds)


def _number(value: float) -> str:
    return f"{int(value):,}" if float(value).is_integer() else str(value)


if __name__ == "__main__":
    PAGE.write_text(config_page(), "utf-8")
