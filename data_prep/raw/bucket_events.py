"""Notifications that a bucket sends of new objects, in the form that S3 gives them."""

from __future__ import annotations

import json
from urllib.parse import unquote_plus

from data_prep.core.errors import PipelineError


def notified(text: str | bytes) -> list[str]:
    """The URIs of the objects that a notification is about; none in the one that tests the way.

    Raises PipelineError where it is no notification of S3.
    """
    try:
        event = json.loads(text)
        if "Records" not in event and event.get("Event") == "s3:TestEvent":
            return []
        found = [
            (record["s3"]["bucket"]["name"], record["s3"]["object"]) for record in event["Records"]
        ]
        return [f"s3://{bucket}/{unquote_plus(about['key'])}" for bucket, about in found]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise PipelineError(
            "the event is no notification of S3: give the JSON that the bucket sent, whose Records"
            " each have s3.bucket.name and s3.object.key."
        ) from None


def below(uris: list[str], source: str) -> list[str]:
    """Those that are `source` or lie below it."""
    top = source.rstrip("/")
    return [uri for uri in uris if uri == top or uri.startswith(f"{top}/")]
