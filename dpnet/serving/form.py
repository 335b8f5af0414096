"""The fields of a request: from a form (multipart) or from JSON with base64. Pure functions."""

from __future__ import annotations

import base64
import binascii
import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from email.message import Message
from email.parser import BytesParser
from typing import Any, NamedTuple

from data_prep.core.record import parse_json
from dpnet.serving.limits import RequestError

JOB = re.compile(r"[A-Za-z0-9-]{8,64}")
PNG, SAME = "png", "same"  # values of the field `format`
_PARTS = 12  # a form of ours has five; ours
_HEAD = 8_000  # bytes of the headers of a part; ours
_TEXT = 200  # bytes of a field other than a picture; ours
_FIELDS = ("image", "mask", "model", "format", "job")
_CUT = "the upload ended before its end: send it again."


class Form(NamedTuple):
    """The fields of a request.

    Attributes:
        image: the bytes of the photo's file.
        mask: the bytes of the mask's file.
        model: id of the version, or "" for the default.
        format: png, or same.
        job: the id that the client made, or "".
        as_json: whether the answer is JSON with base64.
    """

    image: bytes
    mask: bytes
    model: str = ""
    format: str = PNG
    job: str = ""
    as_json: bool = False


def parse_form(content_type: str, body: bytes | bytearray) -> Form:
    """Return the fields of a request.

    Args:
        content_type: the header Content-Type.
        body: the whole body.

    Raises:
        RequestError: the body has another form, or a field is missing or wrong.
    """
    header = Message()
    header["content-type"] = content_type
    kind = header.get_content_type()
    if kind == "multipart/form-data":
        return _form(dict(_parts(bytes(body), str(header.get_param("boundary", "")))), False)
    if kind == "application/json":
        return _form(_json_fields(body), True)
    raise RequestError(
        415,
        "the request is neither a form nor JSON: send multipart/form-data with the files image and"
        " mask, or application/json with both as base64.",
    )


def _check_names(names: Iterable[str]) -> None:
    """Raise RequestError for a name that is none of ours, and name the nearest one."""
    for name in names:
        if name not in _FIELDS:
            near = difflib.get_close_matches(name[:_TEXT], _FIELDS, 1)
            meant = f"did you mean {near[0]}? " if near else ""
            raise RequestError(
                400, f"there is an unknown field: {meant}The fields are {', '.join(_FIELDS)}."
            )


def _form(fields: Mapping[str, bytes], as_json: bool) -> Form:
    _check_names(fields)
    for name, what in (("image", "the photo"), ("mask", "its mask, white where to fill")):
        if not fields.get(name):
            raise RequestError(400, f"the field {name} is missing or empty: send {what}.")
    texts = {}
    for name in ("model", "format", "job"):
        value = fields.get(name, b"")
        if len(value) > _TEXT:
            raise RequestError(400, f"the field {name} is too long: give at most {_TEXT} bytes.")
        texts[name] = value.decode("utf-8", "replace").strip()
    form = texts["format"] or PNG
    if form not in (PNG, SAME):
        raise RequestError(400, "the field format is unknown: give png or same.")
    if texts["job"] and not JOB.fullmatch(texts["job"]):
        raise RequestError(
            400, "the field job cannot be used: give 8 to 64 letters (a-z), digits or '-'."
        )
    return Form(fields["image"], fields["mask"], texts["model"], form, texts["job"], as_json)


def _json_fields(body: bytes | bytearray) -> dict[str, bytes]:
    values = json_object(body)
    _check_names(values)
    fields = {}
    for name in _FIELDS:
        value = values.get(name)
        if value is None:
            continue
        if not isinstance(value, str):
            raise RequestError(400, f"the field {name} is not text: send a JSON string.")
        is_file = name in ("image", "mask")
        fields[name] = _from_base64(name, value) if is_file else value.encode()
    return fields


def json_object(body: bytes | bytearray) -> dict[str, Any]:
    """Return the values of a JSON object. Raises RequestError if it is none."""
    try:
        values = parse_json(bytes(body))
    except ValueError:
        values = None
    if not isinstance(values, dict):
        raise RequestError(400, "the request is no JSON object: send one, such as {}.")
    return values


def _from_base64(name: str, text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise RequestError(
            400, f"the field {name} is not base64: send the file's bytes as base64."
        ) from None


def _parts(body: bytes, boundary: str) -> Iterator[tuple[str, bytes]]:
    """Yield the name and the bytes of each part of a form (RFC 7578)."""
    mark = b"--" + boundary.encode("utf-8", "replace")
    if not boundary or not body.startswith(mark):
        raise RequestError(
            400, "the form cannot be read: its parts are not separated by the boundary it names."
        )
    at = len(mark)
    for _ in range(_PARTS):
        if body.startswith(b"--", at):
            return
        head_end = body.find(b"\r\n\r\n", at, at + _HEAD)
        end = _end_of_part(body, mark, head_end) if head_end >= 0 else -1
        if end < 0:
            raise RequestError(400, _CUT)
        head = BytesParser().parsebytes(body[at:head_end].lstrip(), headersonly=True)
        name = head.get_param("name", "", "content-disposition")
        yield str(name), body[head_end + 4 : end]
        at = end + 2 + len(mark)
    if not body.startswith(b"--", at):
        raise RequestError(400, f"the form has over {_PARTS} parts: send {', '.join(_FIELDS)}.")


def _end_of_part(body: bytes, mark: bytes, start: int) -> int:
    """Return where the line with the next mark begins, or -1. A longer line does not count."""
    end = start
    while (end := body.find(b"\r\n" + mark, end)) >= 0:
        after = end + 2 + len(mark)
        if body[after : after + 2] in (b"\r\n", b"--"):
            return end
        end = after
    return -1
