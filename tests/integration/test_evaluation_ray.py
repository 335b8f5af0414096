"""Evaluation on a real Ray cluster: the bytes of one machine, one writer, kills and errors."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import small_root
from clusters import command_of, family
from random_weights import random_alexnet, random_inception, shrink_inception
from resumed_counts import record_resumed

from data_prep.core.errors import LeaseLostError, PipelineError
from data_prep.core.manifest import StageRef
from data_prep.core.storage.local import LocalStore
from data_prep.core.storage.store import Store
from dpnet.evaluation.settings import EvaluateSettings
from dpnet.evaluation.stage import evaluate
from dpnet.evaluation.workers import Place
from dpnet.pipeline import ray_data as place_module
from dpnet.pipeline.ray_data import ray_data
from dpnet.pipeline.verify import verify
from dpnet.training.ray.start import connect, prepare_start

pytestmark = [pytest.mark.integration, pytest.mark.slow]


class Data(NamedTuple):
    """A root with images, masks and a model, and the weights of the metrics."""

    root: Path
    inputs: tuple[StageRef, StageRef, StageRef]
    settings: EvaluateSettings


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    folder = tmp_path_factory.mktemp("data")
    store = LocalStore(folder / "root")
    images, masks = small_root.real_data(store, shard_samples=3)  # twelve pairs in four shards
    run = small_root.trained(store, images=images, masks=masks)
    settings = EvaluateSettings(
        lpips_weights=str(random_alexnet(folder / "alexnet.safetensors")),
        inception_weights=str(random_inception(folder / "inception.safetensors")),
        pictures=1,
    )
    return Data(store.folder, (images, masks, run), settings)


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[Any]:
    """Start a Ray of two cores for all tests, and stay connected to it."""
    import ray

    with pytest.MonkeyPatch.context() as patch:
        shrink_inception(patch.setattr)
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        with prepare_start("test-") as start, start.in_this_process():
            options = start.init_options(2)
            options["runtime_env"] = {"worker_process_setup_hook": shrink_inception}
            connect(**options)
            yield ray
            ray.shutdown()


@pytest.fixture
def fresh(data: Data, tmp_path: Path) -> LocalStore:
    root = tmp_path / "root"
    shutil.copytree(data.root, root, ignore=shutil.ignore_patterns("evaluations"))
    return LocalStore(root)


def evaluated(data: Data, store: Store, place: Place | None, **changes: Any) -> StageRef:
    settings = data.settings.model_copy(update=changes)
    return evaluate(settings, *data.inputs, store, place)


def files(store: LocalStore, ref: StageRef) -> dict[str, bytes]:
    """Return the files of an evaluation, without those that have times."""
    return {
        entry.key: store.read(entry.key)
        for entry in store.list(ref.folder)
        if not entry.key.endswith(("manifest.json", "report.html"))
    }


@pytest.fixture(scope="module")
def expected(data: Data) -> dict[str, bytes]:
    """Return the files that one thread of this machine makes."""
    ref = evaluated(data, LocalStore(data.root), None, threads=1)
    found = files(LocalStore(data.root), ref)
    assert b'"fid"' in found[f"{ref.folder}/report.json"]
    return found


@pytest.mark.parametrize("cores", [1, 2])
def test_any_number_of_workers_makes_the_bytes_of_one_machine(
    cores: int, data: Data, fresh: LocalStore, expected: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(place_module, "CORES", cores)  # of an actor: two actors, or one
    ref = evaluated(data, fresh, ray_data("local"))
    assert not ref.skipped
    assert ref.summary["pairs_per_second"] > 0
    assert files(fresh, ref) == expected
    assert verify(fresh).problems == []
    assert evaluated(data, fresh, None).skipped


class ReadOnlyStore(LocalStore):
    """A store that only reads."""

    def write(self, key: str, data: bytes) -> None:
        raise AssertionError(f"a worker writes {key}")

    def create(self, key: str, data: bytes) -> str | None:
        raise AssertionError(f"a worker writes {key}")

    def delete(self, key: str) -> None:
        raise AssertionError(f"a worker deletes {key}")


class StoreOfTheDriver(LocalStore):
    """A store that a worker gets as a ReadOnlyStore."""

    def __reduce__(self) -> Any:
        return ReadOnlyStore, (self.folder,)


def test_only_the_driver_writes_and_a_killed_worker_changes_nothing(
    data: Data, fresh: LocalStore, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    killed: list[int] = []
    real = place_module._next

    def killing(found: Any) -> Any:
        item = real(found)
        if not killed:  # after the first result, while the others are measured
            killed.extend(actors())
            for pid in killed:
                os.kill(pid, signal.SIGKILL)
        return item

    monkeypatch.setattr(place_module, "_next", killing)
    monkeypatch.setattr(place_module, "CORES", 1)
    ref = evaluated(data, StoreOfTheDriver(fresh.folder), ray_data("local"))
    assert killed
    assert files(fresh, ref) == expected


def actors() -> list[int]:
    """Return the processes of this Ray's workers that hold networks."""
    return [pid for pid in family(os.getpid()) if "MapWorker" in command_of(pid)]


