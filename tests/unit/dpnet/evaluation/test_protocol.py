"""The evaluation protocol: one definition of methods and metrics, and figures of known rows."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pytest

from dpnet.evaluation.protocol import METHODS, METRICS, Rows, count_empty, count_perfect, figures
from dpnet.export import model_card
from dpnet.pipeline import summary


def rows_of(values: dict[str, list[float]]) -> Rows:
    """Return rows of pairs with these hole PSNR values of DPNet in each ratio bin."""
    return [
        {"image": "a", "mask": f"{name}/{number}", "ratio_bin": name, "method": method}
        | dict.fromkeys(METRICS, 0.0)
        | {"hole_psnr": value if method == "dpnet" else 10.0}
        for name, of_bin in values.items()
        for number, value in enumerate(of_bin)
        for method in METHODS
    ]


def table_of(rows: Rows) -> pa.Table:
    return pa.Table.from_pylist(rows)


def figures_of(rows: Rows, digest: str) -> dict[str, Any]:
    return figures(table_of(rows), digest)


def test_all_tables_show_methods_and_metrics_in_the_same_way() -> None:
    assert summary.METHODS.items() <= METHODS.items()
    assert summary.METRICS.items() <= METRICS.items()
    assert model_card._METRICS.items() <= METRICS.items()


def test_the_headline_is_the_mean_of_the_bins_means() -> None:
    found = figures_of(rows_of({"0.01-0.10": [30.0, 32.0, 34.0], "0.10-0.20": [20.0]}), "digest")
    assert found["mean_over_bins"]["dpnet"]["hole_psnr"] == 26.0
    assert found["all"]["methods"]["dpnet"]["hole_psnr"]["mean"] == 29.0
    assert (found["all"]["pairs"], found["bins"]["0.01-0.10"]["pairs"]) == (4, 3)


def test_every_metric_has_a_mean_and_an_interval_for_every_method() -> None:
    found = figures_of(rows_of({"0.01-0.10": [30.0, 32.0]}), "digest")
    for of_method in found["bins"]["0.01-0.10"]["methods"].values():
        assert of_method.keys() == METRICS.keys()
        for figure in of_method.values():
            assert figure["low"] <= figure["mean"] <= figure["high"]
    assert found["bins"]["0.01-0.10"]["methods"]["telea"]["hole_psnr"]["mean"] == pytest.approx(10)


def test_perfect_holes_are_counted_for_each_method() -> None:
    assert count_perfect(table_of(rows_of({"0.01-0.10": [100.0, 99.0, 100.0]}))) == {
        "dpnet": 2,
        "smooth_fill": 0,
        "telea": 0,
        "navier_stokes": 0,
        "mean_fill": 0,
    }


def test_a_pair_with_an_empty_hole_has_no_hole_psnr_and_is_counted() -> None:
    rows = rows_of({"0.01-0.10": [30.0, 32.0, 99.0]})
    for row in rows[-len(METHODS) :]:
        row["hole_psnr"] = None
    found = figures_of(rows, "digest")
    assert found["all"]["methods"]["dpnet"]["hole_psnr"]["mean"] == 31.0
    assert found["mean_over_bins"]["dpnet"]["hole_psnr"] == 31.0
    assert found["paired"]["telea"]["hole_psnr"]["mean"] == 21.0
    assert count_empty(table_of(rows)) == 1
    assert count_perfect(table_of(rows))["dpnet"] == 0


def test_a_metric_without_any_value_has_no_figures() -> None:
    rows = [row | {"lpips": None} for row in rows_of({"0.01-0.10": [30.0, 32.0]})]
    found = figures_of(rows, "digest")
    assert "lpips" not in found["all"]["methods"]["dpnet"]
    assert "lpips" not in found["mean_over_bins"]["dpnet"]
    assert "lpips" not in found["paired"]["telea"]
    assert "ssim" in found["paired"]["telea"]


def test_a_paired_difference_is_that_of_the_same_pairs() -> None:
    """Pairs that differ a lot, and a method that is always 1 dB worse: there is no doubt."""
    rows = rows_of({"0.01-0.10": [20.0, 30.0, 50.0], "0.10-0.20": [11.0, 40.0]})
    for ours, theirs in zip(rows[:: len(METHODS)], rows[2 :: len(METHODS)], strict=True):
        theirs["hole_psnr"] = ours["hole_psnr"] - 1.0
    found = figures_of(rows, "digest")
    exactly = {"mean": 1.0, "low": 1.0, "high": 1.0}
    assert found["paired"]["telea"]["hole_psnr"] == exactly
    assert found["bins"]["0.10-0.20"]["paired"]["telea"]["hole_psnr"] == exactly
    wide = found["paired"]["mean_fill"]["hole_psnr"]
    assert wide["low"] < wide["mean"] < wide["high"]


def test_the_paired_difference_weighs_the_bins_equally() -> None:
    rows = rows_of({"0.01-0.10": [12.0] * 9, "0.10-0.20": [20.0]})
    found = figures_of(rows, "digest")
    # Without resampling within the bins, a resample could miss the second bin.
    assert found["paired"]["telea"]["hole_psnr"] == {"mean": 6.0, "low": 6.0, "high": 6.0}
    assert found["all"]["paired"]["telea"]["hole_psnr"]["mean"] == pytest.approx(2.8)
