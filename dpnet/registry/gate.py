"""The gate: whether a new model is better than the champion, by a paired bootstrap.

Both models filled the same holes, so the differences of single pairs are compared. They vary much
less than the figures themselves. The gate is a pure function of two tables of figures and a
generator.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

RESAMPLES, LEVEL = 1000, 0.95
ALL = "all"
_Z = 1.959963984540054  # the 97.5 % quantile of the normal distribution, for LEVEL
_INDICES = 1_000_000  # of one batch of resamples, to bound the memory


class Judged(NamedTuple):
    """The way in which the gate judges and shows a metric.

    Attributes:
        label: name and, after the value, unit.
        unit: with a blank before it, or "".
        digits: after the point. A difference that these digits do not show does not count.
        sign: 1 where higher is better, -1 where lower is better.
        margin: how much worse a ratio bin may be.
    """

    label: str
    unit: str
    digits: int
    sign: int
    margin: float


METRICS = {
    "hole_psnr": Judged("hole PSNR", " dB", 2, 1, 0.05),
    "lpips": Judged("LPIPS", "", 4, -1, 0.002),
    "ssim": Judged("SSIM", "", 4, 1, 0.002),
}


@dataclass(frozen=True)
class Scores:
    """The figures of one method, pair by pair.

    Attributes:
        pairs: (key of the image, key of the mask).
        bins: the ratio bin of each pair.
        values: float64 [pairs] by metric. NaN is not computed. `lpips` may be absent.
    """

    pairs: Sequence[tuple[str, str]]
    bins: Sequence[str]
    values: Mapping[str, NDArray[np.float64]]

    def has(self, metric: str) -> bool:
        """Return whether a metric was computed for every pair."""
        return metric in self.values and bool(np.isfinite(self.values[metric]).all())


class Difference(NamedTuple):
    """The mean difference (new - champion) and the ends of its interval, rounded as shown."""

    mean: float
    low: float
    high: float

    def worse(self, metric: Judged, margin: float = 0.0) -> bool:
        """Return whether the whole interval is worse than `margin`."""
        return max(metric.sign * self.low, metric.sign * self.high) < -margin

    def better(self, metric: Judged) -> bool:
        """Return whether the whole interval is better."""
        return min(metric.sign * self.low, metric.sign * self.high) > 0

    def text(self, metric: Judged) -> str:
        """Return the difference with its interval, for people."""
        mean, low, high = (f"{each:+.{metric.digits}f}" for each in self)
        return f"{metric.label} {mean}{metric.unit} ({low} to {high})"


@dataclass(frozen=True)
class Decision:
    """The decision about a new model, why, and the differences that decided.

    Attributes:
        better: whether it passed the gate.
        reason: one sentence.
        differences: by "all" and by ratio bin, then by metric. A bin without two pairs is absent.
    """

    better: bool
    reason: str
    differences: Mapping[str, Mapping[str, Difference]]

    def to_json(self) -> dict[str, Any]:
        """Return the differences with their intervals as JSON."""
        return {
            group: {metric: each._asdict() for metric, each in metrics.items()}
            for group, metrics in self.differences.items()
        }


def decide(new: Scores, champion: Scores, name: str, rng: np.random.Generator) -> Decision:
    """Decide whether a new model is better than the champion.

    It passes if in no ratio bin the 95 % interval of the difference of a metric is wholly worse
    than the metric's margin, and over all pairs the interval is wholly better in one metric and
    wholly worse in none. The metrics are hole PSNR, and LPIPS, or SSIM where one model has no
    LPIPS. The rule is ours. For equal models a metric's interval is wholly better in 2.5 % of the
    cases, so both together pass in at most 5 %.

    Args:
        new: the figures of the new model.
        champion: those of the champion, on the same pairs.
        name: of the champion, for the reason.
        rng: draws the resamples.

    Raises:
        ValueError: the pairs differ.
    """
    if list(new.pairs) != list(champion.pairs) or list(new.bins) != list(champion.bins):
        raise ValueError("the two models were evaluated on different pairs")
    second = "lpips" if new.has("lpips") and champion.has("lpips") else "ssim"
    metrics = ("hole_psnr", second)
    table = np.stack([new.values[m] - champion.values[m] for m in metrics], axis=1)
    known = np.isfinite(table).all(axis=1)
    bins = np.asarray(new.bins, dtype=object)
    groups = {ALL: known} | {each: known & (bins == each) for each in sorted(set(new.bins))}
    differences = {
        group: _differences(table[chosen], metrics, rng)
        for group, chosen in groups.items()
        if chosen.sum() > 1
    }
    better, reason = _judge(differences, name)
    return Decision(better, reason, differences)


def _judge(differences: Mapping[str, Mapping[str, Difference]], name: str) -> tuple[bool, str]:
    """Return whether the new model passes, and the reason in one sentence."""
    if ALL not in differences:
        return False, f"There are fewer than two pairs to compare it with {name}."
    overall = differences[ALL]
    shown = ", ".join(each.text(METRICS[metric]) for metric, each in overall.items())
    for metric, each in overall.items():
        if each.worse(METRICS[metric]):
            return False, f"It is worse than {name}: {shown}."
    for group, metrics in differences.items():
        for metric, each in metrics.items():
            if group != ALL and each.worse(METRICS[metric], METRICS[metric].margin):
                return False, (
                    f"It is worse than {name} in the ratio bin {group}:"
                    f" {each.text(METRICS[metric])}. Over all pairs: {shown}."
                )
    if not any(each.better(METRICS[metric]) for metric, each in overall.items()):
        return False, f"It is not clearly better than {name}: {shown}."
    return True, f"It is better than {name}: {shown}. No ratio bin is worse."


def _differences(
    table: NDArray[np.float64], metrics: Sequence[str], rng: np.random.Generator
) -> dict[str, Difference]:
    """Return mean and interval of each column of float64 [pairs, metrics]."""
    intervals = bootstrap(table, rng)
    return {
        metric: Difference(*(round(float(v), METRICS[metric].digits) + 0.0 for v in column))
        for metric, column in zip(metrics, intervals.T, strict=True)
    }


def bootstrap(table: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.float64]:
    """Return mean, low and high of each column: float64 [3, columns].

    It is the 95 % percentile interval of 1,000 resamples of the rows (Efron 1979), which all
    columns share. With few rows that interval is too narrow, so its ends are moved away from the
    mean by the factor of Student's interval: sqrt(n / (n - 1)) t / z (Hesterberg 2015, "What
    Teachers Should Know About the Bootstrap", does the same to the quantiles).

    Args:
        table: float64 [rows, columns], at least two rows.
        rng: draws the resamples.
    """
    rows = len(table)
    batch = max(1, min(RESAMPLES, _INDICES // rows))
    means = np.concatenate(
        [
            table[rng.integers(0, rows, (min(batch, RESAMPLES - start), rows))].mean(axis=1)
            for start in range(0, RESAMPLES, batch)
        ]
    )
    mean = table.mean(axis=0)
    ends = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
    stretch = math.sqrt(rows / (rows - 1)) * _student(rows - 1) / _Z
    return np.concatenate([mean[None], mean + stretch * (ends - mean)])


def _student(freedom: int) -> float:
    """Return the 97.5 % quantile of Student's t (Abramowitz and Stegun 1964, 26.7.5).

    From three degrees of freedom on it is within 0.5 % of the true value.
    """
    z, n = _Z, float(freedom)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / n**power for power, term in enumerate(terms, 1))
