"""The gate, against simulated models whose true difference is known."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from dpnet.registry.gate import METRICS, Decision, Scores, _student, bootstrap, decide

BINS = ("0.01-0.10", "0.10-0.20", "0.20-0.30", "0.30-0.40", "0.40-0.50", "0.50-0.60")


def rng(seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=seed))


def evaluated(each: int, **columns: NDArray[np.float64]) -> Scores:
    """Return the figures of `each` pairs in each bin."""
    bins = [name for name in BINS for _ in range(each)]
    return Scores([(f"i{n}", f"m{n}") for n in range(len(bins))], bins, columns)


def models(
    seed: int, each: int, psnr: float = 0.0, second: float = 0.0, metric: str = "ssim"
) -> tuple[Scores, Scores]:
    """Return a new model and a champion; `psnr` and `second` are the true differences.

    Difficulty is shared, and much larger than the noise of a model. The noise of the two metrics
    is correlated, as it is in truth, and has heavier tails than a normal one.
    """
    random, n = rng(seed), each * len(BINS)
    hard = random.normal(0, 4, n)

    def one(psnr: float, second: float) -> Scores:
        noise = random.standard_t(5, (2, n))
        own = 0.8 * noise[0] + 0.6 * noise[1]
        sign = METRICS[metric].sign
        values = {
            "hole_psnr": 25 + hard + 0.5 * noise[0] + psnr,
            metric: 0.8 + 0.02 * hard + sign * 0.01 * own + second,
        }
        return evaluated(each, **values)

    return one(psnr, second), one(0.0, 0.0)


def decided(seed: int, each: int, psnr: float = 0.0, second: float = 0.0) -> Decision:
    return decide(*models(seed, each, psnr, second), "version 1", rng(seed + 10_000_000))


@pytest.mark.parametrize("each", [2, 5, pytest.param(40, marks=pytest.mark.slow)])
def test_an_equal_model_is_promoted_in_at_most_five_percent(each: int) -> None:
    runs = 400
    promoted = sum(decided(seed, each).better for seed in range(runs))
    assert 0 < promoted <= 0.05 * runs


def test_a_clearly_better_model_is_promoted() -> None:
    assert all(decided(seed, 40, 0.3, 0.005).better for seed in range(50))


def test_a_clearly_worse_model_is_not_promoted() -> None:
    assert not any(decided(seed, 40, -0.3, -0.005).better for seed in range(50))


def test_a_gain_in_one_metric_does_not_buy_a_loss_in_the_other() -> None:
    decision = decided(1, 40, 0.5, -0.01)
    assert not decision.better
    assert decision.reason.startswith("It is worse than version 1: hole PSNR +0.")


def test_the_interval_holds_the_true_mean_in_95_percent() -> None:
    for rows in (5, 12, 240):
        inside = 0
        for seed in range(500):
            table = rng(seed).normal(1.0, 2.0, (rows, 1))
            _, low, high = bootstrap(table, rng(seed + 1_000_000))[:, 0]
            inside += low <= 1.0 <= high
        assert 0.92 * 500 <= inside <= 0.985 * 500, rows


@pytest.mark.parametrize(
    ("freedom", "true"), [(3, 3.1824), (5, 2.5706), (11, 2.2010), (39, 2.0227), (10**6, 1.96)]
)
def test_students_quantile_is_that_of_the_tables(freedom: int, true: float) -> None:
    assert _student(freedom) == pytest.approx(true, rel=5e-3)


def pair(
    psnr: list[float], other: list[float], **more: tuple[list[float], list[float]]
) -> Decision:
    """Compare two models with these hole PSNRs for two pairs of each bin."""
    columns = {"hole_psnr": (psnr, other), "ssim": ([0.9] * 12, [0.9] * 12), **more}
    new, old = (
        evaluated(2, **{name: np.asarray(both[k]) for name, both in columns.items()})
        for k in (0, 1)
    )
    return decide(new, old, "version 3", rng(0))


def test_one_ratio_bin_beyond_the_margin_stops_a_model_that_is_better_overall() -> None:
    base = [25.0] * 12
    better = [26.0] * 12
    assert pair(better, base).better
    for loss, allowed in ((0.04, True), (0.05, True), (0.07, False)):
        mixed = [25.0 - loss] * 2 + [25.2] * 10
        decision = pair(mixed, base)
        assert decision.differences["all"]["hole_psnr"].low > 0
        assert decision.better is allowed, loss
    assert decision.reason == (
        "It is worse than version 3 in the ratio bin 0.01-0.10: hole PSNR -0.07 dB (-0.07 to"
        " -0.07). Over all pairs: hole PSNR +0.15 dB (+0.08 to +0.21), SSIM +0.0000 (+0.0000 to"
        " +0.0000)."
    )


def test_a_loss_of_lpips_in_one_bin_beyond_the_margin_stops_a_model() -> None:
    worse, same = [0.103] * 2 + [0.09] * 10, [0.1] * 12
    decision = pair([26.0] * 12, [25.0] * 12, lpips=(worse, same))
    assert not decision.better
    assert "in the ratio bin 0.01-0.10: LPIPS +0.0030" in decision.reason


def test_lower_lpips_is_better() -> None:
    same, less = [0.10] * 12, [0.08] * 12
    base = [25.0] * 12
    assert pair(base, base, lpips=(less, same)).better
    assert not pair(base, base, lpips=(same, less)).better


def test_ssim_decides_where_one_model_has_no_lpips() -> None:
    base, low, high = [25.0] * 12, [0.1] * 12, [0.9] * 12
    lost = [float("nan"), *[0.1] * 11]
    better = {"ssim": ([0.95] * 12, high)}
    decision = pair(base, base, lpips=(lost, low), **better)
    assert decision.better
    assert set(decision.differences["all"]) == {"hole_psnr", "ssim"}
    assert set(pair(base, base, lpips=(low, low)).differences["all"]) == {"hole_psnr", "lpips"}


def test_a_gain_that_rounding_hides_does_not_count() -> None:
    decision = pair([25.004] * 12, [25.0] * 12)
    assert not decision.better
    assert decision.reason == (
        "It is not clearly better than version 3: hole PSNR +0.00 dB (+0.00 to +0.00), SSIM"
        " +0.0000 (+0.0000 to +0.0000)."
    )
    assert pair([25.006] * 12, [25.0] * 12).better


def test_pairs_without_a_hole_are_left_out() -> None:
    nan = float("nan")
    decision = pair([nan, 26.0, *[26.0] * 10], [nan, 25.0, *[25.0] * 10])
    assert decision.better
    assert "0.01-0.10" not in decision.differences  # one pair has no interval
    assert decision.differences["all"]["hole_psnr"].mean == 1.0


def test_one_pair_decides_nothing() -> None:
    one = Scores([("i", "m")], ["all"], {"hole_psnr": np.ones(1), "ssim": np.ones(1)})
    two = Scores([("i", "m")], ["all"], {"hole_psnr": np.zeros(1), "ssim": np.zeros(1)})
    assert decide(one, two, "version 1", rng(0)).reason == (
        "There are fewer than two pairs to compare it with version 1."
    )


def test_other_pairs_are_not_compared() -> None:
    new, old = models(0, 2)
    moved = Scores([*new.pairs[1:], new.pairs[0]], new.bins, new.values)
    with pytest.raises(ValueError, match="different pairs"):
        decide(moved, old, "version 1", rng(0))


def test_the_same_figures_and_generator_give_the_same_decision() -> None:
    one, other = decided(3, 5, 0.1), decided(3, 5, 0.1)
    assert one == other
    assert one.to_json()["all"]["hole_psnr"].keys() == {"mean", "low", "high"}
