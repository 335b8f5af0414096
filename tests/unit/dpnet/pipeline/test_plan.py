"""The plan of a config: sizes, times, money, and where each figure comes from."""

from __future__ import annotations

import io
import json
import logging
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from servers import moto_server
from small_root import SIZE, new_database, photographs, real_data

from data_prep.core.errors import ConfigError
from data_prep.core.manifest import StageRef
from data_prep.core.stage import Produced, Request, Work, run_stage
from data_prep.core.storage.local import LocalStore
from data_prep.core.storage.open import open_store
from data_prep.core.storage.s3 import PART as STORE_PART
from data_prep.images.stage import prepare_images
from data_prep.masks.stage import prepare_masks
from data_prep.shards.split_size import SplitSize
from dpnet.cli.main import main
from dpnet.evaluation.stage import evaluate
from dpnet.model import build_generator
from dpnet.model.config import preset
from dpnet.model_store.weights import save_generator
from dpnet.pipeline.config import Config, load_config, packaged_configs
from dpnet.pipeline.cost import cost_text
from dpnet.pipeline.plan import Plan, make_plan
from dpnet.pipeline.plan_facts import Given, plan_config, plan_here
from dpnet.pipeline.plan_figures import BENCHMARKS, PUBLISHED, STATE_BYTES, Speed
from dpnet.pipeline.plan_parts import PART, DataSize, Machines, Requests, puts
from dpnet.pipeline.plan_text import WIDTH, plan_markdown, plan_text
from dpnet.registry.stage import register
from dpnet.training.checkpoints import FORMAT
from dpnet.training.job import plan_training, requested
from dpnet.training.settings import TrainSettings
from dpnet.training.state import TrainState

IMAGES = DataSize(
    {
        "train": SplitSize(100_000, 100, 3_200_000_000),
        "val": SplitSize(1_000, 1, 32_000_000),
        "test": SplitSize(1_000, 1, 32_000_000),
    },
    "a test",
    photos=102_000,
)
MASKS = DataSize(
    {"train": SplitSize(20_000, 10, 50_000_000), "eval": SplitSize(12_000, 6, 30_000_000)}, "a test"
)
GPU = Speed(100.0, 1, "a test", 16)


def config_of(*overrides: str) -> Config:
    return load_config("places2", ["train.gpus=true", *overrides])


def plan_of(*overrides: str, speed: Speed | None = GPU, **machines: Any) -> Plan:
    config = config_of(*overrides)
    given = {"workers": 1, "gpus": True} | machines
    return make_plan(config, IMAGES, MASKS, Machines(**given), speed, config.train.steps)


# Time and money.


def test_hours_money_and_epochs_follow_from_steps_batch_and_speed() -> None:
    plan = plan_of("train.steps=90000", "train.batch_size=16", "cost.gpu_hour=2.5")
    assert plan.hours == pytest.approx(4.0)
    assert plan.cost is not None
    assert cost_text(plan.cost) == "4.0 GPU-hours, 10.00 USD (at 2.50 an hour)"
    assert plan.epochs == pytest.approx(14.4)


def test_more_gpus_take_less_time_and_more_money_by_their_efficiency() -> None:
    one, eight = plan_of(), plan_of(workers=8, efficiency=0.8)
    assert one.hours is not None
    assert eight.hours == pytest.approx(one.hours / 8 / 0.8)
    assert one.cost is not None
    assert eight.cost is not None
    assert eight.cost.gpu_hours == pytest.approx(one.cost.gpu_hours / 0.8)


def test_a_speed_of_many_workers_already_has_their_efficiency() -> None:
    plan = plan_of(speed=replace(GPU, workers=8), workers=8, efficiency=0.5)
    assert plan.rates is not None
    assert plan.rates.images_per_second == pytest.approx(800.0)


