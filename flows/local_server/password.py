"""The password of the servers that `dpnet up` starts, and how a browser gets it.

`data_prep/core/password_file.py` keeps it in the folder of `dpnet up`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from urllib.parse import quote

from data_prep.core.password_file import stored_password
from dpnet.serving.login import login_address

PASSWORD, SERVER_PASSWORD = "PREFECT_API_AUTH_STRING", "PREFECT_SERVER_API_AUTH_STRING"
LOGIN = "/login"  # the page that gives the browser the password


def users_own(environ: Mapping[str, str]) -> str:
    """Return the `user:password` that the user has set, or an empty string."""
    return environ.get(PASSWORD) or environ.get(SERVER_PASSWORD, "")


def login_url(ui_url: str, home: Path, environ: Mapping[str, str]) -> str:
    """Return the address that logs a browser in to Prefect's pages.

    The password is after the `#`, which no browser sends to a server. A password that the user has
    set is not shown: Prefect's page asks for it.
    """
    kept = None if users_own(environ) else stored_password(home)
    return ui_url if kept is None else f"{ui_url}{LOGIN}#{quote(kept, safe=':')}"


def serve_login_url(url: str | None, home: Path, environ: Mapping[str, str]) -> str | None:
    """Return the address that logs a browser in to the page that fills photos, None without it."""
    kept = None if users_own(environ) else stored_password(home)
    return url if url is None or kept is None else login_address(url, kept.partition(":")[2])
