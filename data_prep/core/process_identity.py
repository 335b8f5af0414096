"""Which process wrote something, and whether it is still running: by boot, number and start time.

A process number alone is used again; together with the kernel's start tick and the boot it is not.
"""

from __future__ import annotations

import os
from pathlib import Path


def boot() -> str:
    """The running kernel's id with the process namespace, so that a container is not mistaken.

    Empty where there is no /proc to tell it.
    """
    try:
        kernel = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{kernel}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def process_start(pid: int) -> str:
    """The kernel's start tick of a process, empty if it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]
