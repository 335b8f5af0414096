"""The client of a Ray cluster's Jobs API: its address, its token, its errors."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from data_prep.core.environment import WEB_ADDRESS, is_web_address
from data_prep.core.errors import ConfigError, PipelineError
from dpnet.training.settings import LaunchSettings

ADDRESSES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")  # variables that Ray's own commands read
_LONGEST_TOKEN = 10_000  # characters
ANSWER_S = 30.0  # how long to wait for the cluster's answer to a request


def cluster_address(launch: LaunchSettings) -> str:
    """Return the address of the cluster's dashboard. Raises ConfigError if none is given."""
    # RAY_ADDRESS may also name the control service, which takes no jobs.
    given = [launch.address, *(os.environ.get(name, "") for name in ADDRESSES)]
    for address in given:
        if address and is_web_address(address):
            return address
        if address and address == launch.address:
            raise ConfigError(
                f"launch.address is {address!r}: it must be {WEB_ADDRESS}, such as"
                " http://head:8265, the dashboard of a Ray cluster."
            )
    raise ConfigError(
        "launch.address is missing: the launcher ray-job needs the address of a Ray cluster's"
        " dashboard, such as --address http://head:8265."
    )


def connect_client(address: str) -> Any:
    """Return a client of the cluster's Jobs API. Raises PipelineError if it does not answer."""
    from ray.exceptions import AuthenticationError

    own = Path(os.path.expanduser("~/.ray/auth_token"))  # a user may have no home
    try:
        try:
            return _client(address, _token())
        except AuthenticationError:
            if not own.exists():
                raise
            # The user's own token goes only to a cluster that asks for one.
            return _client(address, _token_in(own))
    except AuthenticationError as error:
        raise PipelineError(
            f"the Ray cluster at {address} requires its token ({reason_of(error)}): set"
            f" RAY_AUTH_TOKEN, or write it to {own} or to the file that RAY_AUTH_TOKEN_PATH names."
        ) from error
    except ConfigError:
        raise
    except Exception as error:
        raise PipelineError(
            f"cannot reach a Ray cluster at {address} ({reason_of(error)}): give the address of"
            " its dashboard, such as http://head:8265."
        ) from error


def _token() -> str:
    """Return the token that the user has set for the cluster, or ""."""
    given = os.environ.get("RAY_AUTH_TOKEN", "")
    if not given and (path := os.environ.get("RAY_AUTH_TOKEN_PATH")):
        try:
            given = _token_in(Path(path).expanduser())
        except OSError as error:
            raise ConfigError(
                f"RAY_AUTH_TOKEN_PATH names {path}, which cannot be read ({error.strerror}):"
                " correct the path, or unset it."
            ) from None
    return given


def _token_in(path: Path) -> str:
    """Return the token in a file; the environment may name any file, or a device without end."""
    with path.open(encoding="utf-8", errors="replace") as file:
        return file.read(_LONGEST_TOKEN).strip()


def _client(address: str, token: str) -> Any:
    from ray.job_submission import JobSubmissionClient

    for part in ("job.sdk", "dashboard_sdk"):
        logging.getLogger(f"ray.dashboard.modules.{part}").setLevel(logging.WARNING)

    class Client(JobSubmissionClient):  # type: ignore[misc]
        """Ray's client with a limit to the wait for an answer."""

        def _do_request(self, method: str, endpoint: str, **options: Any) -> Any:
            return super()._do_request(method, endpoint, **options, timeout=ANSWER_S)

    with _no_other_address():
        client = Client(address, headers={"Authorization": f"Bearer {token}"} if token else None)
    client.list_jobs()
    return client


@contextmanager
def _no_other_address() -> Iterator[None]:
    """Hide the addresses in the environment: Ray's client prefers them to its argument."""
    kept = {name: os.environ.pop(name) for name in ADDRESSES if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(kept)


def reason_of(error: BaseException) -> str:
    """Return the short reason inside an error of Ray's client."""
    text = str(error).strip() or type(error).__name__
    if plain := re.search(r"\[Errno -?\d+\] ([\w ]+)|Read (timed out)", text):
        return plain[1] or plain[2]
    return text.splitlines()[0].rstrip(".:")[:200]
