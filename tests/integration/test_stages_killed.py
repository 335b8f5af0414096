"""Evaluate, register and retrain, each killed with SIGKILL before one of its writes and run again.

The result is that of an undisturbed run, byte for byte, and there is no second version.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from image_sets import photograph, photographs
from killed import moments, run

from data_prep.core.manifest import StageRef
from data_prep.core.stage import Produced, Work, run_stage
from data_prep.core.storage.local import LocalStore
from data_prep.core.storage.open import open_store
from dpnet.cli.main import main
from dpnet.model_store.history import read_history
from dpnet.pipeline.chain import run_chain
from dpnet.pipeline.config import load_config
from dpnet.pipeline.retrain import retrain
from dpnet.pipeline.verify import verify
from dpnet.training.job import plan_training
from dpnet.training.stage import train

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.rotated(3)]


class Prepared(NamedTuple):
    """A root with photos and a trained run, and its config."""

    root: Path
    config: Path
    photos: Path


def without_training(title: str, stage: Callable[..., StageRef], *given: Any) -> StageRef:
    """Run a stage. Training only commits random weights, first worse ones."""
    if stage is not train:
        return stage(*given)
    import torch

    from dpnet.model import build_generator
    from dpnet.model_store.weights import save_generator

    training, *_, store = given

    def build(work: Work) -> Produced:
        torch.manual_seed(0)
        generator = build_generator("tiny")
        first = training.settings.init_from is None
        torch.nn.init.normal_(generator.out.weight, std=1.0 if first else 0.01)
        files = save_generator(store, work.folder, generator, {"size": 32})
        return Produced(files, {"steps": 5, "resumed_from": 0})

    return run_stage(store, plan_training(training, store)[0], build)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    folder = tmp_path_factory.mktemp("prepared")
    photos = photographs(folder / "photos", 16)
    config = {
        "name": "killed",
        "images": {"source": str(photos), "name": "k", "size": 32, "val": 0.1, "test": 0.4},
        "masks": {"name": "k", "size": 32, "train": 4, "eval_per_bin": 2, "shard_samples": 4},
        "model": {"preset": "tiny"},
        "evaluate": {"pictures": 1, "threads": 1},
        "register": {"promote": "always"},  # the first one is not better than the mean fill
    }
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(config))
    run_chain(load_config(str(file)), open_store(str(folder / "root")), "train", without_training)
    return Prepared(folder / "root", file, photos)


def copied(prepared: Path, to: Path) -> Path:
    shutil.copytree(prepared, to)
    return to


def content(root: Path, *without: str) -> dict[str, bytes]:
    """Return the files of all stages, without times and MLflow's database.

    Records of the history have times, and so the digests of the ones before them.
    """
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file()
        and path.parent.name != "history"
        and path.name not in ("manifest.json", "report.html", "mlflow.db", ".lock", *without)
    }


def digests(root: Path) -> dict[str, str]:
    """Return the content digest of every committed stage."""
    store = LocalStore(root)
    keys = [entry.key for entry in store.list() if entry.key.endswith("/manifest.json")]
    return {key: yaml.safe_load(store.read(key))["content_digest"] for key in keys}


def champions(root: Path) -> list[tuple[int, str]]:
    """Return the versions that became champion, and how."""
    return [(each.version, each.how) for each in read_history(LocalStore(root), "dpnet")]


def in_mlflow(root: Path) -> tuple[list[int], dict[str, int], int]:
    """Return the versions, the aliases and the number of runs in MLflow."""
    from dpnet.tracking.mlflow_client import connect

    with connect(f"sqlite:///{root}/mlflow.db") as client:
        versions = [int(each.version) for each in client.search_model_versions("name='dpnet'")]
        aliases = client.get_registered_model("dpnet").aliases
        experiments = [each.experiment_id for each in client.search_experiments()]
        runs = len(client.search_runs(experiments))
    return sorted(versions), {name: int(number) for name, number in aliases.items()}, runs


def killed_at_each(
    prepared: Path,
    folder: Path,
    work: Callable[..., int],
    arguments: Callable[[Path], list[Any]],
    wanted: Callable[[str], bool] = lambda moment: True,
) -> list[str]:
    """Kill `work` before each of its writes, run it again, and compare with an undisturbed run.

    Args:
        prepared: the root before the work.
        folder: for the copies of the root.
        work: see `killed.run`.
        arguments: returns those of `work` on a copy.
        wanted: chooses the writes.

    Returns:
        The writes before which it was killed.
    """
    whole = copied(prepared, folder / "whole")
    assert run(work, arguments(whole), whole) == 0, (folder / "whole.output").read_text()
    every = moments(whole)
    chosen = [number for number, moment in enumerate(every, 1) if wanted(moment)]
    for number in chosen:
        moment = every[number - 1]
        root = copied(prepared, folder / f"killed {number}")
        assert run(work, arguments(root), root, kill_at=number) == -9, moment
        assert digests(root).items() < digests(whole).items(), moment
        assert run(work, arguments(root), root) == 0, root.with_name(f"{root.name}.output")
        assert content(root) == content(whole), moment
        assert digests(root) == digests(whole), moment
        if (whole / "mlflow.db").exists():
            assert in_mlflow(root) == in_mlflow(whole), moment
            assert champions(root) == champions(whole), moment
        shutil.rmtree(root)
    assert verify(LocalStore(whole)).problems == []
    return [every[number - 1] for number in chosen]


def test_an_evaluation_killed_before_any_write_ends_bit_identical(
    prepared: Prepared, tmp_path: Path
) -> None:
    def arguments(root: Path) -> list[Any]:
        return [["evaluate", str(prepared.config), "--root", str(root), "--json"]]

    killed = killed_at_each(prepared.root, tmp_path, main, arguments)
    names = [moment.rpartition("/")[2] for moment in killed]
    assert sum("/parts/" in moment for moment in killed) == 3
    assert {"metrics.parquet", "report.json", "report.html", "manifest.json"} <= set(names)


def test_a_registration_killed_before_any_write_makes_one_version(
    prepared: Prepared, tmp_path: Path
) -> None:
    evaluated = copied(prepared.root, tmp_path / "evaluated")
    command = [str(prepared.config), "--json", "--root"]
    assert run(main, [["evaluate", *command, str(evaluated)]], evaluated) == 0

    def arguments(root: Path) -> list[Any]:
        return [["register", *command, str(root)]]

    killed = killed_at_each(evaluated, tmp_path, main, arguments)
    assert {"MLflow: create_model_version", "MLflow: set_registered_model_alias"} <= set(killed)
    assert {"registry/dpnet/v1.json", "registry/dpnet/champion.json"} <= set(killed)
    assert "registry/dpnet/history/000001.json" in killed
    assert in_mlflow(tmp_path / "whole") == ([1], {"champion": 1}, 1)


def retrained(config: str, photos: str, root: str) -> int:
    resolved = load_config(config, [f"images.source={photos}"])
    retrain(resolved, open_store(root), without_training)
    return 0


def test_a_retrain_killed_before_any_write_makes_one_version(
    prepared: Prepared, tmp_path: Path
) -> None:
    first = copied(prepared.root, tmp_path / "first")
    command = ["register", str(prepared.config), "--json", "--root", str(first)]
    assert run(main, [command], first) == 0
    photos = copied(prepared.photos, tmp_path / "photos")
    photograph(photos / "new.png", 100)

    def arguments(root: Path) -> list[Any]:
        return [str(prepared.config), str(photos), str(root)]

    def wanted(moment: str) -> bool:
        return moment.startswith(("retrains/", "registry/", "MLflow: create_model")) or (
            moment.startswith(("evaluations/", "runs/")) and moment.endswith("manifest.json")
        )

    killed = killed_at_each(first, tmp_path, retrained, arguments, wanted)
    names = {moment.rpartition("/")[2] for moment in killed}
    assert {"plan.json", "rival.json", "retrain.json", "v2.json", "manifest.json"} <= names
    assert "champion.json" in names  # the new model is the better one
    assert in_mlflow(tmp_path / "whole") == ([1, 2], {"champion": 2}, 2)
