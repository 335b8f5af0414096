"""The launchers without Ray: signals, job attempts, and errors."""

from __future__ import annotations

import json
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from lease_thief import OTHER, steal_and_wait

from data_prep.core import lease as lease_module
from data_prep.core.errors import ConfigError, LeaseLostError, PipelineError, StorageError
from data_prep.core.lease import Lease, check_leases
from data_prep.core.storage.local import LocalStore
from dpnet.training.ray import job_driver, workers
from dpnet.training.ray import launch_job as launch_ray_job
from dpnet.training.ray.jobs_client import cluster_address
from dpnet.training.ray.launch import _interruptible_wait
from dpnet.training.ray.launch_job import EXPLAINED, RayJobLauncher
from dpnet.training.ray.ray_train import explain_error
from dpnet.training.settings import LaunchSettings, TrainSettings


def test_a_wait_ends_even_if_the_exception_of_the_stop_was_lost(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lost = []
    monkeypatch.setattr(sys, "unraisablehook", lambda what: lost.append(what.exc_type))

    class Disposed:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with _interruptible_wait() as wait:
            Disposed()
            assert lost == [KeyboardInterrupt]
            with pytest.raises(KeyboardInterrupt):
                wait(60)
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_lost_stop_does_not_count_as_a_second_ctrl_c(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "unraisablehook", lambda what: None)
    ended = []

    def stop(number: int, frame: object) -> None:
        signal.signal(signal.SIGINT, lambda number, frame: ended.append(number))
        raise KeyboardInterrupt

    class Disposed:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGINT)

    before = signal.signal(signal.SIGINT, stop)
    try:
        with _interruptible_wait() as wait:
            Disposed()
            with pytest.raises(KeyboardInterrupt):
                wait(60)
        assert not ended
    finally:
        signal.signal(signal.SIGINT, before)


def test_the_wait_keeps_the_signal_handlers_that_prefect_needs() -> None:
    before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    with _interruptible_wait() as wait:
        wait(0)
        assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == before


def test_the_address_comes_from_the_config_or_else_from_rays_variables(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "http://second:8265")
    assert cluster_address(LaunchSettings()) == "http://second:8265"
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://first:8265")
    assert cluster_address(LaunchSettings()) == "http://first:8265"
    assert cluster_address(LaunchSettings(address="http://own:8265")) == "http://own:8265"


