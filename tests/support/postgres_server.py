"""A PostgreSQL server for tests."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from clusters import alive, end_with_parent, family, free_port, wait_until


@contextmanager
def postgres(*databases: str) -> Iterator[int]:
    """Run PostgreSQL with the user `dpnet` and password `hunter2`. Yield its port.

    Args:
        databases: Names of the databases; one with the name `dpnet` by default.
    """
    programs = {name: shutil.which(name) for name in ("initdb", "postgres", "psql")}
    for found in sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True):
        programs |= {k: str(found / k) for k, v in programs.items() if v is None}
    if missing := [k for k, v in programs.items() if v is None or not Path(v).exists()]:
        pytest.skip(f"PostgreSQL is not installed ({', '.join(missing)})")
    as_other = ["runuser", "-u", "nobody", "--"] if os.getuid() == 0 else []
    folder = Path(tempfile.mkdtemp(prefix="dpnet-pg-", dir="/tmp"))
    if as_other:
        shutil.chown(folder, "nobody")
    port = free_port()
    (folder / "password").write_text("hunter2")
    (folder / "password").chmod(0o644)
    make = [
        str(programs["initdb"]),
        "-D",
        str(folder / "data"),
        "-U",
        "dpnet",
        "-A",
        "scram-sha-256",
    ]
    make += [f"--pwfile={folder}/password", "-E", "UTF8", "--locale=C", "--no-sync"]
    subprocess.run([*as_other, *make], check=True, capture_output=True, cwd=folder)
    serve = [str(programs["postgres"]), "-D", str(folder / "data"), "-p", str(port)]
    serve += ["-k", str(folder), "-h", "127.0.0.1"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [*as_other, *serve], stdout=log, stderr=log, cwd=folder, preexec_fn=end_with_parent
        )
    create = [str(programs["psql"]), "-h", "127.0.0.1", "-p", str(port), "-U", "dpnet"]
    create += ["-d", "postgres"]
    for name in databases or ("dpnet",):
        create += ["-c", f"create database {name}"]

    def created() -> bool:
        assert process.poll() is None, (folder / "log").read_text()
        env = {**os.environ, "PGPASSWORD": "hunter2"}
        return subprocess.run(create, env=env, capture_output=True).returncode == 0

    try:
        wait_until(created, f"the database does not start: {folder}")
        yield port
    finally:
        for pid in reversed(family(process.pid)):
            os.kill(pid, signal.SIGINT) if alive(pid) else None
        process.wait(30)
        shutil.rmtree(folder, ignore_errors=True)
