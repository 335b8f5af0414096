"""The cost of training, measured from its log; test_plan.py has the estimate."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from small_root import commit

from data_prep.core.errors import ConfigError
from data_prep.core.manifest import StageRef
from data_prep.core.storage.local import LocalStore
from dpnet.pipeline.config import Config, load_config
from dpnet.pipeline.cost import Cost, cost_text, hours_text, measured
from dpnet.pipeline.settings import CostSettings
from dpnet.training.job import plan_training

PRICES = CostSettings(gpu_hour=2.5, cpu_hour=0.1, currency="EUR")


def record(step: int, **more: Any) -> dict[str, Any]:
    """A hundred images in 30 seconds on four workers, a sixth of them for validation."""
    figures = {"images": 100, "workers": 4, "seconds": 25.0, "other_seconds": 5.0}
    return {"kind": "train", "step": step, **figures, **more}


def ran(
    store: LocalStore, folder: str, config: Config, log: list[dict[str, Any]], **status: Any
) -> None:
    """Write the files of a run with `config` that costs are computed from."""
    about = {"size": config.masks.size, "gpus": config.train.gpus, "time": 1.0, **status}
    resolved = {"model": config.model.model_dump()}
    store.write(f"{folder}/status.json", json.dumps(about).encode())
    store.write(f"{folder}/resolved-config.yaml", yaml.safe_dump(resolved).encode())
    lines = "".join(json.dumps(each) + "\n" for each in log)
    store.write(f"{folder}/log.jsonl", lines.encode())


def config_of(*overrides: str) -> Config:
    return load_config("demo", ["train.steps=300", "train.batch_size=10", *overrides])


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path)


@pytest.fixture
def data(store: LocalStore) -> tuple[StageRef, StageRef]:
    images = commit(store, "images", "images/x", {"train-000000.tar": b"images"})
    return images, commit(store, "masks", "masks/x", {"train-000000.tar": b"masks"})


def test_the_hours_of_a_run_count_all_workers_and_validation(
    store: LocalStore,
) -> None:
    log = [{"kind": "validation", "step": 0, "hole_psnr": 9.0}, record(10), record(20, workers=2)]
    ran(store, "runs/a-1", config_of(), log)
    cost = measured(store, "runs/a-1", PRICES)
    assert cost.cpu_hours == pytest.approx((4 + 2) * 30 / 3600)
    assert cost.gpu_hours == 0
    assert cost.money == pytest.approx(0.1 * 180 / 3600)


def test_workers_with_a_gpu_have_hours_and_a_price_of_their_own(store: LocalStore) -> None:
    log = [record(10), record(20, gpu_memory_gb=3.0, seconds=3595.0)]
    ran(store, "runs/a-1", config_of(), log)
    cost = measured(store, "runs/a-1", PRICES)
    assert (cost.gpu_hours, cost.cpu_hours) == (4.0, pytest.approx(120 / 3600))
    assert cost.money == pytest.approx(10 + 0.1 / 30)


@pytest.mark.parametrize("log", [None, b'{"kind": "tra'])
def test_a_run_without_a_readable_log_costs_nothing(store: LocalStore, log: bytes | None) -> None:
    if log:
        store.write("runs/a-1/log.jsonl", log)
    assert measured(store, "runs/a-1", PRICES) == Cost(0.0, 0.0, PRICES)


@pytest.mark.parametrize(
    ("hours", "text"),
    [
        ((3.21, 0.0), "3.2 GPU-hours"),
        ((0.0, 0.052), "0.05 worker-hours"),
        ((0.0, 0.0001), "under 0.01 worker-hours"),
        ((12.0, 1.0), "12.0 GPU-hours and 1.0 worker-hours"),
        ((0.0, 0.0), "0.00 worker-hours"),
    ],
)
def test_hours_are_shown_as_text(hours: tuple[float, float], text: str) -> None:
    assert hours_text(*hours) == text


def test_money_is_shown_with_its_price_and_only_if_there_is_one() -> None:
    assert cost_text(Cost(3.2, 0.0, PRICES)) == "3.2 GPU-hours, 8.00 EUR (at 2.50 an hour)"
    assert cost_text(Cost(3.2, 0.0, CostSettings())) == "3.2 GPU-hours"
    assert cost_text(Cost(3.2, 1.0, PRICES)).endswith("8.10 EUR (at 2.50 and 0.10 an hour)")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("cost.gpu_hour=-1", "cost.gpu_hour is -1: it must be a number of at least 0"),
        ("cost.cpu_hour=.inf", "cost.cpu_hour is Infinity"),
        ("cost.gpu_hour=.nan", "cost.gpu_hour is NaN"),
        ("cost.currency=''", 'cost.currency is "": it must be text'),
        ("cost.gpu_hours=1", "the nearest is cost.gpu_hour"),
    ],
)
def test_an_invalid_price_is_refused(override: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config_of(override)
    assert said in str(caught.value)


def test_prices_do_not_change_the_request(
    store: LocalStore, data: tuple[StageRef, StageRef]
) -> None:
    digests = set()
    for config in (config_of(), config_of("cost.gpu_hour=3")):
        digests.add(plan_training(config.training(*data), store)[0].digest)
    assert len(digests) == 1