def test_the_address_of_rays_control_service_is_not_a_dashboard(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    with pytest.raises(ConfigError, match=r"launch\.address is missing"):
        cluster_address(LaunchSettings())


class Status(str):
    def is_terminal(self) -> bool:
        return self not in ("PENDING", "RUNNING")


class Client:
    """A cluster's Jobs API: `jobs` by id, each with its status, exit status and log."""

    def __init__(self) -> None:
        self.jobs: dict[str, tuple[str, int | None, str]] = {}
        self.error: Exception | None = None

    def list_jobs(self) -> list[Any]:
        return [
            SimpleNamespace(submission_id=name, status=Status(job[0]))
            for name, job in self.jobs.items()
        ]

    def submit_job(self, *, entrypoint: str, submission_id: str, metadata: Any) -> None:
        self.jobs[submission_id] = ("RUNNING", None, "")

    def get_job_info(self, name: str) -> Any:
        if self.error:
            raise self.error
        if name not in self.jobs:
            raise RuntimeError(f"Request failed with status code 404: no job {name}.")
        status, code, _ = self.jobs[name]
        return SimpleNamespace(status=Status(status), driver_exit_code=code)

    def get_job_logs(self, name: str) -> str:
        return self.jobs[name][2]


class Store:
    uri = "s3://bucket/root"
    written: ClassVar[dict[str, bytes]] = {}

    def write(self, key: str, data: bytes) -> None:
        self.written[key] = data


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> Client:
    client = Client()
    monkeypatch.setattr(launch_ray_job, "connect_client", lambda address: client)
    monkeypatch.setattr(launch_ray_job, "ASK_S", 0.0)
    monkeypatch.setattr(RayJobLauncher, "_show_log", lambda self, job: None)
    return client


def launcher(**launch: Any) -> RayJobLauncher:
    job: Any = SimpleNamespace(to_json=dict, settings=TrainSettings(max_failures=1))
    request = SimpleNamespace(digest="0123456789abcdef")
    work: Any = SimpleNamespace(
        store=Store(), folder="runs/a", request=request, key="runs/a/{}".format
    )
    started = RayJobLauncher(job, LaunchSettings(address="http://head:8265", **launch), work)
    started.start()
    return started


def end(client: Client, attempt: str, status: str, code: int | None = None, log: str = "") -> None:
    client.jobs[attempt] = (status, code, log)


def test_each_attempt_gets_the_next_number_and_a_running_one_is_attached_to(client: Client) -> None:
    first = launcher()
    assert first.attempt == launcher().attempt
    end(client, first.attempt, "STOPPED")
    assert launcher().attempt == f"{first.name}-2"
    assert list(client.jobs) == [f"{first.name}-1", f"{first.name}-2"]


def test_the_facts_are_the_dashboard_and_how_each_attempt_ended(client: Client) -> None:
    job = launcher()
    trains = "trains. Ray dashboard: http://head:8265"
    assert job.facts == [f"The job {job.name}-1 {trains}"]
    end(client, job.attempt, "FAILED", -9, "at work\nKilled.")
    assert job.is_running()
    first = f"The job {job.name}-1 died (Killed.)."
    assert job.facts == [first, f"The job {job.name}-2 {trains}"]
    end(client, job.attempt, "FAILED", EXPLAINED, "the disk is full.")
    with pytest.raises(PipelineError, match=r"^the disk is full\.$"):
        job.is_running()
    assert job.facts == [first, f"The job {job.name}-2 has ended: the disk is full."]


def test_another_root_is_another_job(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    first = launcher()
    monkeypatch.setattr(Store, "uri", "s3://bucket/other")
    assert launcher().name != first.name
    assert len(client.jobs) == 2


def test_a_dead_driver_restarts_up_to_the_allowed_number_of_times(client: Client) -> None:
    started = launcher()
    end(client, started.attempt, "FAILED", -9, "at work\nKilled")
    assert started.is_running()
    assert started.attempt.endswith("-2")
    end(client, started.attempt, "FAILED", -9, "at work\nKilled")
    with pytest.raises(PipelineError, match=r"-2 died \(Killed\), and train.max_failures is 1: "):
        started.is_running()


@pytest.mark.parametrize(
    ("code", "last", "sentence"),
    [
        (EXPLAINED, "the disk is full.", "^the disk is full.$"),
        (127, "sh: 1: python: not found", r"has no dpnet \(sh: 1: python: not found\)"),
        (1, "No module named 'dpnet'", "set launch.python to the interpreter"),
    ],
)
def test_an_error_that_a_restart_cannot_fix_ends_training(
    client: Client, code: int, last: str, sentence: str
) -> None:
    started = launcher()
    end(client, started.attempt, "FAILED", code, f"at work\n{last}\n")
    with pytest.raises(PipelineError, match=sentence):
        started.is_running()
    assert len(client.jobs) == 1


def test_a_job_that_the_cluster_has_forgotten_is_submitted_again(client: Client) -> None:
    started = launcher()
    client.jobs.clear()
    assert started.is_running()
    assert list(client.jobs) == [started.attempt]


def test_a_cluster_without_an_answer_is_asked_until_the_deadline(
    client: Client, caplog: pytest.LogCaptureFixture
) -> None:
    started = launcher(deadline_s=1)
    client.error = ConnectionError(
        "HTTPConnectionPool(host='h'): [Errno 111] Connection refused'))"
    )
    assert started.is_running()
    assert started.is_running()
    told = caplog.text
    assert told.count("does not answer (Connection refused): trying again") == 1
    time.sleep(1.1)
    with pytest.raises(PipelineError, match=r"not answered for 1 s \(Connection refused\)"):
        started.is_running()


class WorkerError(Exception):
    def __init__(self, *failures: Exception) -> None:
        self.worker_failures = dict(enumerate(failures))


def test_the_worker_error_that_a_user_can_act_on_is_shown() -> None:
    collateral = RuntimeError("Connection closed by peer")
    told = explain_error(WorkerError(collateral, StorageError("the disk is full.")), "root")
    assert str(told) == "the disk is full."
    told = explain_error(WorkerError(collateral), "root")
    assert isinstance(told, PipelineError)
    assert "RuntimeError: Connection closed by peer" in str(told)
    full = explain_error(WorkerError(OSError("[Errno 28] No space left on device")), "root")
    assert str(full).startswith("cannot use root: the disk is full")
    other = OSError("[Errno 28] No space left on device: '/tmp/ray/x'")
    told = explain_error(WorkerError(other), "root")
    assert str(told).startswith("cannot use /tmp/ray/x: the disk is full")


@pytest.mark.parametrize(
    ("found", "least", "told"),
    [
        (0, None, r"train\.workers is 4, .*finds 0 GPUs on this machine: leave train\.gpus out"),
        (3, None, r"finds 3 GPUs on this machine: lower train\.workers, leave"),
        (3, 2, None),
    ],
)
def test_missing_gpus_are_reported_before_ray_starts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, found: int, least: int | None, told: str | None
) -> None:
    import ray
    import torch

    from dpnet.training.ray.launch_local import LocalLauncher

    asked: dict[str, Any] = {}

    def init(**options: Any) -> None:
        asked.update(options)
        raise Exception("it is a test.")

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: found)
    settings = SimpleNamespace(workers=4, min_workers=least, gpus=True)
    job: Any = SimpleNamespace(settings=settings, root=str(tmp_path), folder="runs/a-1")
    launcher = LocalLauncher(job, LaunchSettings())
    with pytest.raises(PipelineError, match=told or "Ray did not start"):
        launcher.start()
    launcher.cancel()
    assert asked.get("num_gpus") == (None if told else found)


