"""Frozen pairs: fixed by the digests and the seed, with images used equally often."""

from collections import Counter

import pytest

from data_prep.core.errors import PipelineError
from dpnet.loading.pairs import frozen_pairs


@pytest.mark.parametrize(
    ("images", "masks", "expected"),
    [
        (3, 0, []),
        (1, 3, [(0, 0), (0, 1), (0, 2)]),
        (4, 4, [(3, 0), (2, 1), (1, 2), (0, 3)]),
        (4, 6, [(3, 0), (2, 1), (1, 2), (0, 3), (2, 4), (3, 5)]),
    ],
)
def test_the_pairs_are_frozen(images: int, masks: int, expected: list[tuple[int, int]]) -> None:
    assert frozen_pairs("a", "b", 0, images, masks) == expected


@pytest.mark.parametrize(("images", "masks"), [(50, 20), (20, 20), (7, 100)])
def test_each_mask_has_one_image_and_images_are_used_equally_often(images: int, masks: int) -> None:
    pairs = frozen_pairs("a", "b", 1, images, masks)
    assert [mask for _, mask in pairs] == list(range(masks))
    uses = Counter(image for image, _ in pairs)
    assert set(uses) <= set(range(images))
    assert max(uses.values()) - min(uses[i] for i in range(images)) <= 1


def test_the_masks_of_a_bin_meet_different_images() -> None:
    pairs = frozen_pairs("a", "b", 0, 12, 6 * 12)
    bins = [{image for image, _ in pairs[start : start + 12]} for start in range(0, 72, 12)]
    assert all(len(images) == 12 for images in bins)


@pytest.mark.parametrize("other", [("x", "b", 0), ("a", "x", 0), ("a", "b", 1)])
def test_other_images_masks_or_seed_give_other_pairs(other: tuple[str, str, int]) -> None:
    assert frozen_pairs(*other, 100, 100) != frozen_pairs("a", "b", 0, 100, 100)


def test_a_split_without_images_is_an_error_with_advice() -> None:
    with pytest.raises(PipelineError, match="test split"):
        frozen_pairs("a", "b", 0, 0, 5)
