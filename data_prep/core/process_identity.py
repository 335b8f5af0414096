"""Identify a process by boot, number and start time, to know whether it is still running.

The system uses a process number again after a while. Together with the boot and the start time it
is unique.
"""

from __future__ import annotations

import os
from pathlib import Path


def boot() -> str:
    """Return an id of the running kernel and of the process namespace (the container).

    It is the empty string on a system without /proc.
    """
    try:
        kernel = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{kernel}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def process_start(pid: int) -> str:
    """Return the start time of a process in kernel ticks; an empty string if it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]
