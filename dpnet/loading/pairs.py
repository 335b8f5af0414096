"""Frozen evaluation pairs: the image that each mask is laid on.

The pairs follow from the content of both sets and a seed. So two models are always compared on the
same images with the same holes.
"""

from __future__ import annotations

from collections.abc import Sized

from data_prep.core.digest import sha256_bytes
from data_prep.core.errors import PipelineError


def frozen_pairs(
    images_digest: str, masks_digest: str, seed: int, images: int, masks: int
) -> list[tuple[int, int]]:
    """Return one `(image, mask)` pair of positions for each mask, in the order of the masks.

    The images are used in a random order, then in another one, until each mask has an image. Two
    images are used equally often, or one of them once more. Consecutive masks, such as those of a
    ratio bin, meet as many different images as possible.

    Args:
        images_digest: content digest of the images stage.
        masks_digest: content digest of the masks stage.
        seed: another seed gives other pairs.
        images: number of images.
        masks: number of masks.

    Raises:
        PipelineError: there are no images.
    """
    import numpy as np

    if images < 1:
        raise PipelineError(
            "there is no image to evaluate on: add photos to the test split of the dataset."
        )
    digest = sha256_bytes(f"pairs/{images_digest}/{masks_digest}/{seed}".encode())
    rng = np.random.Generator(np.random.Philox(key=int(digest[:32], 16)))
    order: list[int] = []
    while len(order) < masks:
        order += rng.permutation(images).tolist()
    return [(image, mask) for mask, image in enumerate(order[:masks])]


def validation_pairs(
    images: Sized, masks: Sized, digests: tuple[str, str], *, seed: int, count: int
) -> list[tuple[int, int]]:
    """Return at most `count` frozen pairs, spread evenly over the ratio bins.

    Args:
        images: the images; only their number counts.
        masks: the masks, sorted by ratio bin; only their number counts.
        digests: content digests of the images stage and of the masks stage.
        seed: another seed gives other pairs.
        count: the largest number of pairs, at least 1.
    """
    pairs = frozen_pairs(*digests, seed, len(images), len(masks))
    if count >= len(pairs):
        return pairs
    return [pairs[i * len(pairs) // count] for i in range(count)]
