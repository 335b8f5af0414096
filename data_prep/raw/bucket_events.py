"""Read the notifications that an S3 bucket sends for new objects."""

from __future__ import annotations

import json
from urllib.parse import unquote_plus

from data_prep.core.errors import PipelineError


def new_object_uris(text: str | bytes) -> list[str]:
    """Return the URIs of the new objects. S3's test notification has none.

    Raises PipelineError if the text is not an S3 notification.
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
            "the event is not an S3 notification. Give the JSON that the bucket sent. It has"
            " Records, each with s3.bucket.name and s3.object.key."
        ) from None


def uris_below(uris: list[str], source: str) -> list[str]:
    """Return the URIs that are `source` or below it."""
    top = source.rstrip("/")
    return [uri for uri in uris if uri == top or uri.startswith(f"{top}/")]
