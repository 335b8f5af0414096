"""Read the notifications about new objects that an S3 bucket sends.

They come as they are, or wrapped by SNS, SQS or EventBridge.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote_plus

from data_prep.core.errors import PipelineError
from data_prep.core.storage.uri import S3Address, parse_uri


def new_object_uris(text: str | bytes) -> list[str]:
    """Return the URIs of the new objects. S3's test notification has none.

    Raises PipelineError if the text is not an S3 notification.
    """
    try:
        found = list(_objects(json.loads(text)))
        if not all(isinstance(key, str) for _, key in found):
            raise TypeError(found)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise PipelineError(
            "the event is not an S3 notification. Give the JSON that the bucket sent, or that SNS,"
            " SQS or EventBridge made of it. It has Records, each with s3.bucket.name and"
            " s3.object.key."
        ) from None
    return [f"s3://{bucket}/{key}" for bucket, key in found]


def _objects(event: Any) -> Iterator[tuple[str, str]]:
    """Yield bucket and key of each object of an event. Raise an error if it is another event."""
    if "detail" in event:  # EventBridge; its keys are not encoded
        detail = event["detail"]
        if "requestParameters" in detail:  # as CloudTrail reports it
            request = detail["requestParameters"]
            yield request["bucketName"], request["key"]
        else:
            yield detail["bucket"]["name"], detail["object"]["key"]
    elif "s3" in event:  # a record of S3
        yield event["s3"]["bucket"]["name"], unquote_plus(event["s3"]["object"]["key"])
    elif "Sns" in event:  # a record of SNS
        yield from _objects(event["Sns"])
    elif event.get("Event") != "s3:TestEvent":
        yield from _wrapped(event)


def _wrapped(event: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the objects of the events in an event: a list of records, or a text with JSON."""
    for name in ("Message", "body", "Body"):  # SNS, SQS as its Lambda gets it, SQS
        if name in event:
            yield from _objects(json.loads(event[name]))
            return
    records = event["Records"] if "Records" in event else event["Messages"]
    if not isinstance(records, list):
        raise TypeError(records)
    for record in records:
        yield from _objects(record)


def uris_below(uris: list[str], source: str) -> list[str]:
    """Return the URIs of objects that are `source`, a path or URI, or below it."""
    address = parse_uri(source)
    if not isinstance(address, S3Address):
        return []
    return [uri for uri in uris if _is_below(uri, address)]


def _is_below(uri: str, top: S3Address) -> bool:
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    inside = not top.prefix or key == top.prefix or key.startswith(f"{top.prefix}/")
    return bucket == top.bucket and inside
