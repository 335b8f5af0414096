"""Measure the memory that some code takes, in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

# The highest memory of this process alone: `getrusage` begins with the memory of its parent.
_PEAK = """
import sys
def peak():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
"""


def growth(imports: str, code: str, *arguments: object) -> tuple[float, str]:
    """Run code in a new process. Return the growth of its memory in MB, and what it printed.

    Args:
        imports: Lines that run before the memory is measured for the first time.
        code: Lines that are measured. They find the arguments in `sys.argv[1:]`.
        arguments: Arguments of the process.
    """
    if not Path("/proc/self/status").exists():
        pytest.skip("needs /proc")
    text = f"{_PEAK}\n{imports}\nbefore = peak()\n{code}\nprint('\\n' + str(peak() - before))"
    done = subprocess.run(
        [sys.executable, "-c", text, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    printed, _, grown = done.stdout.rstrip().rpartition("\n")
    return int(grown) / 1024, printed.strip()
