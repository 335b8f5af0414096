"""The evaluation protocol: its definitions in words, and the way from single results to figures.

The texts of PROTOCOL and of `not_computed` are content of report.json. So a change of a word there
gives another content digest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from data_prep.core.digest import sha256_bytes

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    from numpy.typing import NDArray

    Values = NDArray[np.float64]

Rows = list[dict[str, Any]]  # of metrics.parquet: one for each pair and method

OURS = "dpnet"
METHODS = {  # that every evaluation measures
    "dpnet": "DPNet",
    "smooth_fill": "Smooth fill",  # an input of DPNet's decoder: DPNet learns the difference
    "telea": "Telea",
    "navier_stokes": "Navier-Stokes",
    "mean_fill": "Mean fill",
}


class Metric(NamedTuple):
    """The way in which a metric is shown."""

    label: str
    digits: int  # after the point
    higher_is_better: bool


METRICS = {  # with a mean and an interval in the figures
    "hole_psnr": Metric("hole PSNR, dB", 2, True),
    "psnr": Metric("PSNR, dB", 2, True),
    "ssim": Metric("SSIM", 4, True),
    "l1": Metric("L1, %", 2, False),
    "lpips": Metric("LPIPS", 4, False),  # if its weights are to hand
}
BRIEF = ("hole_psnr", "ssim", "l1")  # the metrics of model cards
SUMMARY = ("hole_psnr", "ssim", "lpips")  # those of a run's summary

FULL_RANK = 2048  # pairs; with fewer, the covariance of the features has not its full rank

PROTOCOL_VERSION = 3  # increase it with a definition below: then all is measured again
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
    "LPIPS": "The learned distance of Zhang et al. (CVPR 2018), version 0.1: AlexNet's features of"
    " the whole composite and of the truth, at the picture's own size, with the heads that"
    " torchmetrics ships; lower is better.",
    "Bins": "By the mask's share of hole pixels: above the lower bound, up to the upper. The"
    " headline is the mean of the bins' means.",
    "Intervals": "95 % percentile bootstrap of the mean, 1,000 resamples of the pairs.",
    "Paired difference": "DPNet's value minus the other method's on the same pair. Its mean over"
    " the bins has an interval from resamples within each bin. Where it holds 0, the pairs do not"
    " show which one is better.",
    "Peers": "Smooth fill: pull-push, the fill without weights that DPNet's decoder is shown."
    " Mean fill: the mean colour of the picture's known pixels. Telea, Navier-Stokes:"
    " OpenCV's inpainting by fast marching and by fluid dynamics, radius 3. Other models are judged"
    " in the same way, on the pixels of their results that are in the hole.",
}
SET_METRICS = {  # of all pairs together, from the features of Inception
    "fid": Metric("FID", 2, False),
    "p_ids": Metric("P-IDS, %", 2, True),
    "u_ids": Metric("U-IDS, %", 2, True),
}
# Their definitions, for the reports that have them.
SET_PROTOCOL = {
    "FID": "Squared Fréchet distance (Heusel et al., NeurIPS 2017) between Gaussians of the"
    " Inception features (2015-12-05, 2,048 values, images scaled to 299 pixels as TensorFlow 1"
    " does) of all composites and of their truths, in float64; lower is better. It has a bias that"
    " falls with the number of pairs, so compare only figures of the same pairs.",
    "P-IDS, U-IDS": "Zhao et al. (ICLR 2021): scikit-learn's linear support vector machine learns"
    " to tell the same features of composites and truths apart. U-IDS is the share that it gets"
    " wrong, P-IDS the share of pairs whose composite looks more real to it than the truth; both in"
    " percent, 50 is perfect. Of more than 20,000 pairs it sees 20,000, evenly spread.",
}
NO_INCEPTION = (
    "needs the official Inception weights, which do not come with the package: name their file"
    " (pt_inception-2015-12-05-6726825d.pth) in evaluate.inception_weights; no substitute is taken."
)
NO_LPIPS_WEIGHTS = (
    "needs the weights of AlexNet: name their file in evaluate.lpips_weights, or set"
    " evaluate.allow_downloads to true; no substitute is taken."
)


def methods_with(peers: Sequence[str]) -> dict[str, str]:
    """Return the methods of an evaluation with their labels: ours, other models, simple ones."""
    return {OURS: METHODS[OURS], **{name: name for name in peers}, **METHODS}


def not_computed(lpips: str | None, inception: str | None) -> list[dict[str, str]]:
    """Return the metrics that were not computed, each with the reason.

    Args:
        lpips: why LPIPS was not computed, or None if it was.
        inception: the same of FID, P-IDS and U-IDS.
    """
    reasons = {"LPIPS": lpips, "FID": inception, "P-IDS, U-IDS": inception}
    return [{"metric": name, "reason": reason} for name, reason in reasons.items() if reason]


Figure = dict[str, float]  # a mean with its interval: mean, low, high


def figures(table: pa.Table, pairs_digest: str) -> dict[str, Any]:
    """Return means and 95 % intervals by ratio bin and over all pairs, and the means over the bins.

    `paired` has the intervals of the differences, DPNet's value minus that of each other method on
    the same pair. A metric without any value is left out. A pair without a value, because its hole
    is empty, is left out of that metric. The digest of the pairs decides on the resamples. All
    methods and metrics share them.

    Args:
        table: the rows of metrics.parquet: for each pair one for each method, in one order.
        pairs_digest: digest of the pairs.
    """
    import numpy as np

    columns = columns_of(table)
    metrics = [m for m in METRICS if not all(_empty(values[m]) for values in columns.values())]
    groups = pairs_by_bin(table)
    bins = {
        name: _Group(columns, metrics, at, f"bootstrap/{pairs_digest}/{name}")
        for name, at in groups.items()
    }
    everything = np.arange(table.num_rows // len(columns))
    return {
        "bins": {name: group.figures() for name, group in bins.items()},
        "all": _Group(columns, metrics, everything, f"bootstrap/{pairs_digest}/all").figures(),
        **_over_bins(list(bins.values()), list(columns), metrics),
    }


def columns_of(table: pa.Table) -> dict[str, dict[str, Values]]:
    """Return the values by method and metric, in the order of the pairs; NaN is no value."""
    methods: list[str] = []
    for each in table["method"]:
        if each.as_py() in methods:
            break
        methods.append(each.as_py())
    values = {metric: table[metric].cast("float64").to_numpy() for metric in METRICS}
    return {
        method: {metric: values[metric][number :: len(methods)] for metric in METRICS}
        for number, method in enumerate(methods)
    }


def pairs_by_bin(table: pa.Table) -> dict[str, NDArray[np.int64]]:
    """Return the positions of the pairs of each ratio bin, by the bin's name in their order."""
    import numpy as np

    count = len(columns_of(table))
    names = table["ratio_bin"].combine_chunks().dictionary_encode()
    number = names.indices.to_numpy()[::count]
    found = {
        name: np.flatnonzero(number == n) for n, name in enumerate(names.dictionary.to_pylist())
    }
    return dict(sorted(found.items()))


