"""Records that another version of this package may have written: what is ignored, what refused.

A field that this version does not know is ignored, because a newer patch version may add one. A
newer format number says that a record would be misunderstood, so it is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from data_prep.core.errors import PipelineError


def parse_json(data: str | bytes) -> Any:
    """Return the values of a JSON text.

    Raises:
        ValueError: it is not JSON, or it is nested too deeply to be read.
    """
    try:
        return json.loads(data)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def known_fields(kind: type, found: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of `found` that this version of the dataclass `kind` has."""
    return {each.name: found[each.name] for each in fields(kind) if each.name in found}


def refuse_newer(record: Mapping[str, Any], where: str, newest: int = 1) -> None:
    """Raise PipelineError if a record has a newer format number than `newest`.

    Records without a number are those of all versions so far.
    """
    number = record.get("format")
    if isinstance(number, int) and number > newest:
        raise PipelineError(
            f"{where} has format {number}, this version reads {newest}: use the version of dpnet"
            " that wrote it."
        )
