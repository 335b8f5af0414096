"""Metrics of a composite against the truth, on 8-bit RGB.

`composite` and `truth` are uint8 [H, W, 3]; `valid` is uint8 [H, W], 1 = known, 0 = hole.
Papers define metrics in different ways, so each function states its definition. A `hole_` metric
uses only the pixels of the hole, and is None for an image without a hole.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Image = NDArray[np.uint8]
Map = NDArray[np.float64]

PSNR_CAP = 100.0  # dB; a perfect image has no finite PSNR
SSIM_WINDOW = 11
SSIM_SIGMA = 1.5
SSIM_C1 = (0.01 * 255) ** 2
SSIM_C2 = (0.03 * 255) ** 2


class Interval(NamedTuple):
    """A mean and the ends of its confidence interval."""

    mean: float
    low: float
    high: float


def evaluate_pair(composite: Image, truth: Image, valid: Image) -> dict[str, float | None]:
    """Measure PSNR, SSIM and L1 of the whole composite and of the hole."""
    hole = valid == 0
    similarity = ssim_map(composite, truth)
    return {
        "psnr": psnr(composite, truth),
        "hole_psnr": hole_psnr(composite, truth, valid),
        "ssim": _interior_mean(similarity),
        "hole_ssim": float(similarity[hole].mean()) if hole.any() else None,
        "l1": l1(composite, truth),
        "hole_l1": hole_l1(composite, truth, valid),
    }


def psnr(composite: Image, truth: Image) -> float:
    """Return 10 log10(255² / MSE) in dB over all pixels and channels, at most PSNR_CAP."""
    return _psnr(_difference(composite, truth))


def hole_psnr(composite: Image, truth: Image, valid: Image) -> float | None:
    """Return the PSNR over the hole's pixels, all channels, or None for an empty hole.

    Training measures the same with `dpnet.training.validation.hole_psnr`, on batches of tensors
    that stay on the GPU. This one is exact in float64, since its figures are content. A test
    compares both.
    """
    hole = valid == 0
    return _psnr(_difference(composite, truth)[hole]) if hole.any() else None


def l1(composite: Image, truth: Image) -> float:
    """Return the mean |composite − truth| over all pixels and channels, in percent of 255."""
    return _l1(_difference(composite, truth))


def hole_l1(composite: Image, truth: Image, valid: Image) -> float | None:
    """Return L1 in percent over the hole's pixels, all channels, or None for an empty hole."""
    hole = valid == 0
    return _l1(_difference(composite, truth)[hole]) if hole.any() else None


def ssim(composite: Image, truth: Image) -> float:
    """Return the structural similarity (Wang et al., IEEE TIP 2004).

    It is the mean of `ssim_map` over the pixels with their whole 11 x 11 window inside the image.
    It equals scikit-image's `structural_similarity(gaussian_weights=True, sigma=1.5,
    use_sample_covariance=False, data_range=255, channel_axis=2)`. Other papers define it in
    another way: EdgeConnect uses grey images and a window of 51.
    """
    return _interior_mean(ssim_map(composite, truth))


def hole_ssim(composite: Image, truth: Image, valid: Image) -> float | None:
    """Return the mean of `ssim_map` over the hole, border included, or None for an empty hole."""
    hole = valid == 0
    return float(ssim_map(composite, truth)[hole].mean()) if hole.any() else None


def ssim_map(composite: Image, truth: Image) -> Map:
    """Return SSIM at each pixel, the mean of the three channels: float64 [H, W] in [-1, 1].

    Gaussian window 11 x 11 with σ 1.5, K1 0.01, K2 0.03, data range 255, population covariance.
    Beyond the border the image is mirrored, edge pixel included.
    """
    x, y = composite.astype(np.float64), truth.astype(np.float64)
    mean_x, mean_y = _blur(x), _blur(y)
    xx, yy, xy = mean_x * mean_x, mean_y * mean_y, mean_x * mean_y
    variances = _blur(x * x) - xx + _blur(y * y) - yy
    covariance = _blur(x * y) - xy
    values = ((2 * xy + SSIM_C1) * (2 * covariance + SSIM_C2)) / (
        (xx + yy + SSIM_C1) * (variances + SSIM_C2)
    )
    result: Map = values.mean(axis=2)
    return result


def perfect(psnr_values: Sequence[float] | Map) -> int:
    """Count the PSNR values that are at the cap. NaN is no value."""
    return int(np.sum(np.asarray(psnr_values) >= PSNR_CAP))


def bootstrap_mean(
    values: Sequence[float], rng: np.random.Generator, *, resamples: int = 1000, level: float = 0.95
) -> Interval:
    """Return the mean of `values` and its percentile bootstrap interval (Efron 1979).

    Args:
        values: at least one value.
        rng: draws the resamples.
        resamples: number of resamples.
        level: confidence level, between 0 and 1.

    Raises:
        ValueError: there are no values.
    """
    if len(values) == 0:
        raise ValueError("the mean of no values is not defined")
    data = np.asarray(values, dtype=np.float64)
    means = bootstrap_means([data], rng, resamples=resamples)[0]
    return percentile_interval(float(data.mean()), means, level)


def bootstrap_means(
    columns: Sequence[Map], rng: np.random.Generator, *, resamples: int = 1000
) -> Map:
    """Return the means of resamples of each column: float64 [columns, resamples].

    Args:
        columns: columns of equal length, at least 1. All are resampled at the same rows, so means
            of two columns may be compared one by one. NaN is left out of a mean.
        rng: draws the resamples.
        resamples: number of resamples.
    """
    length = len(columns[0])
    means = np.full((len(columns), resamples), np.nan)
    average = [np.nanmean if np.isnan(column).any() else np.mean for column in columns]
    # In several batches: all at once would need resamples x values indices in memory.
    some = max(1, min(resamples, 1_000_000 // length))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a resample of NaN alone has the mean NaN
        for start in range(0, resamples, some):
            at = rng.integers(0, length, (min(some, resamples - start), length))
            for number, column in enumerate(columns):
                means[number, start : start + some] = average[number](column[at], axis=1)
    return means


def percentile_interval(mean: float, means: Map, level: float = 0.95) -> Interval:
    """Return the interval between the percentiles of resampled means; NaN is left out."""
    low, high = np.nanquantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(mean, float(low), float(high))


def _difference(composite: Image, truth: Image) -> Map:
    return composite.astype(np.float64) - truth.astype(np.float64)


def _psnr(difference: Map) -> float:
    mse = float(np.mean(np.square(difference)))
    return PSNR_CAP if mse == 0 else min(PSNR_CAP, 10 * float(np.log10(255**2 / mse)))


def _l1(difference: Map) -> float:
    return float(np.mean(np.abs(difference))) / 255 * 100


def _interior_mean(similarity: Map) -> float:
    margin = SSIM_WINDOW // 2
    interior = similarity[margin:-margin, margin:-margin]
    if interior.size == 0:
        raise ValueError(f"SSIM needs an image of at least {SSIM_WINDOW} pixels a side")
    return float(interior.mean())


def _blur(values: Map) -> Map:
    import cv2

    window = (SSIM_WINDOW, SSIM_WINDOW)
    blurred: Map = cv2.GaussianBlur(values, window, SSIM_SIGMA, borderType=cv2.BORDER_REFLECT)
    return blurred
