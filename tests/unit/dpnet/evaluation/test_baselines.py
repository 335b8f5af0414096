"""Methods without learning: what they change and what they do not see."""

import numpy as np
import pytest

from dpnet.evaluation.baselines import mean_fill, navier_stokes, smooth_fill, telea
from dpnet.evaluation.metrics import hole_psnr


@pytest.fixture
def image() -> np.ndarray:
    ramp = np.linspace(0, 255, 32).round().astype(np.uint8)
    return np.stack(
        [np.tile(ramp, (32, 1)), np.tile(ramp[:, None], 32), np.full_like(ramp, 9, shape=(32, 32))],
        2,
    )


@pytest.fixture
def valid() -> np.ndarray:
    valid = np.ones((32, 32), np.uint8)
    valid[10:20, 8:28] = 0
    return valid


@pytest.mark.parametrize("fill", [mean_fill, smooth_fill, telea, navier_stokes])
def test_known_pixels_are_untouched(fill, image, valid) -> None:
    composite = fill(image, valid)
    assert composite.dtype == np.uint8
    assert (composite[valid == 1] == image[valid == 1]).all()
    assert (composite[valid == 0] != image[valid == 0]).any()


@pytest.mark.parametrize("fill", [mean_fill, smooth_fill, telea, navier_stokes])
def test_pixels_under_the_hole_have_no_influence(fill, image, valid) -> None:
    other = image.copy()
    other[valid == 0] = 255 - other[valid == 0]
    assert (fill(other, valid) == fill(image, valid)).all()


@pytest.mark.parametrize("fill", [mean_fill, smooth_fill, telea, navier_stokes])
def test_inputs_stay_unchanged(fill, image, valid) -> None:
    image_before, valid_before = image.copy(), valid.copy()
    fill(image, valid)
    assert (image == image_before).all()
    assert (valid == valid_before).all()


@pytest.mark.parametrize("fill", [mean_fill, smooth_fill, telea, navier_stokes])
def test_without_a_hole_the_result_is_the_image(fill, image) -> None:
    assert (fill(image, np.ones((32, 32), np.uint8)) == image).all()


@pytest.mark.parametrize("fill", [mean_fill, smooth_fill, telea, navier_stokes])
def test_without_known_pixels_the_fill_is_mid_grey(fill, image) -> None:
    assert (fill(image, np.zeros((32, 32), np.uint8)) == 128).all()


def test_mean_fill_is_the_rounded_mean_of_the_known_pixels() -> None:
    image = np.zeros((2, 2, 3), np.uint8)
    image[0] = [[10, 20, 30], [13, 20, 31]]
    valid = np.array([[1, 1], [0, 0]], np.uint8)
    assert mean_fill(image, valid)[1].tolist() == [[12, 20, 30], [12, 20, 30]]


@pytest.mark.parametrize("fill", [telea, navier_stokes])
def test_opencvs_methods_do_not_depend_on_the_order_of_channels(fill, image, valid) -> None:
    swapped = np.ascontiguousarray(image[..., ::-1])
    assert (fill(swapped, valid)[..., ::-1] == fill(image, valid)).all()


@pytest.mark.parametrize("fill", [telea, navier_stokes])
def test_opencvs_methods_beat_mean_fill_on_a_smooth_image(fill, image, valid) -> None:
    quality = {f: hole_psnr(f(image, valid), image, valid) for f in (mean_fill, fill)}
    assert quality[fill] > quality[mean_fill] + 5


def test_navier_stokes_is_opencvs_method_of_that_name(image, valid) -> None:
    import cv2

    emptied = np.where(valid[..., None] > 0, image, np.uint8(0))
    theirs = cv2.inpaint(emptied, 1 - valid, 3, cv2.INPAINT_NS)
    assert (navier_stokes(image, valid)[valid == 0] == theirs[valid == 0]).all()
    assert (navier_stokes(image, valid) != telea(image, valid)).any()
