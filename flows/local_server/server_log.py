"""Why Prefect's server did not start, in one sentence, from what it wrote in its log."""

from __future__ import annotations

import re

_ANOTHER = "name another database with --database"
# In this order: what stands first is the cause of what stands below.
_CAUSES = (
    (
        r"Can't locate revision",
        "belongs to another version of Prefect: install that version again, or {mend}",
    ),
    (r"file is not a database|disk image is malformed", "is damaged: {mend}"),
    (r"database or disk is full|No space left", "cannot grow, the disk is full: free some space"),
    (
        r"readonly database|unable to open database file",
        "cannot be written: change its permissions, or {mend}",
    ),
    (
        r"InvalidPasswordError|InvalidAuthorizationSpecificationError",
        "refuses the user or the password: check the URL",
    ),
    (r"InvalidCatalogNameError", "does not exist: create it, or {mend}"),
    (
        r"pg_trgm|InsufficientPrivilegeError",
        "does not let its user set it up: let an administrator run CREATE EXTENSION pg_trgm in it"
        " and make the user its owner",
    ),
    (
        r"ConnectionRefusedError|Connect call failed|gaierror|TimeoutError|ConnectionResetError"
        r"|ConnectionDoesNotExistError|CannotConnectNowError|TooManyConnectionsError",
        "cannot be reached: start it, or {mend}",
    ),
)


def explain(log: str, database: str) -> str | None:
    """The sentence for a server's log; None where the cause is none that is known.

    `database` is a file's path or a URL; of a URL, no user, password or option is repeated.
    """
    where = public_database(database)
    mend = _ANOTHER if "://" in database else "move it away, to begin with an empty one"
    for pattern, what in _CAUSES:
        if re.search(pattern, log):
            return f"the Prefect database {where} {what.format(mend=mend)}."
    return None


def public_database(url: str) -> str:
    """A database's URL without user, password and options; a path as it is."""
    return re.sub(r"\?.*", "", re.sub(r"//.*@", "//", url)) if "://" in url else url
