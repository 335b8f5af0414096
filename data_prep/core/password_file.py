"""A password that is made once and kept in a private file: of `dpnet up` and of `dpnet serve`.

It is made at the first start and kept in the file `password` of a folder. Only the user can read
this file. The name of the user is always `dpnet`.
"""

from __future__ import annotations

import re
import secrets
from pathlib import Path

from data_prep.core.errors import ConfigError
from data_prep.core.private_files import create_private, private_folder

USER = "dpnet"
_FILE = "password"


def password_file(home: Path) -> Path:
    """Return the file of the password in a folder."""
    return home / _FILE


def new_password() -> str:
    """Return a new random `user:password`."""
    return f"{USER}:{secrets.token_urlsafe(24)}"


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
            " characters. Delete the file, and the next start makes a new password."
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
