"""One thread for each test process: on small tensors more threads only wait for one another.

And the S3 servers, which every test that wants one shares.
"""

import logging
import os
from collections.abc import Iterator

import pytest
from policy import (  # noqa: F401 - hooks of pytest
    pytest_collection_modifyitems,
    pytest_make_collect_report,
    pytest_runtest_makereport,
)
from servers import Server, ceph_server, moto_server

from data_prep.core.logs import PACKAGES

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.pop("MLFLOW_TRACKING_URI", None)  # nothing is tracked outside of a test


@pytest.fixture(scope="session")
def moto() -> Iterator[Server]:
    """moto's server with an empty bucket."""
    with moto_server() as server:
        server.make_bucket()
        yield server


@pytest.fixture(scope="session")
def ceph() -> Iterator[Server]:
    """A real Ceph with an empty bucket; skips where there is none. For tests marked `slow`."""
    with ceph_server() as server:
        server.make_bucket()
        yield server


@pytest.fixture
def moto_root(moto: Server, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URI of a fresh prefix on moto, with this test's AWS settings leading there."""
    moto.use(monkeypatch)
    return moto.fresh_root()


@pytest.fixture
def s3_root(ceph: Server, monkeypatch: pytest.MonkeyPatch) -> str:
    """The same on a real server, with rights, durability and races."""
    ceph.use(monkeypatch)
    return ceph.fresh_root()


@pytest.fixture(autouse=True)
def _logging_as_before() -> Iterator[None]:
    """Let `caplog` see our records from INFO, and undo what a command under test has set up."""
    loggers = [logging.getLogger(name) for name in PACKAGES]
    before = [(each, each.level, each.propagate, list(each.handlers)) for each in loggers]
    for each in loggers:
        each.setLevel(logging.INFO)
    yield
    for each, level, propagate, handlers in before:
        each.setLevel(level)
        each.propagate, each.handlers[:] = propagate, handlers