@pytest.mark.parametrize(
    ("machines", "slowest", "rate"),
    [
        ({}, "GPU", 100.0),
        ({"cores": 0.01}, "CPU decode", 0.01 / 0.49e-3),
        ({"storage_mb": 1.0}, "storage", 1e6 / (32_000 + 2_500)),
    ],
)
def test_the_slowest_part_is_the_bottleneck_and_decides_the_time(
    machines: dict[str, float], slowest: str, rate: float
) -> None:
    plan = plan_of(**machines)
    assert plan.rates is not None
    assert plan.rates.bottleneck == slowest
    assert plan.hours == pytest.approx(200_000 * 16 / rate / 3600)


def test_storage_does_not_matter_where_every_machine_keeps_all_shards() -> None:
    kept = plan_of("train.cache=/cache", "train.cache_gb=4", storage_mb=1.0)
    assert kept.rates is not None
    assert kept.rates.bottleneck == "GPU"
    small = plan_of("train.cache=/cache", "train.cache_gb=3", storage_mb=1.0)
    assert small.rates is not None
    assert small.rates.bottleneck == "storage"


def test_the_cores_that_a_gpu_needs_follow_from_its_speed_and_the_size_of_an_image() -> None:
    assert plan_of().cores_per_worker == pytest.approx(0.049)
    larger = plan_of("images.size=512", "masks.size=512")
    assert larger.cores_per_worker == pytest.approx(4 * 0.049)


def test_an_interruption_costs_half_a_checkpoint_interval_and_the_restart_on_all_workers() -> None:
    plan = plan_of("train.checkpoint_every=1000", "cost.gpu_hour=2", workers=4, restart_s=100.0,
                   efficiency=1.0)  # fmt: skip
    lost = plan.interruption
    assert lost is not None
    assert (lost.steps, lost.most_steps) == (500, 1000)
    assert lost.seconds == pytest.approx(500 * 16 / 400 + 100)
    assert lost.cost.money == pytest.approx(2 * 4 * 120 / 3600)


def test_without_a_speed_there_are_no_hours_and_the_plan_says_what_to_give() -> None:
    plan = plan_of(speed=None)
    assert (plan.hours, plan.cost, plan.interruption, plan.table) == (None, None, None, [])
    assert "give --images-per-second" in plan_text(plan)


# Requests and storage.


def test_the_parts_of_an_upload_are_those_of_the_store() -> None:
    assert PART == STORE_PART
    assert [puts(size) for size in (1, PART, PART + 1, 4 * PART)] == [1, 1, 4, 6]


def test_the_requests_of_a_build_are_those_that_a_server_receives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    received: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: received.append(record.getMessage())  # type: ignore[method-assign]
    log = logging.getLogger("werkzeug")
    folder = photographs(tmp_path / "photos", 40)
    with moto_server() as server:
        server.use(monkeypatch)
        server.make_bucket()
        root = server.fresh_root()
        store = open_store(root)
        config = small(
            f"images.source={folder}", "images.mode=center-crop", "images.shard_samples=5",
            "masks.train=40", "masks.eval_per_bin=2", "masks.shard_samples=10",
        )  # fmt: skip
        plan = plan_config(config, store, Given())
        monkeypatch.setattr(log, "handlers", [handler])
        monkeypatch.setattr(log, "propagate", False)
        for stage, build in (
            ("images", lambda: prepare_images(config.images, store)),
            ("masks", lambda: prepare_masks(config.masks, store)),
        ):
            received.clear()
            build()
            methods = Counter(re.findall(r'"(?:\x1b\[\d+m)*([A-Z]+) /', "\n".join(received)))
            writes = methods["PUT"] + methods["POST"]
            reads = methods["GET"] + methods["HEAD"]
            assert plan.requests[stage] == Requests(reads, writes), stage


