"""Send requests to an S3 server and retry them.

botocore's own retries are off: they end at the first byte of an answer, share one quota among
threads, and hide whether a conditional write was sent twice.
"""

from __future__ import annotations

import logging
import os
import re
import secrets
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar
from urllib.parse import urlsplit

from data_prep.core.environment import S3, wrong_variable
from data_prep.core.errors import StorageError
from data_prep.core.storage.s3_errors import (
    explain,
    is_unreachable,
    may_pass,
    s3_errors,
    status_of,
)

ATTEMPTS = 10  # of one request: the waits add up to half a minute on average, a minute at most
ATTEMPTS_UNREACHED = 4  # while no server has answered yet: most likely the address is wrong
FIRST_WAIT_S = 0.2
LONGEST_WAIT_S = 20.0
CONNECT_TIMEOUT_S = 10.0
READ_TIMEOUT_S = 60.0  # between two pieces of an answer

# Ends of addresses of servers that also know each bucket as a host.
_CLOUDS = (
    ".amazonaws.com", ".digitaloceanspaces.com", ".r2.cloudflarestorage.com", ".aliyuncs.com",
    ".linodeobjects.com", ".backblazeb2.com", ".wasabisys.com",
)  # fmt: skip

log = logging.getLogger(__name__)
_Result = TypeVar("_Result")


class S3Requests:
    """The client of one bucket. Safe to use from several threads and to send to processes.

    Credentials come from the standard AWS chain only.
    """

    def __init__(self, bucket: str, patience: float, timeout: float | None = None) -> None:
        """Remember how to send requests to a bucket.

        Args:
            bucket: The bucket's name.
            patience: Seconds for which a failing request is retried.
            timeout: Seconds after which a request fails, without a retry; None for the usual
                timeouts and retries.
        """
        self.bucket, self.patience, self.timeout = bucket, patience, timeout
        self._reached = False  # whether the server has ever answered
        self._warned = False  # since the last answer
        self._client: Any = None
        self._lock = threading.RLock()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_client": None, "_lock": None}  # these two cannot be pickled

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.RLock())

    @property
    def client(self) -> Any:
        """Return boto3's client, which is made when it is first needed."""
        with self._lock:
            if self._client is None:
                client = new_client(self.timeout)
                _check_endpoint(str(client.meta.endpoint_url), self.bucket)
                self._client = client
            return self._client

    def send(self, where: str, attempt: Callable[[], _Result]) -> _Result:
        """Return the result of `attempt`, and repeat it while its failure may be temporary.

        Waits grow exponentially with full jitter. `where` is the URI for messages.

        Raises:
            FileNotFoundError: The object does not exist.
            StorageError: The request failed for good.
        """
        failures, start = 0, time.monotonic()
        while True:
            final: Exception | None = None
            try:
                result = attempt()
            except s3_errors() as error:
                failures += 1
                self._reached = self._reached or status_of(error) > 0
                few = is_unreachable(error) and not self._reached
                most = ATTEMPTS_UNREACHED if few else ATTEMPTS
                if self.timeout is not None:
                    most = 1
                if failures >= most or not may_pass(error):
                    final = explain(error, where, self.bucket, self._server())
                if final and may_pass(error) and time.monotonic() - start < self.patience:
                    self._warn_once(final)
                    final = None
            except RecursionError:  # botocore follows each redirection inside the one before
                final = StorageError(
                    f"{where} cannot be reached: {self._server()} redirects every request. Check"
                    " that AWS_ENDPOINT_URL is the address of an S3 server."
                )
            else:
                self._reached, self._warned = True, False
                return result
            if final is not None:
                raise final  # outside of the handler, so that the library's error is not chained
            longest = min(LONGEST_WAIT_S, FIRST_WAIT_S * 2 ** (failures - 1))
            time.sleep(secrets.SystemRandom().uniform(0.0, longest))  # differs in forked processes

    def _warn_once(self, failure: Exception) -> None:
        if not self._warned:
            self._warned = True
            log.warning("%s Retrying for up to %.0f min.", failure, self.patience / 60)

    def _server(self) -> str:
        """Return the server's host and port; the rest of its address may hold a password."""
        address = urlsplit(self.client.meta.endpoint_url)
        return f"{address.hostname}:{address.port}" if address.port else str(address.hostname)


def _check_endpoint(endpoint: str, bucket: str) -> None:
    """Raise StorageError if the server's address has the bucket in it: it would count twice."""
    address = urlsplit(endpoint)
    below = (address.hostname or "").removeprefix(f"{bucket.lower()}.")
    of_cloud = re.match(r"s3[.-]|storage\.", below) or below.endswith(_CLOUDS)
    in_host = below != address.hostname and of_cloud
    if in_host or bucket in address.path.split("/"):
        raise StorageError(
            f"AWS_ENDPOINT_URL has the bucket {bucket!r} in it. Give only the server, such as"
            " https://s3.example.com; the bucket is in the s3:// address."
        )


def new_client(timeout: float | None = None) -> Any:
    """Return a boto3 client. Raises StorageError if the AWS settings cannot be used.

    `timeout` limits the seconds of a request: half for the connection, half for the answer.
    """
    if wrong := wrong_variable(S3):
        raise StorageError(wrong)
    bundle = os.environ.get("AWS_CA_BUNDLE")
    if bundle and not os.path.exists(bundle):
        raise StorageError(
            f"AWS_CA_BUNDLE names {bundle}, which does not exist: correct the path, or unset it."
        )
    import boto3
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError

    config = Config(
        retries={"total_max_attempts": 1, "mode": "standard"},  # `send` retries
        connect_timeout=CONNECT_TIMEOUT_S if timeout is None else timeout / 2,
        read_timeout=READ_TIMEOUT_S if timeout is None else timeout / 2,
        max_pool_connections=32,
        tcp_keepalive=True,
        # Servers other than AWS refuse or damage the newer default checksums.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    try:
        return boto3.session.Session().client("s3", config=config)
    except BotoCoreError as error:
        reason = f"({type(error).__name__})"
    except ValueError:
        reason = "because the address of the server is malformed"
    raise StorageError(
        f"the AWS settings cannot be used {reason}. Check AWS_ENDPOINT_URL (http://HOST:PORT),"
        " AWS_PROFILE, the credentials and ~/.aws."
    )