def test_the_error_of_a_failed_ray_start_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import ray

    from dpnet.training.ray.launch_local import LocalLauncher

    def too_busy(**options: Any) -> None:
        raise Exception("The current node timed out during startup. This could happen because.")

    monkeypatch.setattr(ray, "init", too_busy)
    settings = SimpleNamespace(workers=1, gpus=False)
    job: Any = SimpleNamespace(settings=settings, root=str(tmp_path), folder="runs/a-1")
    launcher = LocalLauncher(job, LaunchSettings())
    with pytest.raises(PipelineError, match=r"did not start .*timed out during startup\): end"):
        launcher.start()
    launcher.cancel()


# The lease of the process that trains.


def test_a_local_training_holds_its_lease_from_before_ray_starts_until_it_has_ended(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import ray

    from dpnet.training.ray.launch_local import LocalLauncher

    store = LocalStore(tmp_path)
    owners = []

    def init(**options: Any) -> None:
        owners.append(json.loads(store.read("runs/a-1/lease-training.json"))["owner"])
        raise Exception("it is a test.")

    monkeypatch.setattr(ray, "init", init)
    settings = SimpleNamespace(workers=1, gpus=False)
    job: Any = SimpleNamespace(settings=settings, root=str(tmp_path), folder="runs/a-1")
    launcher = LocalLauncher(job, LaunchSettings())
    with pytest.raises(PipelineError, match="Ray did not start"):
        launcher.start()
    assert launcher._training.lease["owner"] == owners[0]
    launcher.cancel()
    assert not store.exists("runs/a-1/lease-training.json")


class Trained:
    """Ray's part of a job: it ends at the third look, or loses its lease at the first."""

    lease: Any = None
    looks = 0

    def __init__(self, job: Any, scratch: Path, attempt: str, deadline: float, lease: Any) -> None:
        self.store, self.lease = LocalStore(Path(job.root)), lease
        made.append(self)

    def start(self) -> None:
        self.owner = json.loads(self.store.read("runs/a-1/lease-training.json"))["owner"]

    def is_running(self) -> bool:
        self.looks += 1
        if self.store.exists("lose"):
            steal_and_wait(self.store, "runs/a-1/lease-training.json")
        return self.looks < 3

    def print_stacks(self) -> None:
        pass

    def stop(self, *, shared: bool) -> None:
        self.stopped = True


made: list[Trained] = []


@pytest.fixture
def job_store(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> LocalStore:
    """Return a root with the description of a job, whose Ray does nothing."""
    import ray

    monkeypatch.setattr(lease_module, "HEARTBEAT_S", 0.05)
    monkeypatch.setattr(ray, "init", lambda **options: None)
    monkeypatch.setattr(job_driver, "Training", Trained)
    job = SimpleNamespace(root=str(tmp_path), folder="runs/a-1")
    monkeypatch.setattr(job_driver, "TrainJob", SimpleNamespace(from_json=lambda record: job))
    made.clear()
    store = LocalStore(tmp_path)
    store.write("runs/a-1/job.json", b'{"job": {}, "deadline": 9}')
    return store


def test_a_job_holds_a_lease_of_its_own_and_its_workers_follow_it(job_store: LocalStore) -> None:
    job_driver._train("a", job_store.uri, "runs/a-1", only_stacks=False)
    (trained,) = made
    assert trained.lease["owner"] == trained.owner
    assert trained.lease["key"] == "runs/a-1/lease-training.json"
    assert not job_store.exists("runs/a-1/lease-training.json")


def test_a_job_that_lost_its_lease_stops(job_store: LocalStore) -> None:
    job_store.write("lose", b"")
    with pytest.raises(LeaseLostError, match=r"lease-training\.json was taken over"):
        job_driver._train("a", job_store.uri, "runs/a-1", only_stacks=False)
    assert (made[0].looks, made[0].stopped) == (1, True)


def test_a_job_that_prints_stacks_needs_no_lease(job_store: LocalStore) -> None:
    job_store.write("runs/a-1/lease-training.json", OTHER)  # of the job that trains
    job_driver._train("a", job_store.uri, "runs/a-1", only_stacks=True)
    assert made[0].lease is None
    assert job_store.read("runs/a-1/lease-training.json") == OTHER


@pytest.mark.parametrize("rank", [0, 1])
def test_the_worker_that_writes_follows_the_lease_of_its_owner(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, rank: int
) -> None:
    store = LocalStore(tmp_path)
    monkeypatch.setattr(lease_module, "HEARTBEAT_S", 0.05)
    session = SimpleNamespace(rank=rank, local_world=1)
    monkeypatch.setattr(workers, "RaySession", lambda attempt: session)
    monkeypatch.setattr(workers, "start_logging", lambda: None)
    monkeypatch.setattr(workers, "add_handler", lambda handler: None)
    monkeypatch.setattr(workers, "forward_logs", lambda attempt: None)
    job = SimpleNamespace(root=str(tmp_path), settings=SimpleNamespace(gpus=True))
    monkeypatch.setattr(workers, "TrainJob", SimpleNamespace(from_json=lambda record: job))
    told: list[str] = []
    monkeypatch.setattr(workers, "send_error", lambda attempt, text: told.append(text))

    def train_loop(*given: Any) -> bool:
        if rank == 0:
            steal_and_wait(store, "a/lease.json")
        check_leases()
        return True

    monkeypatch.setattr("dpnet.training.loop.train_loop", train_loop)
    with Lease(store, "a/lease.json", interval=60) as lease:
        config = {"job": {}, "attempt": "a", "lease": lease.reference()}
    foreign = {"owner": lease.reference()["owner"], "interval": 60}
    store.write("a/lease.json", json.dumps(foreign).encode())
    if rank == 0:
        with pytest.raises(LeaseLostError, match="was taken over by another runner"):
            workers.run_worker(config)
        assert "was taken over by another runner" in told[0]
    else:
        assert workers.run_worker(config)
