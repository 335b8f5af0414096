"""Settings and fixtures of all tests: one thread a process, S3 servers, logging."""

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from examples import use_profile
from kube_server import KubeServer, kube_server
from policy import (  # noqa: F401 - hooks of pytest
    pytest_collection,
    pytest_collection_modifyitems,
    pytest_configure,
    pytest_make_collect_report,
    pytest_runtest_makereport,
    pytest_runtest_protocol,
    pytest_xdist_make_scheduler,
)
from servers import Server, ceph_server, moto_server

from data_prep.core.environment import THREADS
from data_prep.core.logs import PACKAGES
from data_prep.core.pool import run_tasks

os.environ.setdefault("OMP_NUM_THREADS", "1")  # with small tensors, more threads only wait
os.environ.update({**THREADS, **os.environ})
use_profile()
os.environ.pop("MLFLOW_TRACKING_URI", None)  # the user's MLflow gets nothing from tests


@pytest.fixture(scope="session")
def moto() -> Iterator[Server]:
    """Start moto's server with an empty bucket, for all tests of the process."""
    with moto_server() as server:
        server.make_bucket()
        yield server


@pytest.fixture(scope="session")
def ceph() -> Iterator[Server]:
    """Start a real Ceph with an empty bucket, or skip the test. For tests marked `slow`."""
    with ceph_server() as server:
        server.make_bucket()
        yield server


@pytest.fixture(scope="session")
def kubernetes_api() -> Iterator[KubeServer]:
    """Start a real Kubernetes API server, or skip the test. For tests marked `slow`."""
    with kube_server() as server:
        yield server


@pytest.fixture
def moto_root(moto: Server, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return the URI of an empty prefix on moto, and point this test's AWS settings to it."""
    moto.use(monkeypatch)
    return moto.fresh_root()


@pytest.fixture
def s3_root(ceph: Server, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return an empty prefix on a real server, which has rights, durability and races."""
    ceph.use(monkeypatch)
    return ceph.fresh_root()


@pytest.fixture(autouse=True)
def _decode_in_this_process(request: pytest.FixtureRequest) -> Iterator[None]:
    """Let unit tests decode photos in their own process, because a worker takes a second."""
    with pytest.MonkeyPatch.context() as patch:
        if request.path.is_relative_to(Path(__file__).parent / "unit"):
            patch.setattr("data_prep.images.build.run_apart", run_tasks)
            patch.setattr("data_prep.masks.read_files.run_apart", run_tasks)
        yield


@pytest.fixture(autouse=True)
def _logging_as_before() -> Iterator[None]:
    """Let `caplog` see our records from INFO, and undo the logging of a tested command."""
    loggers = [logging.getLogger(name) for name in PACKAGES]
    before = [(each, each.level, each.propagate, list(each.handlers)) for each in loggers]
    for each in loggers:
        each.setLevel(logging.INFO)
    yield
    for each, level, propagate, handlers in before:
        each.setLevel(level)
        each.propagate, each.handlers[:] = propagate, handlers
