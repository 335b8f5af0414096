"""Processes and threads that want the same lease."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

from data_prep.core.lease import Lease
from data_prep.core.storage.open import open_store

INTERVAL_S = 1.0
# It works until it notices the loss, and writes after each piece of work.
HOLDER = """
import sys, time
from data_prep.core.errors import LeaseLostError
from data_prep.core.lease import Lease, check_leases
from data_prep.core.storage.open import open_store

try:
    with Lease(open_store(sys.argv[1]), sys.argv[2], interval=float(sys.argv[3])):
        print("held", flush=True)
        while True:
            time.sleep(0.02)
            check_leases()
            print("works", flush=True)
except LeaseLostError as error:
    print("lost", error, flush=True)
"""


def contend(root: str, key: str, *, runners: int, interval: float) -> int:
    """Let threads want the same lease at once. Return how many held it together at most."""
    lock = threading.Lock()
    inside = most = entered = 0
    start = threading.Barrier(runners)

    def run(_: int) -> None:
        nonlocal inside, most, entered
        store = open_store(root)
        start.wait()
        with Lease(store, key, interval=interval) as lease:
            with lock:
                inside += 1
                entered += 1
                most = max(most, inside)
            time.sleep(0.2)
            lease.check()
            with lock:
                inside -= 1

    with ThreadPoolExecutor(runners) as pool:
        list(pool.map(run, range(runners)))
    assert entered == runners
    return most


def killed_holder(root: str, key: str) -> int:
    """Kill a process that holds a lease, with two waiters. Return how many held it together."""
    command = [sys.executable, "-c", HOLDER, root, key, "600"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        waiters = ThreadPoolExecutor(1).submit(contend, root, key, runners=2, interval=600)
        time.sleep(1)
        assert not waiters.done()
        process.kill()
    return waiters.result(120)  # far less than three intervals: its end was seen


def stopped_holder(root: str, key: str) -> None:
    """Stop a process that holds a lease, take the lease over, and let the process continue."""
    store = open_store(root)
    command = [sys.executable, "-c", HOLDER, root, key, str(INTERVAL_S)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "held\n"
            time.sleep(4 * INTERVAL_S)  # its heartbeats keep it
            assert process.poll() is None
            os.kill(process.pid, signal.SIGSTOP)
            with Lease(store, key, interval=INTERVAL_S) as lease:
                assert lease.attempt == 2
                os.kill(process.pid, signal.SIGCONT)
                out, _ = process.communicate(timeout=20)
                said = out.splitlines()
                assert process.returncode == 0
                assert said[-1].startswith("lost ")
                lease.check()
                record = json.loads(store.read(key))
                assert record["pid"] == os.getpid()
                assert not record.get("released")
        finally:
            process.kill()
