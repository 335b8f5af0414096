"""The evaluation protocol: one definition of methods and metrics, and figures of known rows."""

from __future__ import annotations

import pytest

from dpnet.evaluation.protocol import METHODS, METRICS, Rows, count_perfect, figures
from dpnet.export import model_card
from dpnet.pipeline import summary


def rows_of(values: dict[str, list[float]]) -> Rows:
    """Return rows of pairs with these hole PSNR values of DPNet in each ratio bin."""
    return [
        {"ratio_bin": name, "method": method, **dict.fromkeys(METRICS, 0.0)}
        | {"hole_psnr": value if method == "dpnet" else 10.0}
        for name, of_bin in values.items()
        for value in of_bin
        for method in METHODS
    ]


def test_all_tables_show_methods_and_metrics_in_the_same_way() -> None:
    assert summary.METHODS.items() <= METHODS.items()
    assert summary.METRICS.items() <= METRICS.items()
    assert model_card._METRICS == summary.METRICS


def test_the_headline_is_the_mean_of_the_bins_means() -> None:
    found = figures(rows_of({"0.01-0.10": [30.0, 32.0, 34.0], "0.10-0.20": [20.0]}), "digest")
    assert found["mean_over_bins"]["dpnet"]["hole_psnr"] == 26.0
    assert found["all"]["methods"]["dpnet"]["hole_psnr"]["mean"] == 29.0
    assert (found["all"]["pairs"], found["bins"]["0.01-0.10"]["pairs"]) == (4, 3)


def test_every_metric_has_a_mean_and_an_interval_for_every_method() -> None:
    found = figures(rows_of({"0.01-0.10": [30.0, 32.0]}), "digest")
    for of_method in found["bins"]["0.01-0.10"]["methods"].values():
        assert of_method.keys() == METRICS.keys()
        for figure in of_method.values():
            assert figure["low"] <= figure["mean"] <= figure["high"]
    assert found["bins"]["0.01-0.10"]["methods"]["telea"]["hole_psnr"]["mean"] == pytest.approx(10)


def test_perfect_holes_are_counted_for_each_method() -> None:
    assert count_perfect(rows_of({"0.01-0.10": [100.0, 99.0, 100.0]})) == {
        "dpnet": 2,
        "smooth_fill": 0,
        "telea": 0,
        "mean_fill": 0,
    }
