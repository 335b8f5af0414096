"""Explain S3 errors: decide whether to retry, and write one message for people.

The messages use the error's code or class only. The libraries' own messages are never shown or
chained, because they can hold an address with a password or parts of a signature.
"""

from __future__ import annotations

from typing import Any

from data_prep.core.errors import StorageError


class BrokenAnswerError(Exception):
    """An answer that was incomplete or out of date, so the request is worth repeating."""


_ABSENT = {"NoSuchKey", "404", "NotFound"}
_EXPIRED = {"ExpiredToken", "ExpiredTokenException", "RequestExpired", "TokenRefreshRequired"}
_REFUSED = {"InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken", "InvalidClientTokenId"}
_DENIED = {"AccessDenied", "AccessDeniedException", "AllAccessDisabled", "401", "403", "Forbidden"}
_SKEWED = {"RequestTimeTooSkewed", "RequestInTheFuture"}
_ELSEWHERE = {"PermanentRedirect", "301", "AuthorizationHeaderMalformed"}
_THROTTLED = {"SlowDown", "Throttling", "ThrottlingException", "TooManyRequests", "429"}
_PASSING = _THROTTLED | {
    "RequestTimeout",  # with status 400 or 409
    "IncompleteBody",
    "OperationAborted",
    "ConditionalRequestConflict",
}
_PASSING_STATUS = {408, 429, 500, 502, 503, 504}
_AGAIN = "run the same command again. It resumes."


def s3_errors() -> tuple[type[Exception], ...]:
    """Return the classes of errors that a request, or reading its answer, can raise."""
    from botocore.exceptions import BotoCoreError, ClientError
    from botocore.parsers import ResponseParserError
    from urllib3.exceptions import HTTPError

    return ClientError, BotoCoreError, ResponseParserError, HTTPError, BrokenAnswerError


def code_of(error: Exception) -> str:
    """Return the server's error code, or the error's class name if there was no answer."""
    response: Any = getattr(error, "response", None)
    return str(response["Error"]["Code"]) if isinstance(response, dict) else type(error).__name__


def status_of(error: Exception) -> int:
    """Return the HTTP status of the answer; 0 if there was no answer."""
    response: Any = getattr(error, "response", None)
    metadata = response.get("ResponseMetadata", {}) if isinstance(response, dict) else {}
    return int(metadata.get("HTTPStatusCode", 0))


def may_pass(error: Exception) -> bool:
    """Return whether the same request may succeed a little later."""
    if status := status_of(error):
        return status in _PASSING_STATUS or code_of(error) in _PASSING
    return _is_broken(error)


def is_unreachable(error: Exception) -> bool:
    """Return whether no connection was made: the address is wrong or the server is down."""
    from botocore import exceptions as e

    no_connection = (e.EndpointConnectionError, e.ConnectTimeoutError, e.ProxyConnectionError)
    return isinstance(error, (*no_connection, e.SSLError))


def _is_broken(error: Exception) -> bool:
    from botocore import exceptions as e
    from botocore.parsers import ResponseParserError
    from urllib3.exceptions import HTTPError

    of_botocore = (e.HTTPClientError, e.ConnectionError, e.IncompleteReadError, ResponseParserError)
    return isinstance(error, (*of_botocore, HTTPError, BrokenAnswerError))


def explain(error: Exception, where: str, bucket: str, server: str) -> Exception:
    """Return the exception to raise for a lasting error.

    Args:
        error: One of `s3_errors()`.
        where: The object's URI.
        bucket: The bucket's name.
        server: The host and port of the server.

    Returns:
        FileNotFoundError if the object does not exist, otherwise StorageError.
    """
    code, status = code_of(error), status_of(error)
    if code in _ABSENT:
        return FileNotFoundError(where)
    if code == "NoSuchBucket":
        return StorageError(f"bucket {bucket!r} does not exist. Create it or correct the URI.")
    what = _answered(code, status) if status else _unanswered(error, server)
    return StorageError(f"{where}: {what}")


def _answered(code: str, status: int) -> str:
    if code in _EXPIRED:
        return f"the AWS credentials have expired ({code}). Renew them, then {_AGAIN}"
    if code in _REFUSED:
        return (
            f"access denied: the server does not accept the AWS credentials ({code}). Check the"
            " access key and its secret."
        )
    if code in _SKEWED:
        return f"the clocks of this machine and the server differ ({code}). Set them, then {_AGAIN}"
    if code in _DENIED:
        return (
            f"access denied ({code}): the AWS credentials need the rights to get, put, delete and"
            " list objects."
        )
    if code in _ELSEWHERE:
        return f"the bucket is in another region ({code}). Set AWS_DEFAULT_REGION to that region."
    if code == "InvalidObjectState":
        return "the object is archived. Restore it first."
    if code in _THROTTLED:
        return f"the S3 server is overloaded ({code}). Use fewer workers or wait, then {_AGAIN}"
    if status == 400 and code in ("400", "BadRequest"):  # an answer to HEAD has no body
        return f"the S3 server refuses the request ({code}). The AWS credentials may have expired."
    if status >= 500:
        return f"the S3 server fails ({code}). Wait until it works, then {_AGAIN}"
    return f"the S3 server refuses the request ({code}). Check the URI and AWS_ENDPOINT_URL."


def _unanswered(error: Exception, server: str) -> str:
    from botocore import exceptions as e

    name = type(error).__name__
    if isinstance(error, e.SSLError):
        return (
            f"no secure connection to {server} ({name}). Check AWS_ENDPOINT_URL and AWS_CA_BUNDLE."
        )
    if is_unreachable(error):
        return f"cannot reach the S3 server {server}. Check AWS_ENDPOINT_URL and the network."
    if _is_broken(error):
        return (
            f"the connection to {server} keeps breaking ({name}). Check the network, then {_AGAIN}"
        )
    if isinstance(error, e.ParamValidationError):
        return "a bucket or an object cannot have this name. Correct the URI."
    return (  # other errors come from the search for credentials: none, a part, an expired login
        f"no usable AWS credentials or settings ({name}). Set AWS_ACCESS_KEY_ID and"
        " AWS_SECRET_ACCESS_KEY or AWS_PROFILE, or log in again."
    )
