"""The whole flow as the command runs it, with real Prefect, Ray (two workers) and MLflow."""

from __future__ import annotations

import json
import os
import re
import sqlite3
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_prep.core.manifest import load_reference
from data_prep.core.storage.local import LocalStore
from dpnet.loading.shard_files import find_shards
from dpnet.pipeline.config import load_config
from dpnet.pipeline.cost import measured
from dpnet.pipeline.plan_facts import Given, plan_config, plan_here
from dpnet.pipeline.root_metrics import RootReader
from dpnet.pipeline.settings import CostSettings
from dpnet.tracking.run_log import read_log

pytestmark = [pytest.mark.integration, pytest.mark.slow]

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
register: {promote: always}  # four steps need not beat the mean fill
"""


@dataclass(frozen=True)
class Ran:
    status: int
    result: dict[str, Any]
    err: str


def run(*argv: str) -> Ran:
    """Run `dpnet ARGV --json` in a process, without the user's Prefect settings."""
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
        """Return the first column of a query to the embedded server's database."""
        with sqlite3.connect(self.root / "prefect" / "prefect.db") as database:
            return [row[0] for row in database.execute(query)]


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    folder = tmp_path_factory.mktemp("pipeline")
    rng = np.random.Generator(np.random.Philox(0))
    (folder / "photos").mkdir()
    for number in range(5):
        coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
        photo = coarse.resize((96, 96), Image.Resampling.BICUBIC)
        # The hashes of these names put a photo into each split, so nothing is reported.
        photo.save(folder / "photos" / f"m{number}.png")
    (folder / "photos" / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 not an image")
    config = folder / "handful.yaml"
    config.write_text(CONFIG.replace("PHOTOS", str(folder / "photos")))
    again = ("pipeline", "run", str(config), "--root", str(folder / "root"))
    return Pipeline(str(config), folder / "root", run(*again), run(*again))


def test_every_stage_runs_once_and_is_skipped_the_second_time(pipeline: Pipeline) -> None:
    assert (pipeline.first.status, pipeline.second.status) == (0, 0), pipeline.first.err
    for ran, skipped in ((pipeline.first, False), (pipeline.second, True)):
        assert [stage["stage"] for stage in ran.result["stages"]] == STAGES
        assert {stage["skipped"] for stage in ran.result["stages"]} == {skipped}
    digests = [
        [(stage["folder"], stage["content_digest"]) for stage in ran.result["stages"]]
        for ran in (pipeline.first, pipeline.second)
    ]
    assert digests[0] == digests[1]


def test_standard_error_has_only_log_lines_of_our_packages(pipeline: Pipeline) -> None:
    ours = re.compile(r"[-\dT:]+Z (INFO|WARNING) (data_prep|dpnet|flows)\.[\w.]+: .")
    for ran in (pipeline.first, pipeline.second):
        assert ran.err
        assert [line for line in ran.err.splitlines() if not ours.match(line)] == []


def test_the_flow_runs_log_has_the_lines_of_the_stages_with_their_levels(
    pipeline: Pipeline,
) -> None:
    query = "select message from log where level = 20"
    assert any(text.startswith("train: done in ") for text in pipeline.rows(query))


def test_the_summary_has_the_figures_of_every_method_and_the_name_of_the_model(
    pipeline: Pipeline,
) -> None:
    result = pipeline.first.result
    for row in (*result["bins"].values(), result["mean_over_bins"]):
        for method in ("dpnet", "mean_fill", "telea"):
            # Black has 5 dB on these photos and noise 8; a perfect fill would be a mistake here.
            assert 8.5 < row[method]["hole_psnr"] < 60
            assert 0.1 < row[method]["ssim"] < 1
            assert 0 < row[method]["l1"] < 30
    assert Path(result["report"]).read_text("utf-8").startswith("<!doctype html>")
    assert result["registered"]["model"] == "dpnet"
    assert (result["registered"]["version"], result["registered"]["alias"]) == (1, "champion")


def test_a_broken_photo_is_counted_and_the_others_are_used(pipeline: Pipeline) -> None:
    images = pipeline.first.result["stages"][0]
    assert images["summary"]["failed"] == 1
    assert images["summary"]["photographs"] == 5


def test_prefect_has_a_task_for_each_stage_and_shows_the_summary(pipeline: Pipeline) -> None:
    assert pipeline.rows("select state_name from flow_run") == ["Completed"] * 2
    tasks = sorted(name.rsplit("-", 1)[0] for name in pipeline.rows("select name from task_run"))
    stages = ["evaluate", "prepare images", "prepare masks", "register", "train"]
    assert tasks == sorted(stages * 2)
    (artifact, *_) = pipeline.rows("select data from artifact where key = 'summary'")
    assert "hole PSNR" in json.loads(artifact)
    states = pipeline.rows("select state_name from task_run")
    assert sorted(states) == ["Completed"] * 5 + ["Skipped"] * 5


def test_the_cost_of_training_is_measured_and_the_cost_of_more_steps_estimated(
    pipeline: Pipeline,
) -> None:
    store, train = LocalStore(pipeline.root), pipeline.first.result["stages"][2]
    log = read_log(store, train["folder"])
    assert {record["workers"] for record in log if record["kind"] == "train"} == {2}
    cost = measured(store, train["folder"], CostSettings())
    assert cost.cpu_hours == pytest.approx(train["summary"]["cpu_hours"], abs=1e-6)
    assert cost.cpu_hours > 0
    longer = plan_here(load_config(pipeline.config, ["train.steps=400"]), store)
    assert longer is not None
    assert longer.cost is not None
    assert longer.cost.cpu_hours == pytest.approx(100 * cost.cpu_hours)


def test_a_plan_without_a_root_has_the_samples_shards_bytes_and_steps_of_the_stages(
    pipeline: Pipeline,
) -> None:
    store, stages = LocalStore(pipeline.root), pipeline.first.result["stages"]
    plan = plan_config(load_config(pipeline.config), None, Given())
    for made, planned in zip(stages[:2], (plan.images, plan.masks), strict=True):
        for split, size in planned.splits.items():
            shards = find_shards(store, load_reference(store, made["folder"]), split)
            tars = sum(shard.size for shard in shards.shards)
            assert (size.samples, size.shards) == (shards.samples, len(shards.shards))
            # Evaluation masks are taken to be as large as training masks.
            assert size.bytes == (pytest.approx(tars, rel=0.25) if split == "eval" else tars)
    log = read_log(store, stages[2]["folder"])
    assert plan.steps == max(record["step"] for record in log) == 4
    trained = sum(record["images"] for record in log if record["kind"] == "train")
    assert plan.epochs * plan.images.splits["train"].samples == pytest.approx(trained)


def test_the_page_of_a_run_has_the_plan_before_training(pipeline: Pipeline) -> None:
    plans = [
        json.loads(data)
        for data in pipeline.rows("select data from artifact where key = 'plan' order by created")
    ]
    assert "their number is unknown" in plans[0]
    assert "4 steps of 4 samples" in plans[1]
    assert "no step is left" in plans[-1]  # the second run found everything done


def test_the_exporter_has_metrics_of_the_training_the_dataset_and_the_champion(
    pipeline: Pipeline,
) -> None:
    reader = RootReader(LocalStore(pipeline.root))
    values = {(each.name, each.labels): each.value for each in reader.read(0)}
    run = (pipeline.first.result["stages"][2]["folder"].removeprefix("runs/"),)
    assert values["dpnet_train_step", run] == values["dpnet_train_steps", run] == 4
    assert values["dpnet_train_claimed", run] == 0
    assert values["dpnet_train_images_per_second", run] > 0
    last = [each for each in read_log(reader.store, f"runs/{run[0]}") if "hole_psnr" in each][-1]
    assert last["step"] == 4
    assert values["dpnet_validation_hole_psnr", run] == last["hole_psnr"]
    assert values["dpnet_dataset_failed", ("handful",)] == 1
    assert values["dpnet_champion_version", ("dpnet",)] == 1


def test_nobody_else_may_read_what_can_hold_a_secret(pipeline: Pipeline) -> None:
    found = [*pipeline.root.glob("mlflow.db*"), pipeline.root / "prefect"]
    found += (pipeline.root / "prefect").iterdir()
    assert {"mlflow.db", "prefect", "prefect.db", "lock", "storage", "server.log"} <= {
        path.name for path in found
    }
    assert [path for path in found if path.stat().st_mode & 0o077] == []


def test_all_stages_verify_from_the_registered_model(pipeline: Pipeline) -> None:
    ran = run("verify", "models:/dpnet@champion", "--root", str(pipeline.root))
    assert (ran.status, ran.result["ok"]) == (0, True)
    assert ran.result["stages"] == 5


def test_the_registered_model_fills_a_photo_of_another_size(
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


def test_a_failing_stage_is_one_sentence_of_error_and_a_failed_flow_run(
    pipeline: Pipeline, tmp_path: Path
) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for number in range(4):  # an empty folder is refused before the flow starts
        (photos / f"{number}.jpg").write_bytes(b"not an image")
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


def test_a_single_stage_runs_without_prefect_and_finds_the_finished_stages(
    pipeline: Pipeline,
) -> None:
    ran = run("evaluate", pipeline.config, "--root", str(pipeline.root))
    assert ran.status == 0, ran.err
    assert [stage["stage"] for stage in ran.result["stages"]] == STAGES[:4]
    assert all(stage["skipped"] for stage in ran.result["stages"])
    assert pipeline.rows("select count(*) from flow_run") == [2]
