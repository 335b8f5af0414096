"""Metrics, compared with other implementations and with values known by hand."""

import numpy as np
import pytest
from skimage.metrics import structural_similarity

from dpnet.evaluation.metrics import (
    bootstrap_mean,
    evaluate_pair,
    hole_l1,
    hole_psnr,
    hole_ssim,
    l1,
    perfect,
    psnr,
    ssim,
    ssim_map,
)

NO_HOLE = np.ones((40, 48), np.uint8)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture
def truth(rng) -> np.ndarray:
    smooth = np.cumsum(np.cumsum(rng.normal(size=(40, 48, 3)), 0), 1)
    return np.clip(128 + 6 * smooth, 0, 255).astype(np.uint8)


@pytest.fixture
def composite(truth, rng) -> np.ndarray:
    return np.clip(truth + rng.normal(0, 15, truth.shape), 0, 255).astype(np.uint8)


def flat(value: int) -> np.ndarray:
    return np.full((40, 48, 3), value, np.uint8)


@pytest.mark.parametrize(
    ("difference", "expected"), [(255, 0.0), (1, 48.1308), (10, 28.1308), (51, 13.9794)]
)
def test_psnr_of_a_constant_difference(difference: int, expected: float) -> None:
    assert psnr(flat(difference), flat(0)) == pytest.approx(expected, abs=1e-4)
    assert psnr(flat(0), flat(difference)) == psnr(flat(difference), flat(0))


def test_a_perfect_image_is_capped_at_100_db_and_counted() -> None:
    assert psnr(flat(7), flat(7)) == 100.0
    assert perfect([100.0, 99.9, psnr(flat(7), flat(7))]) == 2


def test_an_image_with_one_value_off_by_one_does_not_exceed_the_cap() -> None:
    big = np.zeros((2000, 2000, 3), np.uint8)
    near = big.copy()
    near[0, 0, 0] = 1
    assert psnr(near, big) == 100.0


@pytest.mark.parametrize(("difference", "expected"), [(0, 0.0), (255, 100.0), (51, 20.0)])
def test_l1_is_in_percent_of_255(difference: int, expected: float) -> None:
    assert l1(flat(difference), flat(0)) == pytest.approx(expected)
    assert l1(flat(0), flat(difference)) == pytest.approx(expected)


def test_hole_metrics_use_only_the_hole() -> None:
    valid = NO_HOLE.copy()
    valid[:4, :12] = 0  # 1/40 of the image
    composite = flat(100)
    composite[:4, :12] = 110
    assert hole_psnr(composite, flat(100), valid) == pytest.approx(28.1308, abs=1e-4)
    assert psnr(composite, flat(100)) == pytest.approx(28.1308 + 16.0206, abs=1e-4)
    assert hole_l1(composite, flat(100), valid) == pytest.approx(1000 / 255)
    assert l1(composite, flat(100)) == pytest.approx(1000 / 255 / 40)


def test_an_empty_hole_has_no_hole_metrics(composite, truth) -> None:
    found = evaluate_pair(composite, truth, NO_HOLE)
    assert [name for name, value in found.items() if value is None] == [
        "hole_psnr",
        "hole_ssim",
        "hole_l1",
    ]


def test_ssim_equals_that_of_scikit_image(composite, truth) -> None:
    expected, full = structural_similarity(
        composite,
        truth,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
        data_range=255,
        channel_axis=2,
        full=True,
    )
    assert 0.05 < expected < 0.95
    assert ssim(composite, truth) == pytest.approx(expected, abs=1e-10)
    assert np.abs(ssim_map(composite, truth) - full.mean(axis=2)).max() < 1e-10


def test_ssim_of_an_image_with_itself_is_one(truth) -> None:
    assert ssim(truth, truth) == pytest.approx(1.0, abs=1e-12)


def test_ssim_of_two_flat_images_is_the_luminance_term() -> None:
    c1 = 2.55**2
    assert ssim(flat(50), flat(100)) == pytest.approx((2 * 5000 + c1) / (2500 + 10000 + c1))


def test_ssim_excludes_windows_that_cross_the_border(truth) -> None:
    composite = truth.copy()
    composite[0] = 255 - composite[0]
    assert ssim(composite, truth) == pytest.approx(np.mean(ssim_map(composite, truth)[5:-5, 5:-5]))
    assert ssim(composite, truth) > np.mean(ssim_map(composite, truth))


def test_hole_ssim_is_the_map_over_the_hole_up_to_the_border(composite, truth) -> None:
    valid = NO_HOLE.copy()
    valid[:, :3] = 0
    expected = ssim_map(composite, truth)[:, :3].mean()
    assert hole_ssim(composite, truth, valid) == pytest.approx(expected, abs=1e-12)


def test_ssim_of_an_image_smaller_than_the_window_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least 11"):
        ssim(flat(0)[:10], flat(0)[:10])


def test_evaluating_a_pair_gives_every_metric_as_a_plain_float(composite, truth) -> None:
    valid = NO_HOLE.copy()
    valid[10:20, 10:30] = 0
    found = evaluate_pair(composite, truth, valid)
    assert all(type(value) is float for value in found.values())
    assert found == {
        "psnr": psnr(composite, truth),
        "hole_psnr": hole_psnr(composite, truth, valid),
        "ssim": ssim(composite, truth),
        "hole_ssim": hole_ssim(composite, truth, valid),
        "l1": l1(composite, truth),
        "hole_l1": hole_l1(composite, truth, valid),
    }


def test_the_bootstrap_interval_is_an_interval_of_the_mean(rng) -> None:
    values = rng.normal(20, 3, 400).tolist()
    mean, low, high = bootstrap_mean(values, np.random.default_rng(1))
    assert mean == pytest.approx(np.mean(values))
    half = 1.96 * np.std(values) / 20  # the normal approximation
    assert low == pytest.approx(mean - half, abs=0.06)
    assert high == pytest.approx(mean + half, abs=0.06)


def test_the_bootstrap_interval_has_the_level_that_is_asked_for(rng) -> None:
    values = rng.normal(20, 3, 400).tolist()
    for level, deviations in ((0.5, 0.674), (0.8, 1.282), (0.99, 2.576)):
        mean, low, high = bootstrap_mean(
            values, np.random.default_rng(1), level=level, resamples=4000
        )
        half = deviations * np.std(values) / 20
        assert (high - low) / 2 == pytest.approx(half, rel=0.1)
        assert (high + low) / 2 == pytest.approx(mean, abs=0.03)


def test_the_bootstrap_interval_follows_from_its_generator() -> None:
    values = [1.0, 2.0, 4.0, 8.0]
    first, again, other = (bootstrap_mean(values, np.random.default_rng(s)) for s in (1, 1, 2))
    assert first == again
    assert first != other


def test_the_bootstrap_interval_of_one_value_is_that_value() -> None:
    assert bootstrap_mean([3.5], np.random.default_rng(0)) == (3.5, 3.5, 3.5)


def test_the_mean_of_no_values_is_an_error() -> None:
    with pytest.raises(ValueError, match="no values"):
        bootstrap_mean([], np.random.default_rng(0))