def _empty(values: Values) -> bool:
    import numpy as np

    return bool(np.isnan(values).all())


class _Group:
    """The values of a group of pairs, and the means of their resamples.

    `means` and `resampled` have a key (method, metric) for each method, and (method, metric,
    "paired") for DPNet's difference to each other method.
    """

    def __init__(
        self,
        columns: Mapping[str, Mapping[str, Values]],
        metrics: Sequence[str],
        at: NDArray[np.int64],
        stream: str,
    ) -> None:
        import numpy as np

        from dpnet.evaluation.metrics import bootstrap_means

        self.pairs = len(at)
        values: dict[tuple[str, ...], Values] = {
            (m, k): columns[m][k][at] for m in columns for k in metrics
        }
        values |= {
            (m, k, "paired"): values[OURS, k] - values[m, k]
            for m in columns
            if m != OURS
            for k in metrics
        }
        self.means = {key: float(np.nanmean(own)) for key, own in values.items() if not _empty(own)}
        kept = [values[key] for key in self.means]
        self.resampled = dict(zip(self.means, bootstrap_means(kept, _random(stream)), strict=True))

    def figures(self) -> dict[str, Any]:
        """Return the means and intervals: {"pairs": …, "methods": …, "paired": …}."""
        from dpnet.evaluation.metrics import percentile_interval

        found: dict[str, Any] = {"pairs": self.pairs, "methods": {}, "paired": {}}
        for (method, metric, *paired), mean in self.means.items():
            part = found["paired" if paired else "methods"].setdefault(method, {})
            interval = percentile_interval(mean, self.resampled[method, metric, *paired])
            part[metric] = interval._asdict()
        return found


