"""Processes of a flow run and who is beside them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

TALKER = """
import sys, time
from pathlib import Path
from rich.console import Console
from flows.local_server.process_tree import outlive_reader
console = Console(file=sys.stderr)
outlive_reader()
console.print("first")
sys.stdin.read()
deadline = time.monotonic() + 30
while Path("/proc/self/fd/2").readlink() != Path("/dev/null") and time.monotonic() < deadline:
    time.sleep(0.01)
console.print("second")
Path(sys.argv[1]).write_text("done")
"""


def test_a_process_whose_reader_dies_goes_on(tmp_path: Path) -> None:
    done = tmp_path / "done"
    reader, writer = os.pipe()
    talker = subprocess.Popen(
        [sys.executable, "-c", TALKER, str(done)],
        stdin=subprocess.PIPE,
        stdout=writer,
        stderr=writer,
    )
    os.close(writer)
    assert os.read(reader, 100) == b"first\n"
    os.close(reader)
    talker.communicate(timeout=60)
    assert talker.returncode == 0
    assert done.read_text() == "done"
