"""Decide which HTTP requests a server on this machine may answer.

A server on the loopback address is not private. Every page in the user's browser can send it
requests, a domain name can be pointed at it (DNS rebinding), and every user of the machine can
reach its port. The functions here are pure; `data_prep/core/asgi_guard.py` (Prefect, MLflow, `dpnet
serve`) and `dpnet/pipeline/exporter.py` apply them.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import ipaddress
from collections.abc import Callable, Collection, Mapping, Sequence

Headers = Mapping[str, Sequence[str]]  # all values of each header, by its name in lower case
ASK_PASSWORD = ("WWW-Authenticate", 'Basic realm="dpnet"')
# For every answer: no page of another origin may show it in a frame or load it.
PROTECTIVE = (
    ("X-Frame-Options", "SAMEORIGIN"),
    ("Referrer-Policy", "same-origin"),
    ("X-Content-Type-Options", "nosniff"),
    ("Cross-Origin-Resource-Policy", "same-origin"),
)
WRONG_PASSWORD = "the password is missing or wrong"
REPORTS_PASSWORD = "DPNET_REPORTS_PASSWORD"  # user:password of the exporter, in its environment
SERVER_NAMES = "DPNET_SERVER_NAMES"  # variable: names of a server, with commas between them
_LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
_OWN_PAGES = "this server answers only its own pages"


def is_loopback(address: str) -> bool:
    """Return whether a server that listens on `address` can only be reached from this machine."""
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return address == "localhost"


def own_host(port: int, names: Collection[str] = ()) -> Callable[[str], bool]:
    """Return a check of a `Host` header: does it name this server?

    Args:
        port: The port of a server that listens on the loopback address.
        names: For a server that other machines reach: its names. All ports and all numeric
            addresses are its own then, because only a domain name can be pointed elsewhere.
            Empty for a server on the loopback address.
    """
    own = {f"{name}:{port}" for name in _LOOPBACK}
    others = {name.lower() for name in names}

    def check(host: str) -> bool:
        if host in own:
            return True
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
        return bool(others) and (name in others or name in _LOOPBACK or _is_number(name))

    return check


def _is_number(name: str) -> bool:
    try:
        ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        return False
    return True


def refusal(
    method: str,
    headers: Headers,
    is_own: Callable[[str], bool],
    schemes: Collection[str] = ("http",),
) -> str | None:
    """Return why a request is refused, or None if it may be answered.

    Args:
        method: The method, such as GET.
        headers: The headers of the request.
        is_own: Returns whether a `Host` names this server.
        schemes: Of the server's own pages; with https too behind a proxy that adds TLS.
    """
    hosts = [value.lower() for value in headers.get("host", ())]
    if len(hosts) != 1 or not is_own(hosts[0]):
        return "this server answers only under its own address"
    own = {f"{scheme}://{hosts[0]}" for scheme in schemes}
    if any(value.lower() not in own for value in headers.get("origin", ())):
        return _OWN_PAGES
    if any(v not in ("same-origin", "none") for v in headers.get("sec-fetch-site", ())):
        # The browser says that the page of another site asks. A link that the user follows may be
        # answered: the other page does not see the answer.
        mode = list(headers.get("sec-fetch-mode", ()))
        target = list(headers.get("sec-fetch-dest", ()))
        if method != "GET" or mode != ["navigate"] or target != ["document"]:
            return _OWN_PAGES
    return None


def has_password(headers: Headers, password: str) -> bool:
    """Return whether a request has `user:password` as HTTP basic authentication."""
    given = headers.get("authorization", ())
    return len(given) == 1 and is_password(given[0], password)


def is_password(header: str, password: str) -> bool:
    """Return whether an `Authorization` header carries `password` (as `user:password`)."""
    scheme, _, value = header.partition(" ")
    if scheme.lower() != "basic":
        return False
    try:
        given = base64.b64decode(value.strip(), validate=True)
    except (binascii.Error, ValueError):
        return False
    return hmac.compare_digest(given, password.encode())


def basic_auth(password: str) -> str:
    """Return the `Authorization` header of `user:password`."""
    return "Basic " + base64.b64encode(password.encode()).decode()
