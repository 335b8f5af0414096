"""A stage that loses its lease stops within a heartbeat, and writes no result.

In each test another runner takes the lease over in the middle of the work. When the next heartbeat
has noticed it, the next piece of work must not begin. The same of training and retraining is in
`test_loop.py`, `test_checkpoints.py` and `test_retrain.py`.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import small_root
from image_sets import crops, photographs
from lease_thief import OTHER, leases, steal, steal_and_wait

from data_prep.core import lease as lease_module
from data_prep.core.errors import LeaseLostError
from data_prep.core.pool import run_tasks
from data_prep.core.stage import Produced, Request, Work, run_stage
from data_prep.core.storage.local import LocalStore
from data_prep.images import shard_task as image_shards
from data_prep.images.next_version import Changes
from data_prep.images.stage import prepare_images
from data_prep.images.watch import watch
from data_prep.masks import shard_task as mask_shards
from data_prep.masks.settings import MasksSettings
from data_prep.masks.stage import prepare_masks
from dpnet.evaluation import bench
from dpnet.evaluation.settings import EvaluateSettings
from dpnet.evaluation.stage import evaluate
from dpnet.registry import mlflow_versions, promotion
from dpnet.registry import stage as registry
from dpnet.registry.settings import RegisterSettings
from dpnet.registry.stage import register
from dpnet.training.ray import launch
from dpnet.training.settings import LaunchSettings


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LocalStore:
    monkeypatch.setattr(lease_module, "HEARTBEAT_S", 0.05)
    return LocalStore(tmp_path / "root")


def lose_at_first(
    monkeypatch: pytest.MonkeyPatch, module: Any, name: str, lose: Callable[[], None]
) -> list[None]:
    """Let the first call of a function lose the lease. Return a list that gets an item a call."""
    real, calls = getattr(module, name), list[None]()

    def counted(*given: Any, **options: Any) -> Any:
        calls.append(None)
        if len(calls) == 1:
            lose()
        return real(*given, **options)

    monkeypatch.setattr(module, name, counted)
    return calls


def manifests(store: LocalStore) -> list[str]:
    return [entry.key for entry in store.list() if entry.key.endswith("manifest.json")]


@pytest.mark.parametrize("which", ["stage", "dataset"])
def test_images_stop(
    store: LocalStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, which: str
) -> None:
    def lose() -> None:
        of_dataset, of_stage = sorted(leases(store, "images"), key=len)
        steal_and_wait(store, of_stage if which == "stage" else of_dataset)

    calls = lose_at_first(monkeypatch, image_shards, "_prepare_item", lose)
    with pytest.raises(LeaseLostError, match="was taken over by another runner"):
        prepare_images(crops(photographs(tmp_path / "photos"), name="x"), store)
    assert len(calls) == 1
    assert manifests(store) == []


def test_masks_stop(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def lose() -> None:
        steal_and_wait(store, *leases(store, "masks"))

    calls = lose_at_first(monkeypatch, mask_shards, "training_mask", lose)
    with pytest.raises(LeaseLostError, match="was taken over by another runner"):
        prepare_masks(MasksSettings(name="x", size=32, train=40, eval_per_bin=1), store)
    assert len(calls) == 1
    assert manifests(store) == []


@pytest.mark.parametrize("workers", [1, 2])
def test_tasks_stop(store: LocalStore, workers: int) -> None:
    made = []

    def build(work: Work) -> Produced:
        for result in run_tasks(abs, range(100), workers):
            made.append(result)
            if len(made) == 1:
                steal_and_wait(store, f"{work.folder}/lease.json")
        return Produced([], {})

    with pytest.raises(LeaseLostError, match="was taken over by another runner"):
        run_stage(store, Request("images", "x", "a", {}), build)
    assert len(made) < 10  # those that were ready
    assert manifests(store) == []


def test_an_evaluation_stops(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    images, masks = small_root.real_data(store, shard_samples=3)
    run = small_root.trained(store, images=images, masks=masks)
    before = manifests(store)

    def lose() -> None:
        steal_and_wait(store, *leases(store, "evaluations"))

    monkeypatch.setattr(bench, "BATCH", 1)
    calls = lose_at_first(monkeypatch, bench, "fill_batch", lose)
    with pytest.raises(LeaseLostError, match="was taken over by another runner"):
        evaluate(EvaluateSettings(threads=1), images, masks, run, store)
    assert len(calls) == 1
    assert manifests(store) == before


@pytest.mark.parametrize("which", ["stage", "model"])
@pytest.mark.parametrize(
    ("module", "step", "missing"),
    [
        (registry, "_new_record", "the version"),
        (mlflow_versions, "_tags", "v1.json"),
        (registry, "_write_once", "champion.json"),
    ],
)
def test_a_registration_stops(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    module: Any,
    step: str,
    missing: str,
    which: str,
) -> None:
    """Its steps are short, so each one asks storage before it writes."""
    store = small_root.new_store(tmp_path / "root")
    run, evaluation = small_root.run_and_evaluation(store, 20.0)
    before = manifests(store)

    def lose() -> None:
        of_model, of_stage = sorted(leases(store, "registry"), key=len)
        steal(store, of_stage if which == "stage" else of_model)

    with monkeypatch.context() as patched:
        lose_at_first(patched, module, step, lose)
        versions = lose_at_first(patched, mlflow_versions, "ensure_version", lambda: None)
        with pytest.raises(LeaseLostError, match="was taken over by another runner"):
            register(RegisterSettings(), run, evaluation, store)
    assert len(versions) == (missing != "the version")
    assert store.exists("registry/dpnet/v1.json") == (missing == "champion.json")
    assert not store.exists("registry/dpnet/champion.json")
    assert list(store.list("registry/dpnet/history")) == []
    assert manifests(store) == before
    for key in leases(store, "registry"):
        store.delete(key)
    assert register(RegisterSettings(), run, evaluation, store).summary["version"] == 1


def test_a_registration_does_not_restore_the_champion(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = small_root.new_store(tmp_path / "root")
    small_root.champion(store)
    store.delete("registry/dpnet/champion.json")
    lose_at_first(
        monkeypatch, promotion, "read_history", lambda: steal(store, "registry/dpnet/lease.json")
    )
    with pytest.raises(LeaseLostError, match="was taken over by another runner"):
        register(RegisterSettings(), *small_root.run_and_evaluation(store, 21.0), store)
    assert not store.exists("registry/dpnet/champion.json")


def test_a_registration_does_not_restore_versions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_root.champion(small_root.new_store(tmp_path / "root"))
    shutil.copytree(tmp_path / "root", tmp_path / "elsewhere")
    store = small_root.new_store(tmp_path / "elsewhere")  # with a new database of MLflow
    lose_at_first(
        monkeypatch, promotion, "read_history", lambda: steal(store, "registry/dpnet/lease.json")
    )
    restored = lose_at_first(monkeypatch, mlflow_versions, "_source", lambda: None)
    with pytest.raises(LeaseLostError, match="was taken over by another runner"):
        register(RegisterSettings(), *small_root.run_and_evaluation(store, 21.0), store)
    assert restored == []


def test_a_watcher_does_not_announce(store: LocalStore) -> None:
    def look() -> Changes:
        steal(store, "images/x/watch-lease.json")
        return Changes("d1", version=1, items=15, new=3, changed=0, removed=0, unchanged=12)

    announced: list[Changes] = []
    with pytest.raises(LeaseLostError, match="was taken over by another runner"):
        watch(store, "x", look, announced.append, lambda: 1.0)
    assert announced == []
    assert not store.exists("images/x/watch.json")
    assert store.read("images/x/watch-lease.json") == OTHER


class Launcher:
    """A training that loses the lease of its stage while it runs."""

    attempt = "a"
    facts: tuple[str, ...] = ()

    def __init__(self, lose: Callable[[], None]) -> None:
        self.looks, self.cancelled, self.lose = 0, False, lose

    def start(self) -> None:
        pass

    def is_running(self) -> bool:
        self.looks += 1
        self.lose()
        return self.looks < 3

    def cancel(self) -> None:
        self.cancelled = True


@pytest.mark.parametrize(("kind", "cancelled"), [("local", True), ("ray-job", False)])
def test_a_launcher_stops_its_own_training_but_not_a_job_that_others_may_follow(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch, kind: Any, cancelled: bool
) -> None:
    made: list[Launcher] = []

    def build(work: Work) -> Produced:
        made.append(Launcher(partial(steal_and_wait, store, f"{work.folder}/lease.json")))
        monkeypatch.setattr(launch, "choose_launcher", lambda *given: made[0])
        job: Any = type("Job", (), {"settings": type("Settings", (), {"steps": 5})})
        launch.run_training(job, LaunchSettings(launcher=kind), None, work)
        return Produced([], {})

    with pytest.raises(LeaseLostError, match="was taken over by another runner"):
        run_stage(store, Request("train", "x", "runs", {}), build)
    assert (made[0].looks, made[0].cancelled) == (1, cancelled)


def test_a_runner_that_waits_for_another_lease_stops_too(store: LocalStore) -> None:
    store.write("b/lease.json", OTHER)
    begun = time.monotonic()

    def wait() -> None:
        with lease_module.Lease(store, "a/lease.json"):
            steal(store, "a/lease.json")
            late = begun + 60
            with lease_module.Lease(
                store, "b/lease.json", interval=2.0, done=lambda: time.monotonic() > late
            ):
                raise AssertionError("the other lease was got")

    with pytest.raises(LeaseLostError, match=r"a/lease\.json was taken over"):
        wait()