def test_masks_that_are_made_count_as_committed_whatever_training_they_are_for(
    tmp_path: Path,
) -> None:
    store = LocalStore(tmp_path / "root")
    drawn = ("masks.train=40", "masks.eval_per_bin=2", "masks.shard_samples=10")
    prepare_masks(small(*drawn).masks, store)
    plan = plan_config(small(*drawn, "train.steps=60"), store, Given(images=1000))
    assert plan.masks.is_committed
    assert plan.masks.source.startswith(f"{store.label}/masks/")
    assert plan.requests["masks"].writes == 0
    other = plan_config(small(*drawn, "masks.train=50"), store, Given(images=1000))
    assert not other.masks.is_committed


def test_every_epoch_reads_each_shard_and_its_index_once() -> None:
    def reads(*overrides: str) -> int:
        return plan_of("train.validation_pairs=1", "train.validate_every=1000000", *overrides)\
            .requests["train"].reads  # fmt: skip

    # 16 samples a step: 6,250 steps are one epoch of the images and five of the masks.
    validation = 2 * (12_500 - 6_250) / 1_000_000
    more = reads("train.steps=12500") - reads("train.steps=6250")
    assert more == pytest.approx(2 * (100 + 5 * 10) + validation, abs=1)
    cached = reads("train.steps=12500", "train.cache=/c") - reads(
        "train.steps=6250", "train.cache=/c"
    )
    assert cached == pytest.approx(100 + 5 * 10 + validation, abs=1)  # the indexes only


def test_requests_and_storage_have_their_prices() -> None:
    free = plan_of()
    assert (free.request_money, free.storage_money) == (0, 0)
    plan = plan_of("cost={s3_reads_1000: 0.001, s3_writes_1000: 1, storage_gb_month: 0.02}")
    reads = sum(each.reads for each in plan.requests.values())
    writes = sum(each.writes for each in plan.requests.values())
    assert plan.request_money == pytest.approx(reads * 1e-6 + writes * 1e-3)
    stored = IMAGES.bytes + MASKS.bytes + 4 * STATE_BYTES["base"]
    assert plan.storage_money == pytest.approx(0.02 * stored / 1e9)


@pytest.mark.parametrize("name", ["tiny", "base"])
def test_the_size_of_a_checkpoint_is_that_of_a_real_state(name: str) -> None:
    state = TrainState(preset(name), TrainSettings(), torch.device("cpu"))
    for module, optimizer in (
        (state.generator, state.generator_optimizer),
        (state.discriminator, state.discriminator_optimizer),
    ):
        for weight in module.parameters():
            weight.grad = torch.zeros_like(weight)
        optimizer.step()
    state.keep_best(1.0)
    buffer = io.BytesIO()
    torch.save(state.to_dict(), buffer)
    assert STATE_BYTES[name] == pytest.approx(len(buffer.getvalue()), rel=0.03)


# The table.


def test_the_table_trains_on_each_image_as_often_as_the_config_does() -> None:
    plan = plan_of("train.steps=6250", efficiency=0.8)  # one epoch
    by_images = {row.images: row for row in plan.table}
    assert list(by_images) == [10**5, 10**6, 10**7, 10**8]
    row = by_images[10**6]
    assert row.hours[1] == pytest.approx(1e6 / 100 / 3600)
    assert row.hours[64] == pytest.approx(1e6 / 100 / 64 / 0.8 / 3600)
    assert row.steps == 62_500
    assert row.shards == pytest.approx(1_000, rel=0.01)
    assert row.bytes == pytest.approx(32e9)


def test_the_table_marks_where_storage_limits_many_gpus() -> None:
    plan = plan_of(storage_mb=50.0)
    row = plan.table[0]
    assert (row.bottlenecks[1], row.bottlenecks[64]) == ("GPU", "storage")
    assert "in hours; s: limited by storage. Each" in plan_text(plan)  # no mark that is not used
    assert row.hours[64] == row.hours[32]
    (line,) = [line for line in plan_text(plan).splitlines() if line.strip().startswith("10^5")]
    assert line.endswith(" s")
    assert line.count(" s") == 2  # of 32 and of 64 GPUs


# Where figures come from.


