"""Run the server of `dpnet serve` until a signal."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable, Collection
from typing import NamedTuple

from data_prep.core.errors import ConfigError, PipelineError
from data_prep.core.password_file import keep_password
from data_prep.core.paths import cache_folder
from data_prep.core.storage.store import Store
from data_prep.core.web_guard import SERVER_NAMES, is_loopback
from dpnet.serving.limits import ServeLimits
from dpnet.serving.login import TOKEN, login_address
from dpnet.serving.models import Models, Registry, Source
from dpnet.serving.votes import Votes

PORT = 8400  # tried first; ours
SHORTEST_TOKEN = 16
_FOLDER = "serve"  # in this user's cache
_CONNECTIONS = 256  # at once; ours
_STORAGE_S = 5.0  # for a request to S3 at the start
_GRACE_S = 2  # for open requests when the server ends

log = logging.getLogger(__name__)


class Address(NamedTuple):
    """The address of a server, and the token that it asks for.

    Attributes:
        url: its address.
        login_url: the address that logs a browser in; `url` if no token is needed, or the user
            has set it.
        token: the token, or "".
        names: its names for other machines.
        by_number: `login_url` with a number in place of this machine's name, which other machines
            may not know; or "".
    """

    url: str
    login_url: str
    token: str
    names: tuple[str, ...]
    by_number: str = ""


def address_of(listener: socket.socket, host: str) -> Address:
    """Return the address of a server.

    Args:
        listener: the socket that it listens on.
        host: the address or the name that the user gave.

    Raises:
        ConfigError: the token in the environment cannot be used.
    """
    port = listener.getsockname()[1]
    loopback = is_loopback(listener.getsockname()[0])
    names = tuple(filter(None, os.environ.get(SERVER_NAMES, "").split(",")))
    others = bool(names) or not loopback
    given = environment_token(others)
    token = given or (keep_password(cache_folder() / _FOLDER).partition(":")[2] if others else "")
    shown = host
    if not loopback:
        names = (*names, host, socket.gethostname(), socket.getfqdn())
        shown = socket.gethostname() if host in ("0.0.0.0", "::") else host
    url = f"http://[{shown}]:{port}" if ":" in shown else f"http://{shown}:{port}"
    # A token that the user has set is not shown: logs of containers keep the output.
    login = login_address(url, token) if token and not given else url
    number = own_number() if host in ("0.0.0.0", "::") else ""
    by_number = login.replace(shown, number, 1) if number else ""
    return Address(url, login, token, names, by_number)


def own_number() -> str:
    """Return this machine's IPv4 address in its network, or ""."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # an address of nobody (RFC 5737); nothing is sent
        except OSError:
            return ""
        return str(probe.getsockname()[0])


def environment_token(others: bool) -> str:
    """Return the token that the user has set, or "".

    Args:
        others: whether other machines reach the server.

    Raises:
        ConfigError: it cannot be used.
    """
    given = os.environ.pop(TOKEN, "")  # no child process needs it
    short = others and len(given) < SHORTEST_TOKEN
    if given and (short or not (given.isascii() and given.isprintable())):
        raise ConfigError(
            f"{TOKEN} cannot be used: set it to at least {SHORTEST_TOKEN} letters and digits."
        )
    return given


def warn_without_model(models: Models) -> None:
    """Log a warning if no version can answer yet."""
    if models.look() is None:
        log.warning("no photo can be filled yet: %s The server looks again.", models.problem)


def why_unwritable(source: Source, check: Callable[[Store], None]) -> str:
    """Return why the root of a source cannot be written, or "".

    Args:
        source: where the versions come from.
        check: raises PipelineError if a root cannot be written.
    """
    if not isinstance(source, Registry):
        return ""
    try:
        check(source.store.hurried(_STORAGE_S))
    except PipelineError as error:
        return f"no vote can be kept: {error}"
    return ""


def run_server(
    models: Models,
    listener: socket.socket,
    address: Address,
    limits: ServeLimits,
    unwritable: str,
) -> None:
    """Serve until a signal.

    Args:
        models: that it uses.
        listener: the socket to listen on.
        address: of this server.
        limits: of requests.
        unwritable: why votes cannot be kept, or "".
    """
    import uvicorn

    from dpnet.serving.app import Service, guarded_app
    from dpnet.serving.protocol import PatientProtocol

    service = Service(models, limits, Votes(models.source, unwritable))
    port = listener.getsockname()[1]
    names: Collection[str] = address.names
    config = uvicorn.Config(
        guarded_app(service, port, token=address.token, names=names),
        http=PatientProtocol,
        ws="none",
        log_config=None,
        log_level="error",
        access_log=False,
        server_header=False,
        limit_concurrency=_CONNECTIONS,
        timeout_graceful_shutdown=_GRACE_S,
    )

    class Server(uvicorn.Server):
        """A server that ends its jobs before it waits for their answers."""

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            service.work.end()
            # uvicorn logs a traceback for each answer that it cuts off, as of a client that does
            # not read. That is no error when the server ends.
            logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
            await super().shutdown(sockets)

    try:
        Server(config).run(sockets=[listener])
    finally:
        # Python aborts if a thread still computes when it ends. A second signal ends it at once.
        service.work.stop()
