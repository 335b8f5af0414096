"""Frozen evaluation pairs: which image each mask is laid on.

The pairs follow from the content of both sets and a seed, so two models are always compared on the
same pictures with the same holes.
"""

from __future__ import annotations

from data_prep.core.digest import sha256_bytes
from data_prep.core.errors import PipelineError


def frozen_pairs(
    images_digest: str, masks_digest: str, seed: int, images: int, masks: int
) -> list[tuple[int, int]]:
    """One `(image, mask)` pair of positions for each mask, in mask order.

    The images are gone through in a random order, then again in another one until the masks are
    used up: each image is used equally often, give or take one, and any run of masks (a ratio bin)
    meets as many different images as it can. Raises PipelineError without images.
    """
    import numpy as np

    if images < 1:
        raise PipelineError(
            "there is no image to evaluate on: give the dataset a test split with photographs."
        )
    digest = sha256_bytes(f"pairs/{images_digest}/{masks_digest}/{seed}".encode())
    rng = np.random.Generator(np.random.Philox(key=int(digest[:32], 16)))
    order: list[int] = []
    while len(order) < masks:
        order += rng.permutation(images).tolist()
    return [(image, mask) for mask, image in enumerate(order[:masks])]