def record(step: int, **more: Any) -> dict[str, Any]:
    """A hundred images in 30 seconds on four workers, a sixth of them for validation."""
    figures = {"images": 100, "workers": 4, "seconds": 25.0, "other_seconds": 5.0}
    return {"kind": "train", "step": step, **figures, **more}


def ran(
    store: LocalStore, folder: str, config: Config, log: list[dict[str, Any]], **status: Any
) -> None:
    """Write the files of a run with `config` that a speed is read from."""
    about = {"size": config.masks.size, "gpus": config.train.gpus, "time": 1.0, **status}
    resolved = {"model": config.model.model_dump()}
    store.write(f"{folder}/status.json", json.dumps(about).encode())
    store.write(f"{folder}/resolved-config.yaml", yaml.safe_dump(resolved).encode())
    lines = "".join(json.dumps(each) + "\n" for each in log)
    store.write(f"{folder}/log.jsonl", lines.encode())


def small(*overrides: str) -> Config:
    sizes = [f"images.size={SIZE}", f"masks.size={SIZE}", "train.batch_size=2"]
    return load_config("demo", ["train.steps=300", *sizes, *overrides])


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "root")


@pytest.fixture
def data(store: LocalStore) -> tuple[StageRef, StageRef]:
    return real_data(store)


def cpu_hours(plan: Plan | None) -> float:
    assert plan is not None
    assert plan.cost is not None
    return plan.cost.cpu_hours


def test_the_plan_uses_the_speed_of_the_newest_run_with_the_same_network_size_and_device(
    store: LocalStore, data: tuple[StageRef, StageRef]
) -> None:
    config = small("cost={cpu_hour: 0.1, currency: EUR}")
    slow = [record(10, images=1)]
    ran(store, "runs/old-1", config, slow, time=5.0)
    ran(store, "runs/good-1", config, [record(10), record(20)], time=6.0)
    ran(store, "runs/larger-1", small("images.size=128", "masks.size=128"), slow, time=7.0)
    ran(store, "runs/other-1", small("model.preset=base"), slow, time=8.0)
    ran(store, "runs/gpu-1", small("train.gpus=true"), slow, time=9.0)
    ran(store, "runs/begun-1", config, [], time=10.0)
    plan = plan_here(config, store, *data)
    assert cpu_hours(plan) == pytest.approx(300 * 2 / 100 * 120 / 3600)
    assert plan is not None
    assert plan.cost is not None
    assert cost_text(plan.cost) == "0.20 worker-hours, 0.02 EUR (at 0.10 an hour)"
    assert "measured in" in plan_text(plan)
    assert "runs/good-1" in plan_text(plan)


def test_without_such_a_run_the_speed_is_that_of_the_benchmarks_with_machine_and_date(
    store: LocalStore, data: tuple[StageRef, StageRef]
) -> None:
    ran(store, "runs/a-1", small(), [record(10)])
    store.write("runs/a-1/resolved-config.yaml", b"model: [")
    plan = plan_here(small(), store, *data)
    assert plan is not None
    assert plan.speed is not None
    assert plan.speed.images_per_second == pytest.approx(4 * 28.2)
    assert "2 cores of a Xeon at 2.5 GHz on 2026-11-26" in plan.speed.source
    assert "from 64 to 32 pixels" in plan.speed.source


def test_the_figures_of_the_benchmarks_are_on_the_page_of_performance() -> None:
    page = (Path(__file__).parents[4] / "docs/performance.md").read_text("utf-8")
    for speed in BENCHMARKS.values():
        assert f"| {speed.images_per_second:g} |" in page, speed.source


def test_hours_on_gpus_are_estimated_from_runs_on_gpus(
    store: LocalStore, data: tuple[StageRef, StageRef]
) -> None:
    config = small("train.gpus=true", "cost.gpu_hour=2.5")
    ran(store, "runs/a-1", config, [record(10, gpu_memory_gb=1.0)])
    plan = plan_here(config, store, *data)
    assert plan is not None
    assert plan.cost is not None
    assert cost_text(plan.cost) == "0.20 GPU-hours, 0.50 USD (at 2.50 an hour)"


