"""The summary at the end of a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from data_prep.core.manifest import StageRef
from data_prep.core.storage.local import LocalStore
from dpnet.evaluation.protocol import NO_LPIPS_WEIGHTS, verdict
from dpnet.pipeline.summary import (
    as_markdown,
    as_text,
    figures_text,
    registered_text,
    stages_text,
    summarize,
)

SPLITS = {"splits": {"train": {"samples": 100_000, "shards": 9}, "val": {"samples": 7}}}
SUMMARIES: dict[str, dict[str, Any]] = {
    "images": {**SPLITS, "failed": 12},
    "masks": SPLITS,
    "train": {"steps": 600, "resumed_from": 250, "gpu_hours": 3.21, "cpu_hours": 0.0},
    "evaluate": {"pairs": 240},
    "register": {"model": "dpnet", "version": 3, "alias": "challenger", "reason": "Not better."},
}
FIGURES = {
    method: {"hole_psnr": psnr, "psnr": 30.0, "ssim": 0.91234, "l1": 1.234, "lpips": 0.12345}
    for method, psnr in (
        ("dpnet", 23.456),
        ("telea", 24.0),
        ("mean_fill", 20.0),
        ("smooth_fill", 23.0),
        ("navier_stokes", 22.0),
    )
}


def paired(**hole_psnr: tuple[float, float]) -> dict[str, Any]:
    """Return paired differences with these intervals of hole PSNR; others are clearly better."""
    ends = {m: (0.2, 0.6) for m in FIGURES if m != "dpnet"} | hole_psnr
    same = {"mean": -0.01, "low": -0.02, "high": 0.01}
    return {
        method: {
            "hole_psnr": {"mean": (low + high) / 2, "low": low, "high": high},
            "ssim": same,
            "lpips": same,
        }
        for method, (low, high) in ends.items()
    }


@pytest.fixture
def summary(tmp_path: Path) -> dict[str, Any]:
    return summary_of(tmp_path)


def summary_of(folder: Path, figures: dict[str, Any] = FIGURES, **hole_psnr: Any) -> Any:
    """Return the summary of a root with a report of these figures and paired differences."""
    store = LocalStore(folder)
    refs = [refs_of_stage(stage) for stage in SUMMARIES]
    store.write("evaluations/abc/report.json", json.dumps(report(figures, **hole_psnr)).encode())
    return summarize("demo", store, refs, 125.04)


def refs_of_stage(stage: str) -> StageRef:
    folder = "evaluations/abc" if stage == "evaluate" else f"{stage}/abc"
    return StageRef(stage, "x", folder, "1" * 64, "2" * 64, 754.26, False, SUMMARIES[stage])


def report(figures: dict[str, Any] = FIGURES, **hole_psnr: Any) -> dict[str, Any]:
    bins = {
        name: {
            "pairs": 2000,
            "methods": {m: {k: {"mean": v} for k, v in f.items()} for m, f in figures.items()},
        }
        for name in ("0.01-0.10", "0.10-0.20")
    }
    differences = paired(**hole_psnr)
    computed = "lpips" in figures["dpnet"]
    if not computed:
        for found in differences.values():
            del found["lpips"]
    return {
        "pairs": 4000,
        "figures": {"bins": bins, "mean_over_bins": figures, "paired": differences},
        "not_computed": [] if computed else [{"metric": "LPIPS", "reason": NO_LPIPS_WEIGHTS}],
    }


def test_the_summary_contains_the_figures_of_each_method_by_bin_and_as_means(
    summary: dict[str, Any],
) -> None:
    assert summary["bins"]["0.10-0.20"]["telea"] == {
        "hole_psnr": 24.0,
        "ssim": 0.91234,
        "lpips": 0.12345,
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


def test_the_text_compares_with_the_smooth_fill_and_telea_by_paired_differences(
    summary: dict[str, Any],
) -> None:
    text = as_text(summary, "dpnet demo")
    assert "Mean fill" not in text
    lines = text.splitlines()
    (row,) = [line for line in lines if line.startswith("Smooth fill")]
    assert "+0.40 (+0.20 to +0.60)" in row
    assert "-0.0100 (-0.0200 to +0.0100)" in row
    assert any(line.startswith("Telea  ") for line in lines)
    assert all(len(line) <= 100 for line in lines[: lines.index(summary["verdict"])][2:])
    assert summary["paired"]["telea"]["hole_psnr"] == {"mean": 0.4, "low": 0.2, "high": 0.6}


@pytest.mark.parametrize(
    ("hole_psnr", "says"),
    [
        ({}, "In hole PSNR, DPNet is better than every baseline."),
        (
            {"smooth_fill": (-0.1, 0.3)},
            "In hole PSNR, DPNet is no better than the smooth fill: train longer.",
        ),
        (
            {"smooth_fill": (-0.1, 0.3), "telea": (-0.3, 0.0)},
            "In hole PSNR, DPNet is no better than the smooth fill and Telea: train longer.",
        ),
        (
            {"smooth_fill": (-0.1, 0.3), "telea": (-0.3, -0.1), "navier_stokes": (-2, -1)},
            "In hole PSNR, DPNet is worse than Telea and Navier-Stokes: train longer.",
        ),
    ],
)
def test_the_verdict_comes_from_the_intervals(
    hole_psnr: dict[str, Any], says: str, tmp_path: Path
) -> None:
    summary = summary_of(tmp_path, **hole_psnr)
    assert summary["verdict"] == says
    assert f"\n{says}\n" in as_text(summary, "dpnet demo")
    store = LocalStore(tmp_path)
    page = as_markdown("demo", store, [refs_of_stage("evaluate")], "", {})
    assert f"**{says}**" in page


def test_another_model_has_no_part_in_the_verdict() -> None:
    found = report(telea=(0.1, 0.2))
    found["figures"]["paired"]["lama"] = {"hole_psnr": {"mean": -5, "low": -6, "high": -4}}
    assert verdict(found).endswith("better than every baseline.")


def test_lpips_that_was_not_computed_has_dashes_and_the_reason(tmp_path: Path) -> None:
    without = {m: {k: v for k, v in f.items() if k != "lpips"} for m, f in FIGURES.items()}
    summary = summary_of(tmp_path, without)
    assert summary["mean_over_bins"]["dpnet"]["lpips"] is None
    text = as_text(summary, "dpnet demo")
    assert "LPIPS is not computed: needs the weights of AlexNet: name their file" in text
    shown = text.splitlines()
    assert all(len(line) <= 100 for line in shown[shown.index(summary["verdict"]) - 3 :][:4])
    assert len({len(row) for row in figures_text(summary).splitlines()[1:]}) == 1
    page = as_markdown("demo", LocalStore(tmp_path), [refs_of_stage("evaluate")], "", {})
    assert "| LPIPS, by hole" not in page
    assert "LPIPS is not computed" in page


def test_the_page_of_the_run_shows_the_strongest_baselines(tmp_path: Path) -> None:
    summary_of(tmp_path)
    page = as_markdown("demo", LocalStore(tmp_path), [refs_of_stage("evaluate")], "", {})
    assert "| DPNet minus | hole PSNR, dB | SSIM | LPIPS |" in page
    assert "| Smooth fill | +0.40 (+0.20 to +0.60) |" in page
    assert "| LPIPS, by hole | pairs | DPNet | Smooth fill | Telea |" in page
    assert "Mean fill" not in page


@pytest.mark.parametrize(
    ("alias", "became", "step"),
    [
        (
            "champion",
            "became champion. Why.",
            "dpnet inpaint PHOTO MASK -o out.png --root 's3://b/",
        ),
        (
            "challenger",
            "became challenger, not champion. Why.",
            "dpnet registry promote 3 --model dpnet --why TEXT --root 's3://b/",
        ),
    ],
)
def test_a_registration_says_what_the_version_became_why_and_what_to_do_next(
    alias: str, became: str, step: str
) -> None:
    registered = {"model": "dpnet", "version": 3, "alias": alias, "reason": "Why."}
    text = "\n".join(registered_text(registered, "s3://b/my root"))
    assert text.startswith(f"dpnet version 3 {became}\n")
    assert step in text
    assert "dpnet registry show 3 --model dpnet --root 's3://b/my root'" in text


def test_fid_and_ids_are_a_table_of_their_own(tmp_path: Path) -> None:
    found = report()
    methods = {m: {"fid": 12.375, "p_ids": 10.0, "u_ids": 20.0} for m in FIGURES}
    found["sets"] = {"pairs": 400, "methods": methods, "official": True, "inception": "6726825d"}
    store = LocalStore(tmp_path)
    store.write("evaluations/abc/report.json", json.dumps(found).encode())
    summary = summarize("demo", store, [refs_of_stage(stage) for stage in SUMMARIES], 1.0)
    assert summary["sets"]["dpnet"] == {"fid": 12.375, "p_ids": 10.0, "u_ids": 20.0}
    text = as_text(summary, "dpnet demo")
    (row,) = [line for line in text.splitlines() if line.startswith("DPNet  ")]
    assert row.split() == ["DPNet", "12.38", "10.00", "20.00"]
    assert "400 pairs are fewer than the 2,048 features" in text
    page = as_markdown("demo", store, [refs_of_stage("evaluate")], "", {})
    assert "| all pairs together | FID | P-IDS, % | U-IDS, % |" in page
    assert "| Telea | 12.38 | 10.00 | 20.00 |" in page
    assert "400 pairs are fewer" in page
    assert "all pairs together" not in as_text(summary_of(tmp_path), "dpnet demo")
