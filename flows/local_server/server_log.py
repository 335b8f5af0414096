"""One sentence from a server's log that says why Prefect's server did not start."""

from __future__ import annotations

import re

from data_prep.core.redact import redact

_ANOTHER = "name another database with --database"
# The order matters: an earlier cause can produce the messages of a later one.
_CAUSES = (
    (
        r"Can't locate revision",
        "belongs to another version of Prefect: install that version again, or {remedy}",
    ),
    (r"file is not a database|disk image is malformed", "is damaged: {remedy}"),
    (
        r"database or disk is full|No space left",
        "cannot grow because the disk is full: free some space",
    ),
    (
        r"readonly database|unable to open database file",
        "cannot be written: change its permissions, or {remedy}",
    ),
    (
        r"InvalidPasswordError|InvalidAuthorizationSpecificationError",
        "refuses the user or the password: check the URL",
    ),
    (r"InvalidCatalogNameError", "does not exist: create it, or {remedy}"),
    (
        r"pg_trgm|InsufficientPrivilegeError",
        "cannot be set up by its user: let an administrator run CREATE EXTENSION pg_trgm in it"
        " and make the user its owner",
    ),
    (
        r"ConnectionRefusedError|Connect call failed|gaierror|TimeoutError|ConnectionResetError"
        r"|ConnectionDoesNotExistError|CannotConnectNowError|TooManyConnectionsError",
        "cannot be reached: start it, or {remedy}",
    ),
)


def explain_failure(log: str, database: str) -> str | None:
    """Return a sentence that explains the failure in `log`, or None if the cause is unknown.

    Args:
        log: The text of the server's log.
        database: The path or the URL of its database. The sentence leaves out the user, the
            password and the options of a URL.
    """
    where = public_database(database)
    remedy = _ANOTHER if "://" in database else "move it away to start with an empty one"
    for pattern, problem in _CAUSES:
        if re.search(pattern, log):
            return f"the Prefect database {where} {problem.format(remedy=remedy)}."
    return None


def public_database(url: str) -> str:
    """Return a URL without user, password and options, and a path unchanged."""
    return redact(url).partition("?")[0] if "://" in url else url