def has_checkpoint(store: LocalStore, folder: str, step: int, wanted: dict[str, Any]) -> None:
    mark = {"format": FORMAT, "step": step, "score": None, "asked": wanted, "finished": ""}
    mark["files"] = {"state.pt": {}, "log.jsonl": {}}
    store.write(f"{folder}/step-{step:08d}/checkpoint.json", json.dumps(mark).encode())


def test_a_resumed_run_costs_only_the_remaining_steps_and_a_finished_one_nothing(
    store: LocalStore, data: tuple[StageRef, StageRef]
) -> None:
    config = small()
    ran(store, "runs/a-1", config, [record(10)])
    request, _ = plan_training(config.training(*data), store)
    has_checkpoint(store, request.folder, 225, requested(request))
    assert cpu_hours(plan_here(config, store, *data)) == pytest.approx(75 * 2 / 100 / 30)
    store.write(f"{request.folder}/manifest.json", b"{}")
    done = plan_here(config, store, *data)
    assert cpu_hours(done) == 0
    assert done is not None
    assert (done.steps, done.requests["train"].writes) == (0, 0)


def test_a_run_that_extends_another_costs_only_the_additional_steps(
    store: LocalStore, data: tuple[StageRef, StageRef]
) -> None:
    config, shorter = small("train.steps=500"), small()
    ran(store, "runs/a-1", config, [record(10)])
    request, _ = plan_training(shorter.training(*data), store)
    has_checkpoint(store, request.folder, 200, requested(request))
    assert cpu_hours(plan_here(config, store, *data)) == pytest.approx(300 * 2 / 100 / 30)


def finished_root(store: LocalStore, config: Config) -> tuple[StageRef, StageRef, Request]:
    """Build images and masks, and return them with the request of the training."""
    images, masks = prepare_images(config.images, store), prepare_masks(config.masks, store)
    return images, masks, plan_training(config.training(images, masks), store)[0]


def text_of(config: Config, store: LocalStore) -> str:
    return plan_text(plan_config(config, store, Given()))


def test_finished_stages_cost_nothing_and_a_finished_root_has_nothing_left_to_do(
    store: LocalStore, tmp_path: Path
) -> None:
    source = photographs(tmp_path / "photos")
    images_of = f"images={{source: {source}, name: small, size: {SIZE}, val: 0.1, test: 0.4}}"
    config = small(images_of, "masks.train=4", "masks.eval_per_bin=1", "evaluate.pictures=0")
    assert plan_config(config, store, Given()).finished == ()
    images, masks, request = finished_root(store, config)
    has_checkpoint(store, request.folder, 225, requested(request))
    plan = plan_config(config, store, Given())
    assert (plan.finished, plan.steps) == (("images", "masks"), 75)
    assert plan.masks.is_committed
    run = run_stage(store, request, trained_now)
    assert "train          no step is left" in text_of(config, store)
    evaluation = evaluate(config.evaluate, images, masks, run, store)
    store.write("mlflow.db", new_database().data)
    assert "nothing is left" not in text_of(config, store)
    register(config.registry, run, evaluation, store)
    assert text_of(config, store).startswith("demo: nothing is left to do, because all stages")
    Image.new("RGB", (SIZE, SIZE), "red").save(source / "new.png")
    assert "Nothing is started." in text_of(config, store)


def trained_now(work: Work) -> Produced:
    torch.manual_seed(0)
    generator = build_generator("tiny")
    return Produced(
        save_generator(work.store, work.folder, generator, {"size": SIZE}), {"steps": 300}
    )


def test_the_number_of_images_is_unknown_before_the_first_version(store: LocalStore) -> None:
    assert plan_here(small(), store) is None


