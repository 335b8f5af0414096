"""The files of the embedded server, without the server."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from flows.local_server import server
from flows.local_server.server import embedded_server


def test_only_the_user_may_use_the_files_of_the_embedded_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write_log(listener: Any) -> list[str]:
        code = "open('made', 'w').close(); print('log', flush=True); input()"
        return [sys.executable, "-c", code]

    def wait(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
        while not log.read_text():
            assert process.poll() is None

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(server, "server_command", write_log)
    monkeypatch.setattr(server, "_wait_until_healthy", wait)
    home = tmp_path / "root" / "prefect"
    home.mkdir(parents=True, mode=0o777)
    before = os.umask(0)
    try:
        with embedded_server(home, os.environ, lambda *_: None):
            found = {path.name: path.stat().st_mode & 0o777 for path in home.iterdir()}
            found["home"] = home.stat().st_mode & 0o777
            found["made"] = (tmp_path / "made").stat().st_mode & 0o777
    finally:
        os.umask(before)
    files = dict.fromkeys(("created", "lock", "made", "server.log"), 0o600)
    assert found == {"home": 0o700, "storage": 0o700, **files}
