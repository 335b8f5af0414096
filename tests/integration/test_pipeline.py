"""The whole flow as the command runs it: real Prefect, real Ray with two workers, real MLflow."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_prep.core.storage.local import LocalStore
from dpnet.pipeline.config import load_config
from dpnet.pipeline.cost import estimated, measured
from dpnet.pipeline.exporter import RootReader
from dpnet.pipeline.settings import CostSettings
from dpnet.tracking.run_log import read_log

pytestmark = pytest.mark.integration

STAGES = ["images", "masks", "train", "evaluate", "register"]
CONFIG = """
name: handful
images: {source: PHOTOS, name: handful, mode: tiles, size: 32, tile: 32, val: 0.2, test: 0.2}
masks: {name: handful, size: 32, train: 32, eval_per_bin: 2}
model: {preset: tiny}
train:
  {steps: 4, batch_size: 4, warmup_steps: 1, validate_every: 2, validation_pairs: 6,
   checkpoint_every: 2, workers: 2}
evaluate: {pictures: 1}
"""


@dataclass(frozen=True)
class Ran:
    status: int
    result: dict[str, Any]
    err: str


def run(*argv: str) -> Ran:
    """`dpnet ARGV --json` in a process of its own, without the user's Prefect settings."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "RAY_", "DPNET_"))}
    done = subprocess.run(
        [sys.executable, "-m", "dpnet", *argv, "--json"],
        env=env,
        capture_output=True,
        text=True,
        timeout=500,
    )
    return Ran(done.returncode, json.loads(done.stdout.splitlines()[-1]), done.stderr)


