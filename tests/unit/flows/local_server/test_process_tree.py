"""A process that outlives the reader of its output."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

WRITER = """
import sys, time
from pathlib import Path
from rich.console import Console
from flows.local_server.process_tree import survive_closed_output
console = Console(file=sys.stderr)
survive_closed_output()
console.print("first")
sys.stdin.read()
deadline = time.monotonic() + 30
while Path("/proc/self/fd/2").readlink() != Path("/dev/null") and time.monotonic() < deadline:
    time.sleep(0.01)
console.print("second")
Path(sys.argv[1]).write_text("done")
"""


def test_a_process_keeps_running_after_the_reader_of_its_output_dies(tmp_path: Path) -> None:
    done = tmp_path / "done"
    reader, writer = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(done)],
        stdin=subprocess.PIPE,
        stdout=writer,
        stderr=writer,
    )
    os.close(writer)
    assert os.read(reader, 100) == b"first\n"
    os.close(reader)
    process.communicate(timeout=60)
    assert process.returncode == 0
    assert done.read_text() == "done"
