"""The password of the servers that `dpnet up` starts.

It is made at the first start and kept in the file `password` in the folder of `dpnet up`. Only the
user can read this file. The name of the user is always `dpnet`.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import quote

from data_prep.core.errors import ConfigError
from data_prep.core.private_files import create_private, private_folder

USER = "dpnet"
PASSWORD, SERVER_PASSWORD = "PREFECT_API_AUTH_STRING", "PREFECT_SERVER_API_AUTH_STRING"
LOGIN = "/login"  # the page that gives the browser the password
_FILE = "password"


def password_file(home: Path) -> Path:
    """Return the file of the password in the folder of a `dpnet up`."""
    return home / _FILE


def new_password() -> str:
    """Return a new random `user:password`."""
    return f"{USER}:{secrets.token_urlsafe(24)}"


def users_own(environ: Mapping[str, str]) -> str:
    """Return the `user:password` that the user has set, or an empty string."""
    return environ.get(PASSWORD) or environ.get(SERVER_PASSWORD, "")


def stored_password(home: Path) -> str | None:
    """Return the stored `user:password`, or None if there is none.

    Raises:
        ConfigError: The file was changed to something else.
    """
    try:
        kept = password_file(home).read_text("ascii", "replace").strip()
    except FileNotFoundError:
        return None
    if not re.fullmatch(r"[!-9;-~]{16,}", kept):
        raise ConfigError(
            f"{password_file(home)} has no usable password: it must be one line of at least 16"
            " characters. Delete the file, and the next `dpnet up` makes a new password."
        )
    return f"{USER}:{kept}"


def keep_password(home: Path) -> str:
    """Return the stored `user:password`; make and store one at the first start."""
    private_folder(home)
    if (found := stored_password(home)) is not None:
        return found
    made = new_password()
    create_private(password_file(home), made.partition(":")[2].encode() + b"\n")
    return stored_password(home) or made


def login_url(ui_url: str, home: Path, environ: Mapping[str, str]) -> str:
    """Return the address that logs a browser in to Prefect's pages.

    The password is after the `#`, which no browser sends to a server. A password that the user has
    set is not shown: Prefect's page asks for it.
    """
    kept = None if users_own(environ) else stored_password(home)
    return ui_url if kept is None else f"{ui_url}{LOGIN}#{quote(kept, safe=':')}"
