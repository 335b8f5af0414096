"""What went wrong on S3: whether it may pass by itself, and one sentence for people.

The sentences are made of the error's code or class alone. What the libraries say is never shown and
never chained: it can hold an address with a password in it, or parts of a signature.
"""

from __future__ import annotations

from typing import Any

from data_prep.core.errors import StorageError


class BrokenAnswerError(Exception):
    """An answer that came, but not whole, or that was overtaken by a change: worth asking again."""


_ABSENT = {"NoSuchKey", "404", "NotFound"}
_EXPIRED = {"ExpiredToken", "ExpiredTokenException", "RequestExpired", "TokenRefreshRequired"}
_REFUSED = {"InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken", "InvalidClientTokenId"}
_DENIED = {"AccessDenied", "AccessDeniedException", "AllAccessDisabled", "401", "403", "Forbidden"}
_SKEWED = {"RequestTimeTooSkewed", "RequestInTheFuture"}
_ELSEWHERE = {"PermanentRedirect", "301", "AuthorizationHeaderMalformed"}
_THROTTLED = {"SlowDown", "Throttling", "ThrottlingException", "TooManyRequests", "429"}
_PASSING = _THROTTLED | {
    "RequestTimeout",  # these come with status 400 or 409
    "IncompleteBody",
    "OperationAborted",
    "ConditionalRequestConflict",
}
_PASSING_STATUS = {408, 429, 500, 502, 503, 504}
_AGAIN = "run the same command again, it resumes."


def s3_errors() -> tuple[type[Exception], ...]:
    """Everything that a call of the S3 client, or reading its answer, fails with."""
    from botocore.exceptions import BotoCoreError, ClientError
    from botocore.parsers import ResponseParserError
    from urllib3.exceptions import HTTPError

    return ClientError, BotoCoreError, ResponseParserError, HTTPError, BrokenAnswerError


def code_of(error: Exception) -> str:
    """The code that the server answered, or the error's class where no answer came."""
    response: Any = getattr(error, "response", None)
    return str(response["Error"]["Code"]) if isinstance(response, dict) else type(error).__name__


def status_of(error: Exception) -> int:
    """The HTTP status of the answer; 0 if there was none."""
    response: Any = getattr(error, "response", None)
    metadata = response.get("ResponseMetadata", {}) if isinstance(response, dict) else {}
    return int(metadata.get("HTTPStatusCode", 0))


def may_pass(error: Exception) -> bool:
    """Whether the same request may succeed a little later."""
    if status := status_of(error):
        return status in _PASSING_STATUS or code_of(error) in _PASSING
    return _is_broken(error)


def is_unreachable(error: Exception) -> bool:
    """Whether no connection was made at all: a wrong address as well as a server that is down."""
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
    """What to raise for an error that stays: FileNotFoundError or StorageError.

    `where` is the object's URI and `server` the host asked.
    """
    code, status = code_of(error), status_of(error)
    if code in _ABSENT:
        return FileNotFoundError(where)
    if code == "NoSuchBucket":
        return StorageError(f"bucket {bucket!r} does not exist: create it or correct the URI.")
    what = _answered(code, status) if status else _unanswered(error, server)
    return StorageError(f"{where}: {what}")


def _answered(code: str, status: int) -> str:
    if code in _EXPIRED:
        return f"the AWS credentials have expired ({code}): renew them, then {_AGAIN}"
    if code in _REFUSED:
        return (
            f"access denied: the server does not accept the AWS credentials ({code}): check the"
            " access key and its secret."
        )
    if code in _SKEWED:
        return f"this machine's clock is too far from the server's ({code}): set it, then {_AGAIN}"
    if code in _DENIED:
        return (
            f"access denied ({code}): the AWS credentials need the rights to get, put, delete and"
            " list there."
        )
    if code in _ELSEWHERE:
        return f"the bucket lies in another region ({code}): set AWS_DEFAULT_REGION to it."
    if code == "InvalidObjectState":
        return "the object is archived: restore it first."
    if code in _THROTTLED:
        return f"the S3 server is overloaded ({code}): use fewer workers or wait, then {_AGAIN}"
    if status == 400 and code in ("400", "BadRequest"):  # an answer without a body, to HEAD
        return f"the S3 server refuses the request ({code}): the AWS credentials may have expired."
    if status >= 500:
        return f"the S3 server fails ({code}): wait until it is well, then {_AGAIN}"
    return f"the S3 server refuses the request ({code}): check the URI and AWS_ENDPOINT_URL."


def _unanswered(error: Exception, server: str) -> str:
    from botocore import exceptions as e

    name = type(error).__name__
    if isinstance(error, e.SSLError):
        return f"no safe connection to {server} ({name}): check AWS_ENDPOINT_URL and AWS_CA_BUNDLE."
    if is_unreachable(error):
        return f"cannot reach the S3 server {server}: check AWS_ENDPOINT_URL and the network."
    if _is_broken(error):
        return (
            f"the connection to {server} keeps breaking ({name}): check the network, then {_AGAIN}"
        )
    if isinstance(error, e.ParamValidationError):
        return "this is no name that a bucket or an object can have: correct the URI."
    return (  # what is left comes from looking for credentials: none, a part, an ended login …
        f"no usable AWS credentials or settings ({name}): set AWS_ACCESS_KEY_ID and"
        " AWS_SECRET_ACCESS_KEY or AWS_PROFILE, or log in again."
    )