@pytest.mark.parametrize("name", sorted(set(packaged_configs()) - {"demo"}))
def test_every_packaged_config_has_a_plan_without_root_and_source(name: str) -> None:
    plan = plan_config(load_config(name), None, Given())
    assert plan.hours is not None
    assert plan.machines.gpus
    assert sum(PUBLISHED[name].values()) == plan.images.photos
    assert f"published size of {name}" in plan.images.source
    text = plan_text(plan)
    assert "The source cannot be listed" in text
    assert "The config trains without GPUs (train.gpus)" in text
    assert max(map(len, text.splitlines())) <= WIDTH


def test_a_plan_writes_nothing_under_the_root(store: LocalStore) -> None:
    plan = plan_config(load_config("demo", ["images.max_tiles=2"]), store, Given())
    assert plan.images.photos == 15
    assert not store.folder.exists()


def test_given_images_have_the_sizes_of_the_source_if_it_can_be_listed(tmp_path: Path) -> None:
    folder = photographs(tmp_path / "photos", 30)
    config = small(f"images.source={folder}", "images.mode=center-crop")
    own = plan_config(config, None, Given())
    ten_times = plan_config(config, None, Given(images=300))
    assert ten_times.images.samples == 10 * own.images.samples
    assert ten_times.images.bytes == pytest.approx(10 * own.images.bytes, rel=0.01)
    assert "--images 300, in the proportions of" in ten_times.images.source


def test_without_source_and_number_the_plan_says_what_to_give(tmp_path: Path) -> None:
    config = load_config("demo", ["images.source=/no/such/photos"])
    with pytest.raises(ConfigError) as caught:
        plan_config(config, None, Given())
    assert "/no/such/photos does not exist" in str(caught.value)
    assert "give --images N" in str(caught.value)
    assert plan_config(config, None, Given(images=1000)).images.photos == 1000


@pytest.mark.parametrize(
    ("machines", "images", "said"),
    [
        ({"workers": 32}, IMAGES, "raise train.batch_size or plan with fewer GPUs"),
        (
            {"workers": 1},
            DataSize({"train": SplitSize(3, 1, 9)}, "a test"),
            "plan with more --images",
        ),
    ],
)
def test_contradictions_are_refused(machines: dict[str, Any], images: DataSize, said: str) -> None:
    config = config_of("train.batch_size=16")
    with pytest.raises(ConfigError, match=said):
        make_plan(config, images, MASKS, Machines(**machines, gpus=True), GPU, 10)


def test_fewer_samples_a_step_than_measured_are_pointed_out() -> None:
    assert "Here each has 2, and small steps are slower" in plan_text(plan_of(workers=8))
    assert "small steps" not in plan_text(plan_of())


def test_paths_and_options_are_not_broken_at_a_hyphen() -> None:
    path = "/data/" + "a-long-name-" * 8
    source = replace(GPU, source=f"measured in {path}")
    assert path in plan_text(plan_of(speed=source))


def test_the_page_has_every_fact_and_assumption_of_the_text() -> None:
    plan = plan_of("cost.gpu_hour=2")
    page = "\n".join(plan_markdown(plan))
    for each in ("bottleneck", "interruption", "time and cost", "S3 requests", "10^8"):
        assert each in page
    assert page.count("\n* ") == len(plan.assumptions)


# The command.


def test_the_command_prints_the_plan_and_its_json(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DPNET_ROOT", raising=False)
    assert main(["plan", "places2", "--gpus", "8", "--set", "cost.gpu_hour=2"]) == 0
    text = capsys.readouterr().out
    assert "on 8 GPUs" in text
    assert main(["plan", "places2", "--gpus", "8", "--set", "cost.gpu_hour=2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ok"]
    assert found["root"] is None
    assert found["rates"]["bottleneck"] == "GPU"
    assert found["cost"]["money"] == pytest.approx(2 * found["cost"]["gpu_hours"])
    assert found["images"]["samples"] == 2_168_460


@pytest.mark.parametrize(
    "options", [["--gpus", "0"], ["--images", "-1"], ["--cores", "nan"], ["--efficiency", "2"]]
)
def test_wrong_options_are_refused(options: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["plan", "places2", *options])
    assert caught.value.code == 2