def _over_bins(
    bins: Sequence[_Group], methods: Sequence[str], metrics: Sequence[str]
) -> dict[str, Any]:
    """Return the means of the bins' means, and the intervals of the paired differences.

    Resampling within each bin keeps the bins' weights equal.
    """
    import numpy as np

    from dpnet.evaluation.metrics import percentile_interval

    means: dict[str, dict[str, float]] = {method: {} for method in methods}
    paired: dict[str, dict[str, Figure]] = {m: {} for m in methods if m != OURS}
    for method in methods:
        for metric in metrics:
            own = [b.means[method, metric] for b in bins if (method, metric) in b.means]
            means[method][metric] = sum(own) / len(own)
            if method == OURS:
                continue
            key: tuple[str, ...] = (method, metric, "paired")
            known = [b for b in bins if key in b.means]
            mean = sum(b.means[key] for b in known) / len(known)
            resampled = np.mean([b.resampled[key] for b in known], axis=0)
            paired[method][metric] = percentile_interval(mean, resampled)._asdict()
    return {"mean_over_bins": means, "paired": paired}


def _random(stream: str) -> np.random.Generator:
    import numpy as np

    return np.random.Generator(np.random.Philox(key=int(sha256_bytes(stream.encode())[:32], 16)))


def count_perfect(table: pa.Table) -> dict[str, int]:
    """Count the holes that each method filled perfectly."""
    from dpnet.evaluation.metrics import perfect

    return {method: perfect(own["hole_psnr"]) for method, own in columns_of(table).items()}


def count_empty(table: pa.Table) -> int:
    """Count the pairs whose hole is empty. They have no hole PSNR."""
    import numpy as np

    return int(np.isnan(columns_of(table)[OURS]["hole_psnr"]).sum())


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
    for method, values in set_figures(report).items():
        means["all"][method] |= {metric: round(value, 4) for metric, value in values.items()}
    return {
        "pairs": report["pairs"],
        "pairs_digest": report["pairs_digest"],
        "hole_psnr": means["mean_over_bins"]["dpnet"]["hole_psnr"],
        "figures": means,
        "report": "report.html",
    }


def set_figures(report: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Return FID, P-IDS and U-IDS by method; nothing if they were not computed."""
    found = report.get("sets")  # reports of earlier versions have none
    return {} if found is None else {m: dict(own) for m, own in found["methods"].items()}


def set_notes(report: Mapping[str, Any]) -> list[str]:
    """Return sentences about the use of FID, P-IDS and U-IDS that readers have to know."""
    found = report.get("sets")
    if found is None:
        return []
    notes = []
    if not found["official"]:
        notes.append(
            "The Inception weights are not the published file, so compare these figures only with"
            f" others of the same file (SHA-256 {found['inception']})."
        )
    if found["pairs"] < FULL_RANK:
        notes.append(
            f"{found['pairs']:,} pairs are fewer than the {FULL_RANK:,} features, so the FID is"
            " much too uncertain to be compared with published ones."
        )
    return notes


def label_in_sentence(label: str) -> str:
    """Return a method's label as it stands inside a sentence: "the smooth fill", "Telea"."""
    return f"the {label.lower()}" if label.endswith(" fill") else label


def verdict(report: Mapping[str, Any]) -> str:
    """Return in one sentence whether DPNet is better than the methods without learning.

    The intervals of the paired differences in hole PSNR decide: a method is better or worse only if
    its interval does not hold 0.
    """
    found = report["figures"]["paired"]
    paired = {
        label_in_sentence(label): found[method]["hole_psnr"]
        for method, label in METHODS.items()
        if method != OURS
    }
    worse = [label for label, own in paired.items() if own["high"] < 0]
    level = [label for label, own in paired.items() if own["low"] <= 0 <= own["high"]]
    if worse:
        return f"In hole PSNR, DPNet is worse than {_listed(worse)}: train longer."
    if level:
        return f"In hole PSNR, DPNet is no better than {_listed(level)}: train longer."
    return "In hole PSNR, DPNet is better than every baseline."


def _listed(names: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def difference_text(figure: Mapping[str, float], digits: int) -> str:
    """Return a paired difference with its interval: "+0.12 (+0.03 to +0.20)"."""
    texts = [f"{figure[name]:+.{digits}f}" for name in ("mean", "low", "high")]
    mean, low, high = (text if float(text) else text[1:] for text in texts)  # no "-0.00"
    return f"{mean} ({low} to {high})"
