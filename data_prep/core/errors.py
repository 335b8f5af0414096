"""Errors a user can act on.

Every message is one sentence that names the thing and says what to do. The command prints it
without a traceback and exits 1; anything else that escapes is a bug and shows its traceback.
"""

from __future__ import annotations

import errno
import os


class PipelineError(Exception):
    """A failure that the user can act on."""


class ConfigError(PipelineError):
    """A config value that cannot be used; the message names the option and its allowed range."""


class StorageError(PipelineError):
    """Storage did not do what it was asked; what was committed before stays."""


class LeaseLostError(PipelineError):
    """Another runner has taken this stage over, so this one may no longer commit."""


class ItemError(Exception):
    """One item of a source cannot be used, by a fault of its own; the message is the reason.

    It is recorded as that item's failure. What may pass (network, rights, a full disk) is a
    `PipelineError` instead, and ends the build.
    """


_OS_ADVICE = {
    errno.ENOSPC: "the disk is full: free some space and run the same command again, it resumes",
    errno.EDQUOT: "the disk quota is used up: free some space and run the same command again",
    errno.EROFS: "it is on a read-only file system: choose another --root",
    errno.EACCES: "permission denied: choose another --root or change its permissions",
    errno.EPERM: "not permitted: choose another --root or change its permissions",
    errno.ENOTDIR: "a file stands where a folder is needed: choose another --root or move the file",
    errno.EEXIST: "a file stands where a folder is needed: choose another --root or move the file",
    errno.EISDIR: "a folder stands where a file is needed: move it away",
    errno.ENAMETOOLONG: "the path is too long: choose a shorter --root",
}


def storage_error_in(text: str, where: str) -> StorageError | None:
    """The same for an error that came from another process as text, where it is one of storage."""
    for code in _OS_ADVICE:
        if os.strerror(code) in text:
            return storage_error(OSError(code, os.strerror(code)), where)
    return None


def storage_error(error: OSError, where: str) -> StorageError:
    """The sentence for an operating system error met while using `where`."""
    code = error.errno if error.errno is not None else -1
    advice = _OS_ADVICE.get(code, f"{error.strerror or error}")
    return StorageError(f"cannot use {where}: {advice}.")
