"""The evaluation protocol: its definitions in words, and the way from single results to figures.

The texts of PROTOCOL and NOT_COMPUTED are content of report.json. So a change of a word there
gives another content digest.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from data_prep.core.digest import sha256_bytes

if TYPE_CHECKING:
    import numpy as np

Rows = list[dict[str, Any]]  # of metrics.parquet: one for each pair and method

METHODS = {
    "dpnet": "DPNet",
    "smooth_fill": "Smooth fill",  # an input of DPNet's decoder: DPNet learns the difference
    "telea": "Telea",
    "mean_fill": "Mean fill",
}


class Metric(NamedTuple):
    """How a metric is shown."""

    label: str
    digits: int  # after the point
    higher_is_better: bool


METRICS = {  # with a mean and an interval in the figures
    "hole_psnr": Metric("hole PSNR, dB", 2, True),
    "psnr": Metric("PSNR, dB", 2, True),
    "ssim": Metric("SSIM", 4, True),
    "l1": Metric("L1, %", 2, False),
}
BRIEF = ("hole_psnr", "ssim", "l1")  # the metrics of short tables

PROTOCOL_VERSION = 2  # increase it with a definition below: then all is measured again
PROTOCOL = {
    "Pairs": "Each mask of the evaluation set (or of as many as asked for, spread over the bins) is"
    " laid on one picture of the split. The digests of both sets and the seed decide on which, so"
    " that two models are always compared on the same pairs.",
    "Composite": "Known pixels of the picture, the method's in the hole; 8-bit RGB. All figures"
    " are of the composite against the truth.",
    "Hole PSNR": "10 log10(255² / MSE) over the hole's pixels and all channels, in dB; a perfect"
    " hole counts as 100 dB.",
    "PSNR": "The same over all pixels of the picture.",
    "SSIM": "Gaussian window 11 x 11 with σ 1.5, K1 0.01, K2 0.03, data range 255, mean of the"
    " three channels, over the pixels whose window lies inside the picture.",
    "L1": "Mean absolute difference over all pixels and channels, in percent of 255.",
    "Bins": "By the mask's share of hole pixels: above the lower bound, up to the upper. The"
    " headline is the mean of the bins' means.",
    "Intervals": "95 % percentile bootstrap of the mean, 1,000 resamples of the pairs.",
    "Peers": "Smooth fill: pull-push, the fill without weights that DPNet's decoder is shown."
    " Mean fill: the mean colour of the picture's known pixels. Telea: OpenCV's"
    " fast-marching inpainting, radius 3.",
}
_NO_WEIGHTS = (
    "needs the official {} weights, which do not come with the package; no substitute is taken."
)
NOT_COMPUTED = [
    {"metric": "LPIPS", "reason": _NO_WEIGHTS.format("AlexNet or VGG and LPIPS")},
    {"metric": "FID", "reason": _NO_WEIGHTS.format("Inception")},
    {"metric": "P-IDS, U-IDS", "reason": _NO_WEIGHTS.format("Inception")},
]


def figures(rows: Rows, pairs_digest: str) -> dict[str, Any]:
    """Return means and 95 % intervals by ratio bin and over all pairs, and the means over the bins.

    The digest of the pairs decides on the resamples. All methods and metrics share them.
    """
    from dpnet.evaluation.metrics import bootstrap_mean

    def of_group(name: str, group: Rows) -> dict[str, Any]:
        methods = {
            method: {
                metric: bootstrap_mean(
                    [row[metric] for row in group if row["method"] == method],
                    _random(f"bootstrap/{pairs_digest}/{name}"),
                )._asdict()
                for metric in METRICS
            }
            for method in METHODS
        }
        return {"pairs": len(group) // len(METHODS), "methods": methods}

    bins = {
        name: of_group(name, [row for row in rows if row["ratio_bin"] == name])
        for name in sorted({row["ratio_bin"] for row in rows})
    }
    means = {
        method: {
            metric: sum(b["methods"][method][metric]["mean"] for b in bins.values()) / len(bins)
            for metric in METRICS
        }
        for method in METHODS
    }
    return {"bins": bins, "all": of_group("all", rows), "mean_over_bins": means}


def _random(stream: str) -> np.random.Generator:
    import numpy as np

    return np.random.Generator(np.random.Philox(key=int(sha256_bytes(stream.encode())[:32], 16)))


def count_perfect(rows: Rows) -> dict[str, int]:
    """Count the holes that each method filled perfectly."""
    from dpnet.evaluation.metrics import perfect

    return {m: perfect([r["hole_psnr"] for r in rows if r["method"] == m]) for m in METHODS}


def summarise(report: Mapping[str, Any]) -> dict[str, Any]:
    """Return the figures without their intervals, for the registry and the summary of a run."""
    groups = {**report["figures"]["bins"], "all": report["figures"]["all"]}
    means = {
        name: {
            method: {metric: round(value["mean"], 4) for metric, value in values.items()}
            for method, values in group["methods"].items()
        }
        for name, group in groups.items()
    }
    over_bins = report["figures"]["mean_over_bins"]
    means["mean_over_bins"] = {
        method: {metric: round(value, 4) for metric, value in values.items()}
        for method, values in over_bins.items()
    }
    return {
        "pairs": report["pairs"],
        "pairs_digest": report["pairs_digest"],
        "hole_psnr": means["mean_over_bins"]["dpnet"]["hole_psnr"],
        "figures": means,
        "report": "report.html",
    }