DRIVER = """
import sys
from pathlib import Path
sys.path[:0] = {tests!r}
from data_prep.core.manifest import load_reference
from test_evaluation_ray import Data, EvaluateSettings, LocalStore, evaluated
from test_evaluation_ray import ray_data, shrink_inception
from dpnet.training.ray.start import connect
shrink_inception()
connect(address={address!r}, runtime_env={{"worker_process_setup_hook": shrink_inception}})
store = LocalStore(Path({root!r}))
inputs = tuple(load_reference(store, folder) for folder in {folders!r})
settings = EvaluateSettings.model_validate({settings!r})
evaluated(Data(store.folder, inputs, settings), store, ray_data("auto"))
"""


def test_a_driver_that_is_killed_at_random_moments_resumes_to_the_same_bytes(
    data: Data, fresh: LocalStore, expected: dict[str, bytes], cluster: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    seed = int(os.environ.get("DPNET_SEED", time.time_ns() % 10_000))
    print(f"DPNET_SEED={seed}")
    chance = random.Random(seed)
    tests = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "support")]
    code = DRIVER.format(
        tests=[*tests, str(Path(__file__).parents[2])],
        address=cluster.get_runtime_context().gcs_address,
        root=str(fresh.folder),
        folders=[ref.folder for ref in data.inputs],
        settings=data.settings.model_dump(),
    )
    monkeypatch.setattr(place_module, "CORES", 1)
    for _ in range(2):
        target, later = chance.randint(1, 3), chance.uniform(0, 1)
        print(f"killed after {target} parts and {later:.2f} s")
        with subprocess.Popen([sys.executable, "-c", code]) as driver:
            deadline = time.monotonic() + 240
            while parts(fresh) < target and driver.poll() is None:
                assert time.monotonic() < deadline
                time.sleep(0.05)
            time.sleep(later)
            driver.kill()
    kept = parts(fresh)
    resumed = record_resumed(monkeypatch)
    ref = evaluated(data, fresh, ray_data("local"))
    if not ref.skipped:  # the killed ones were not faster than the last kill
        assert resumed["evaluate"] == 3 * kept
    assert files(fresh, ref) == expected


def parts(store: LocalStore) -> int:
    """Count the parts of the one evaluation that are complete."""
    return sum(entry.key.endswith(".json") for entry in store.list("evaluations")
               if "/parts/" in entry.key)  # fmt: skip


def test_a_file_that_a_machine_of_the_cluster_lacks_is_one_sentence(
    data: Data, fresh: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dpnet.evaluation import stage

    file = shutil.copy(str(data.settings.lpips_weights), fresh.folder.parent / "here.safetensors")
    real = stage.open_pairs

    def removing(*given: Any) -> Any:
        Path(file).unlink()
        return real(*given)

    monkeypatch.setattr(stage, "open_pairs", removing)
    with pytest.raises(PipelineError, match=r"LPIPS weights '.*' are not on this machine") as said:
        evaluated(data, fresh, ray_data("local"), lpips_weights=str(file))
    assert "\n" not in str(said.value)
    assert not list(fresh.folder.glob("evaluations/*/manifest.json"))


@dataclass(frozen=True)
class Deadly:
    """A task that ends each worker process."""

    name: str = "the pairs of eval-000007"
    size: int = 1

    def run(self, bench: Any, tick: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


class NothingToOpen:
    """A plan without networks."""

    def open(self, threads: int) -> Any:
        return nullcontext()


def test_a_part_that_ends_each_worker_is_named() -> None:
    plan: Any = NothingToOpen()
    with ray_data("local")(plan) as run, pytest.raises(PipelineError) as said:
        list(run([Deadly()], lambda count: None))
    assert str(said.value).startswith("the pairs of eval-000007 ended its worker process 4 times")


def test_a_lost_lease_ends_the_evaluation(
    data: Data, fresh: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def executors() -> list[str]:
        return [each.name for each in threading.enumerate() if "evaluate-" in each.name]

    def lost() -> None:
        if executors():
            raise LeaseLostError("lost")

    monkeypatch.setattr(place_module, "check_leases", lost)
    with pytest.raises(LeaseLostError):
        evaluated(data, fresh, ray_data("local"))
    assert not list(fresh.folder.glob("evaluations/*/manifest.json"))
    assert executors() == []  # Ray could end under it
