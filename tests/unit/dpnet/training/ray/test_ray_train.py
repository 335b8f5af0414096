"""The thread that runs Ray Train: how a stop waits for it, and that Ray starts only on request."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray._private import auto_init_hook
from ray.train.v2.api import data_parallel_trainer

from dpnet.training.ray import job_driver, ray_train
from dpnet.training.ray.launch_job import SPEC
from dpnet.training.ray.process_group import ProcessGroup
from dpnet.training.ray.ray_train import Training
from dpnet.training.ray.start import connect
from dpnet.training.settings import TrainSettings


@pytest.fixture
def training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Training:
    monkeypatch.setattr(data_parallel_trainer, "ray", ray)  # undo the replacement at the end
    monkeypatch.setattr(ray_train, "receive", lambda attempt: None)
    job: Any = SimpleNamespace(
        root=str(tmp_path), folder="runs/a", settings=TrainSettings(), to_json=dict
    )
    return Training(job, tmp_path, "attempt", 60.0)


@pytest.fixture
def starts(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Return the calls of `ray.init`, which then starts nothing."""
    found: list[Any] = []
    monkeypatch.setattr(auto_init_hook, "enable_auto_connect", True)
    monkeypatch.setattr(ray, "init", lambda **options: found.append(options["address"]))
    return found


def test_a_stop_after_ctrl_c_waits_for_the_thread_before_ray_shuts_down(
    training: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []

    class Fitting:
        def fit(self) -> None:
            while not training._stopped:
                time.sleep(0.01)
            time.sleep(0.3)
            order.append("the thread ends")
            raise SystemExit

    monkeypatch.setattr(training, "_trainer", Fitting)
    monkeypatch.setattr(ray, "shutdown", lambda: order.append("Ray shuts down"))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        training.start()
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            all(iter(training.is_running, False))
    finally:
        signal.signal(signal.SIGINT, before)
    training.stop(shared=False)
    assert order == ["the thread ends", "Ray shuts down"]


def test_a_training_whose_ray_train_does_not_load_fails_instead_of_waiting(
    training: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray.train.v2.api", None)  # an import of it fails
    training.start()
    with pytest.raises(ImportError):
        all(iter(training.is_running, False))


def test_a_training_that_did_not_start_stops_at_once(
    training: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    monkeypatch.setattr(ray, "shutdown", lambda: calls.append("shutdown"))
    monkeypatch.setattr(training._ended, "wait", lambda seconds: calls.append("wait"))
    training.stop(shared=False)
    assert calls == ["shutdown"]


def test_workers_meet_in_our_process_group(training: Training) -> None:
    assert isinstance(training._trainer().backend_config, ProcessGroup)


def test_after_a_connection_no_call_starts_another_ray(starts: list[Any]) -> None:
    connect(address="ours")
    auto_init_hook.auto_init_ray()  # what every call of Ray does first
    assert starts == ["ours"]


def test_a_job_starts_no_other_ray(starts: list[Any], tmp_path: Path) -> None:
    (tmp_path / SPEC).write_text('{"deadline": 1}')  # without a job
    with pytest.raises(KeyError, match="job"):
        job_driver._train("attempt", str(tmp_path), ".", only_stacks=False)
    auto_init_hook.auto_init_ray()
    assert starts == []
