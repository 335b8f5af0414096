"""Keep SQLite databases off network disks: their locks are not reliable, so SQLite loses data."""

from __future__ import annotations

import os
import re
from pathlib import Path

from data_prep.core.errors import ConfigError
from data_prep.core.paths import cache_folder
from data_prep.core.storage.store import Store

MOUNTS = Path("/proc/mounts")
_NETWORK = re.compile(
    r"nfs\d?|cifs|smb3|smbfs|afs|ceph|lustre|beegfs|gpfs|glusterfs|davfs|fuse\.(?!fuse-overlayfs).*"
)
_OCTAL = re.compile(r"\\([0-7]{3})")  # how a blank in the path of a mount is written
_SQLITE = re.compile(r"sqlite(?:\+\w+)?:///(?P<path>[^?]+)")
ADVICE = "Set XDG_CACHE_HOME to a folder on a disk of this machine"


def network_disk(path: Path) -> str:
    """Return the type of the network disk that has `path`, such as "nfs4"; "" for other disks."""
    try:
        lines = MOUNTS.read_text("utf-8", "surrogateescape").splitlines()
    except OSError:  # not Linux
        return ""
    path, found, deepest = Path(os.path.realpath(path.expanduser())), "", -1
    for line in lines:
        _, mount, kind, *_ = line.split(" ")
        top = Path(_OCTAL.sub(lambda each: chr(int(each[1], 8)), mount))
        if path.is_relative_to(top) and len(top.parts) >= deepest:  # a later mount hides others
            found, deepest = kind, len(top.parts)
    return found if _NETWORK.fullmatch(found) else ""


def local_top(store: Store) -> Path | None:
    """Return the folder of a root that can have databases; None on S3 and on a network disk."""
    top = store.local_folder
    return None if top is None or network_disk(top) else top


def database_cache() -> Path:
    """Return this user's folder for the databases of roots that cannot have them."""
    usual, other = cache_folder(), os.environ.get("XDG_CACHE_HOME")
    return Path(other) / usual.name if other and network_disk(usual) else usual


def refuse_network_disk(place: Path | str, what: str, advice: str = ADVICE) -> None:
    """Check that a database is on a disk of this machine.

    Args:
        place: its file or folder, or its address; a server's address is accepted.
        what: its name for the message.
        advice: what to do, without a full stop.

    Raises:
        ConfigError: it is on a network disk.
    """
    if isinstance(place, str):
        sqlite = _SQLITE.match(place)
        if sqlite is None:
            return
        place = Path(sqlite["path"])
    if kind := network_disk(place):
        raise ConfigError(
            f"{what} cannot be {place}: this is on a network disk ({kind}), where SQLite loses"
            f" data. {advice}."
        )