@dataclass(frozen=True)
class Pipeline:
    config: str
    root: Path
    first: Ran
    second: Ran

    def rows(self, query: str) -> list[Any]:
        """Rows of the embedded server's database."""
        with sqlite3.connect(self.root / "prefect" / "prefect.db") as database:
            return [row[0] for row in database.execute(query)]


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    folder = tmp_path_factory.mktemp("pipeline")
    rng = np.random.Generator(np.random.Philox(0))
    (folder / "photos").mkdir()
    for number in range(5):
        coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
        picture = coarse.resize((96, 96), Image.Resampling.BICUBIC)
        # Of these names the hashes give each split a photograph, of which nothing need be said.
        picture.save(folder / "photos" / f"m{number}.png")
    (folder / "photos" / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 no picture")
    config = folder / "handful.yaml"
    config.write_text(CONFIG.replace("PHOTOS", str(folder / "photos")))
    again = ("pipeline", "run", str(config), "--root", str(folder / "root"))
    return Pipeline(str(config), folder / "root", run(*again), run(*again))


def test_every_stage_is_done_once_and_skipped_the_second_time(pipeline: Pipeline) -> None:
    assert (pipeline.first.status, pipeline.second.status) == (0, 0), pipeline.first.err
    for ran, skipped in ((pipeline.first, False), (pipeline.second, True)):
        assert [stage["stage"] for stage in ran.result["stages"]] == STAGES
        assert {stage["skipped"] for stage in ran.result["stages"]} == {skipped}
    digests = [
        [(stage["folder"], stage["content_digest"]) for stage in ran.result["stages"]]
        for ran in (pipeline.first, pipeline.second)
    ]
    assert digests[0] == digests[1]


def test_nothing_but_progress_is_said_on_standard_error(pipeline: Pipeline) -> None:
    ours = ("starting", "images: splits", "prepare ", "masks", "train", "evaluate", "register")
    ours += ("1 file",)
    for ran in (pipeline.first, pipeline.second):
        assert [line for line in ran.err.splitlines() if not line.startswith(ours)] == []


def test_the_summary_has_figures_of_every_method_and_names_the_model(pipeline: Pipeline) -> None:
    result = pipeline.first.result
    for row in (*result["bins"].values(), result["mean_over_bins"]):
        for method in ("dpnet", "mean_fill", "telea"):
            assert row[method]["hole_psnr"] > 0
            assert row[method]["ssim"] <= 1
            assert row[method]["l1"] >= 0
    assert Path(result["report"]).read_text("utf-8").startswith("<!doctype html>")
    assert result["registered"]["model"] == "dpnet"
    assert (result["registered"]["version"], result["registered"]["alias"]) == (1, "champion")


def test_a_broken_photograph_is_counted_and_the_others_go_on(pipeline: Pipeline) -> None:
    images = pipeline.first.result["stages"][0]
    assert images["summary"]["failed"] == 1
    assert images["summary"]["photographs"] == 5


def test_prefect_records_each_stage_as_a_task_and_shows_the_summary(pipeline: Pipeline) -> None:
    assert pipeline.rows("select state_name from flow_run") == ["Completed"] * 2
    tasks = sorted(name.rsplit("-", 1)[0] for name in pipeline.rows("select name from task_run"))
    stages = ["evaluate", "prepare images", "prepare masks", "register", "train"]
    assert tasks == sorted(stages * 2)
    (artifact, *_) = pipeline.rows("select data from artifact where key = 'summary'")
    assert "hole PSNR" in json.loads(artifact)
    states = pipeline.rows("select state_name from task_run")
    assert sorted(states) == ["Completed"] * 5 + ["Skipped"] * 5


def test_what_training_has_cost_is_known_and_so_is_what_more_of_it_would(
    pipeline: Pipeline,
) -> None:
    store, train = LocalStore(pipeline.root), pipeline.first.result["stages"][2]
    log = read_log(store, train["folder"])
    assert {record["workers"] for record in log if record["kind"] == "train"} == {2}
    cost = measured(store, train["folder"], CostSettings())
    assert cost.cpu_hours == pytest.approx(train["summary"]["cpu_hours"], abs=1e-6)
    assert cost.cpu_hours > 0
    longer = estimated(load_config(pipeline.config, ["train.steps=400"]), store)
    assert longer is not None
    assert longer.cpu_hours == pytest.approx(100 * cost.cpu_hours)


def test_prometheus_is_told_of_the_training_the_dataset_and_the_champion(
    pipeline: Pipeline,
) -> None:
    reader = RootReader(LocalStore(pipeline.root))
    told = {(each.name, each.labels): each.value for each in reader.read(0)}
    run = (pipeline.first.result["stages"][2]["folder"].removeprefix("runs/"),)
    assert told["dpnet_train_step", run] == told["dpnet_train_steps", run] == 4
    assert told["dpnet_train_claimed", run] == 0
    assert told["dpnet_train_images_per_second", run] > 0
    assert told["dpnet_validation_hole_psnr", run] > 0
    assert told["dpnet_dataset_failed", ("handful",)] == 1
    assert told["dpnet_champion_version", ("dpnet",)] == 1


def test_the_chain_verifies_from_the_registered_model(pipeline: Pipeline) -> None:
    ran = run("verify", "models:/dpnet@champion", "--root", str(pipeline.root))
    assert (ran.status, ran.result["ok"]) == (0, True)
    assert ran.result["stages"] == 5


def test_the_registered_model_fills_a_photograph_of_another_size(
    pipeline: Pipeline, tmp_path: Path
) -> None:
    photo = np.full((41, 67, 3), 90, np.uint8)
    mask = np.zeros((41, 67), np.uint8)
    mask[10:20, 30:50] = 255
    Image.fromarray(photo).save(tmp_path / "photo.png")
    Image.fromarray(mask).save(tmp_path / "mask.png")
    names = [str(tmp_path / name) for name in ("photo.png", "mask.png")]
    ran = run("inpaint", *names, "-o", str(tmp_path / "out.png"), "--root", str(pipeline.root))
    assert ran.status == 0, ran.err
    filled = np.asarray(Image.open(tmp_path / "out.png"))
    assert (filled[mask == 0] == photo[mask == 0]).all()


def test_a_failing_stage_is_one_sentence_and_a_failed_flow_run(
    pipeline: Pipeline, tmp_path: Path
) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for number in range(4):  # an empty folder never reaches the flow
        (photos / f"{number}.jpg").write_bytes(b"no picture")
    root = tmp_path / "root"
    source = f"images.source={photos}"
    ran = run("pipeline", "run", pipeline.config, "--root", str(root), "--set", source)
    assert ran.status == 1
    assert ran.result["ok"] is False
    assert f"image files in {photos} that were tried cannot be used" in ran.result["error"]
    assert ran.err.splitlines()[-1] == f"dpnet: {ran.result['error']}"
    assert "Traceback" not in ran.err
    failed = Pipeline(pipeline.config, root, ran, ran)
    assert failed.rows("select state_name from flow_run") == ["Failed"]
    messages = failed.rows("select message from log")
    assert ran.result["error"] in messages
    assert not any("Traceback" in text for text in messages)


def test_a_single_stage_runs_without_prefect_and_finds_the_same_work(pipeline: Pipeline) -> None:
    ran = run("evaluate", pipeline.config, "--root", str(pipeline.root))
    assert ran.status == 0, ran.err
    assert [stage["stage"] for stage in ran.result["stages"]] == STAGES[:4]
    assert all(stage["skipped"] for stage in ran.result["stages"])
    assert pipeline.rows("select count(*) from flow_run") == [2]
