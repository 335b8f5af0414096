"""The summary at the end of a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from data_prep.core.manifest import StageRef
from data_prep.core.storage.local import LocalStore
from dpnet.pipeline.summary import as_text, figures_text, stages_text, summarize

SPLITS = {"splits": {"train": {"samples": 100_000, "shards": 9}, "val": {"samples": 7}}}
SUMMARIES: dict[str, dict[str, Any]] = {
    "images": {**SPLITS, "failed": 12},
    "masks": SPLITS,
    "train": {"steps": 600, "resumed_from": 250, "gpu_hours": 3.21, "cpu_hours": 0.0},
    "evaluate": {"pairs": 240},
    "register": {"model": "dpnet", "version": 3, "alias": "challenger", "reason": "Not better."},
}
FIGURES = {
    method: {"hole_psnr": psnr, "psnr": 30.0, "ssim": 0.91234, "l1": 1.234}
    for method, psnr in (
        ("dpnet", 23.456),
        ("telea", 24.0),
        ("mean_fill", 20.0),
        ("smooth_fill", 23.0),
    )
}


@pytest.fixture
def summary(tmp_path: Path) -> dict[str, Any]:
    store = LocalStore(tmp_path)
    bins = {
        name: {
            "pairs": 2000,
            "methods": {m: {k: {"mean": v} for k, v in f.items()} for m, f in FIGURES.items()},
        }
        for name in ("0.01-0.10", "0.10-0.20")
    }
    report = {"pairs": 4000, "figures": {"bins": bins, "mean_over_bins": FIGURES}}
    store.write("evaluations/abc/report.json", json.dumps(report).encode())
    refs = [
        StageRef(stage, "x", f"{stage}/abc", "1" * 64, "2" * 64, 754.26, False, SUMMARIES[stage])
        for stage in SUMMARIES
    ]
    folders = [r.folder if r.stage != "evaluate" else "evaluations/abc" for r in refs]
    refs = [StageRef(**{**r.to_json(), "folder": f}) for r, f in zip(refs, folders, strict=True)]
    return summarize("demo", store, refs, 125.04)


def test_the_summary_contains_the_figures_of_each_method_by_bin_and_as_means(
    summary: dict[str, Any],
) -> None:
    assert summary["bins"]["0.10-0.20"]["telea"] == {
        "hole_psnr": 24.0,
        "ssim": 0.91234,
        "l1": 1.234,
    }
    assert summary["mean_over_bins"]["dpnet"]["hole_psnr"] == 23.456
    assert json.loads(json.dumps(summary)) == summary


def test_the_text_shows_output_digest_model_report_time_and_the_next_commands(
    summary: dict[str, Any],
) -> None:
    text = as_text(summary, "dpnet demo")
    for expected in (
        "train     done  754.3 s  train/abc        222222222222  600 steps, resumed at 250",
        "100007 images, 12 failed",
        "dpnet version 3, challenger: Not better.",
        f"{summary['root']}/evaluations/abc/report.html",
        "training    3.2 GPU-hours",
        "2 min 5 s",
        "dpnet demo --set train.steps=3000",
    ):
        assert expected in text


def test_the_tables_are_aligned_and_at_most_100_columns_wide(summary: dict[str, Any]) -> None:
    rows = figures_text(summary).splitlines()
    assert len({len(row) for row in rows[1:]}) == 1
    assert all(len(row) <= 100 for row in (*rows, *stages_text(summary["stages"]).splitlines()))
