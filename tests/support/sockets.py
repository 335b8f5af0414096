"""The sockets that processes listen on, read from /proc."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

_LISTEN = "0A"  # the state in /proc/net/tcp


def listening(pids: Iterable[int]) -> set[str]:
    """Return the addresses that the processes listen on, such as "127.0.0.1:4200"."""
    found = set()
    for pid in pids:
        with suppress(OSError):  # the process has ended
            own = _open_files(pid)
            for table, family in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
                for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
                    words = line.split()
                    if words[3] == _LISTEN and f"socket:[{words[9]}]" in own:
                        found.add(_readable(words[1], family))
    return found


def _open_files(pid: int) -> set[str]:
    found = set()
    for file in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(OSError):  # closed since
            found.add(os.readlink(file))
    return found


def _readable(text: str, family: socket.AddressFamily) -> str:
    """Return the address that the kernel writes in words of 32 bits in the machine's order."""
    number, _, port = text.partition(":")
    words = [number[i : i + 8] for i in range(0, len(number), 8)]
    packed = b"".join(bytes.fromhex(word)[::-1] for word in words)
    address = socket.inet_ntop(family, packed).removeprefix(
        "::ffff:"
    )  # of IPv4, in a socket of IPv6
    return f"{address}:{int(port, 16)}"


def interfaces(pids: Iterable[int]) -> set[str]:
    """Return the addresses of the interfaces that the processes listen on, without the ports."""
    return {address.rpartition(":")[0] for address in listening(pids)}
