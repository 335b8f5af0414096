"""The texts of the OpenAPI page about each endpoint."""

from __future__ import annotations

from typing import Any

ABOUT = (
    "White in the mask is the hole. The mask has the size of the upright photo: a photo whose EXIF"
    " orientation turns it is turned first, and so is the result. Known pixels stay the same, bit"
    ' for bit, except in JPEG. Every error is {"error": "one sentence"}. A server that needs a'
    " token takes it as Authorization: Bearer TOKEN."
)
_ERROR = {
    "type": "object",
    "properties": {"error": {"type": "string"}},
    "required": ["error"],
}
_FIELDS = {
    "image": "the photo: JPEG, PNG, WebP, TIFF, BMP, GIF, PPM, JPEG 2000 or AVIF; 8 bits a channel",
    "mask": "a picture of the upright photo's size, white where to fill",
    "model": "an id of /api/models; left out: the default, which follows promotions",
    "format": "png (default), or same: as the photo (JPEG, PNG, WebP, TIFF), with profile and EXIF",
    "job": "an id that the client makes, 8 to 64 letters, digits or '-', for /api/jobs",
}


def _responses(**sentences: str) -> dict[int | str, dict[str, Any]]:
    """Return responses by status; the names are the statuses after an underscore."""
    found: dict[int | str, dict[str, Any]] = {}
    for name, sentence in sentences.items():
        status = int(name[1:])
        found[status] = {"description": sentence}
        if status >= 400:
            found[status]["content"] = {"application/json": {"schema": _ERROR}}
    return found


def _form(binary: dict[str, Any]) -> dict[str, Any]:
    kinds = {"image": binary, "mask": binary}
    properties = {
        name: {**kinds.get(name, {"type": "string"}), "description": text}
        for name, text in _FIELDS.items()
    }
    return {"schema": {"type": "object", "properties": properties, "required": ["image", "mask"]}}


INPAINT: dict[str, Any] = {
    "summary": "Fill the hole of a photo.",
    "description": (
        "A form is answered with the picture, and the headers X-DPNet-Model (which version filled"
        " it) and X-DPNet-Seconds. JSON is answered with JSON: image (base64), media_type, model,"
        " seconds."
    ),
    "responses": _responses(
        _200="the filled photo",
        _400="the photo, the mask or a field cannot be used",
        _404="there is no such model",
        _408="the upload is too slow",
        _409="the job was cancelled, or its id is in use",
        _413="too many bytes or pixels",
        _415="neither a form nor JSON",
        _429="the server is busy; Retry-After says when to try again",
        _503="no model can answer",
        _504="computing took too long",
    ),
    "openapi_extra": {
        "requestBody": {
            "required": True,
            "content": {
                "multipart/form-data": _form({"type": "string", "format": "binary"}),
                "application/json": _form({"type": "string", "contentEncoding": "base64"}),
            },
        }
    },
}
_JOB = [{"name": "job", "in": "path", "required": True, "schema": {"type": "string"}}]
JOB_STATE: dict[str, Any] = {
    "summary": "Say how far a job is.",
    "description": (
        "state is waiting, running, done, failed or cancelled; position is the number of jobs"
        " ahead; done and total count tiles; seconds_left is an estimate, left out if not known."
    ),
    "responses": _responses(_200="the state", _404="there is no such job"),
    "openapi_extra": {"parameters": _JOB},
}
JOB_CANCEL: dict[str, Any] = {
    "summary": "Cancel a job; it stops before its next tile.",
    "status_code": 204,
    "responses": _responses(_204="cancelled", _404="there is no such job"),
    "openapi_extra": {"parameters": _JOB},
}
MODELS: dict[str, Any] = {
    "summary": "List the versions, the default and the limits.",
    "description": "problem is empty, or says why no version answers, or why not the newest.",
    "responses": _responses(_200="the versions"),
}
VOTES: dict[str, Any] = {
    "summary": "Keep which of two versions filled a hole better.",
    "status_code": 201,
    "description": "`dpnet registry history` shows the votes.",
    "responses": _responses(
        _201="the record of the vote",
        _400="a field is missing or wrong",
        _409="this server has no root to write to",
    ),
    "openapi_extra": {
        "requestBody": {
            "required": True,
            "content": {
                "application/json": {
                    "schema": {
                        "type": "object",
                        "properties": {
                            "winner": {"type": "string", "description": "id of the better version"},
                            "loser": {"type": "string", "description": "id of the other version"},
                            "blind": {
                                "type": "boolean",
                                "description": "whether the person did not know which is which",
                            },
                            "reason": {
                                "type": "string",
                                "maxLength": 500,
                                "description": "why, at most 500 characters",
                            },
                        },
                        "required": ["winner", "loser"],
                    }
                }
            },
        }
    },
}
HEALTH: dict[str, Any] = {
    "summary": "Say whether a model can answer.",
    "description": "problem is empty, or says what is wrong although a model answers.",
    "responses": _responses(_200="yes", _503="no, and why"),
}
ALIVE: dict[str, Any] = {
    "summary": "Say that the server runs.",
    "responses": _responses(_200="it runs"),
}
METRICS: dict[str, Any] = {
    "summary": "Return the metrics for Prometheus.",
    "responses": _responses(_200="the metrics"),
}
