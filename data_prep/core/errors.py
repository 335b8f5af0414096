"""Errors that a user can act on.

Every message says what failed, why, and what to do. The command prints the message without a
traceback. Its exit status is 2 for a ConfigError and 1 for the others. Any other exception is a bug
and is shown with its traceback.
"""

from __future__ import annotations

import errno
import os
import pickle
import re

from data_prep.core.redact import redact
from data_prep.core.text import printable


class _Sentence(Exception):
    """An error with one line of text, in which everything can be shown.

    Messages contain names of files and addresses, and go to terminals, logs and pages. So they
    have no credentials and no characters that cannot be printed.
    """

    def __init__(self, *args: object) -> None:
        super().__init__(*(_one_line(each) if isinstance(each, str) else each for each in args))


def _one_line(text: str) -> str:
    return printable(redact(re.sub(r"\s*[\r\n]\s*", " ", text)))


class PipelineError(_Sentence):
    """A failure that the user can act on."""


class ConfigError(PipelineError):
    """Something that the user wrote cannot be used; the same command would fail again.

    It is an option of a command or of the config, an environment variable, or the name or path of
    something that does not exist. The message names it, and says what is allowed.
    """


class StorageError(PipelineError):
    """Storage refused an operation. Everything committed before it stays."""


class LeaseLostError(PipelineError):
    """Another runner has taken over this stage, so this one may no longer commit."""


class ItemError(_Sentence):
    """One item of a source is itself damaged or unusable. The message is the reason.

    The build records it as a failure of that item and continues. A temporary problem, such as the
    network, permissions or a full disk, is a `PipelineError` instead and ends the build.
    """


def portable(error: BaseException) -> BaseException:
    """Return an error that can be sent to another process: itself, or its text as RuntimeError."""
    try:
        pickle.loads(pickle.dumps(error))  # some cannot be built again from their arguments
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


_FILE_IN_THE_WAY = "there is a file where a folder is needed. Choose another --root or move it"
_OS_ADVICE = {
    errno.ENOSPC: "the disk is full. Free some space and run the same command again. It resumes",
    errno.EDQUOT: "the disk quota is used up. Free some space and run the same command again",
    errno.EROFS: "it is on a read-only file system. Choose another --root",
    errno.EACCES: "permission denied. Choose another --root or change its permissions",
    errno.EPERM: "not permitted. Choose another --root or change its permissions",
    errno.ENOTDIR: _FILE_IN_THE_WAY,
    errno.EEXIST: _FILE_IN_THE_WAY,
    errno.EISDIR: "there is a folder where a file is needed. Move the folder",
    errno.ENAMETOOLONG: "the path is too long. Choose a shorter --root",
}


def storage_error_in(text: str, where: str) -> StorageError | None:
    """Return the storage error that a text from another process names, or None.

    The place is the file in the text, else `where`.
    """
    for code in _OS_ADVICE:
        reason = os.strerror(code)
        if reason in text:
            named = re.search(rf"{reason}: '([^']+)'", text)
            return storage_error(OSError(code, reason), named[1] if named else where)
    return None


def storage_error(error: OSError, where: str) -> StorageError:
    """Return the error to raise for an operating system error in using `where`."""
    code = error.errno if error.errno is not None else -1
    advice = _OS_ADVICE.get(code, f"{error.strerror or error}")
    return StorageError(f"cannot use {where}: {advice}.")
