"""The frozen pairs of an evaluation: their samples, their names and their digest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from data_prep.core.digest import canonical_json, sha256_bytes, sha256_json
from data_prep.core.errors import PipelineError
from data_prep.core.manifest import StageRef
from data_prep.core.storage.store import Store
from dpnet.evaluation.settings import EvaluateSettings

if TYPE_CHECKING:
    from dpnet.loading.samples import Samples

Pair = tuple[int, int]  # positions of the image and of the mask


@dataclass(frozen=True)
class FrozenPairs:
    """The pairs, and the samples that they are made of.

    Attributes:
        images: the images, cut to the side of the masks.
        masks: the evaluation masks.
        pairs: the pairs in order of their masks.
        digests: content digests of the images stage and of the masks stage.
        side: of images and masks, in pixels.
    """

    images: Samples
    masks: Samples
    pairs: Sequence[Pair]
    digests: tuple[str, str]
    side: int

    def keys(self, pair: Pair) -> dict[str, Any]:
        """Return the columns of a row that identify its pair."""
        image, mask = pair
        names = {"image": self.images.key(image), "mask": self.masks.key(mask)}
        return names | {name: self.masks.value(name, mask) for name in ("ratio_bin", "hole_ratio")}

    def name(self, pair: Pair) -> str:
        """Return the name of a pair's files: the mask's key and a part of a digest.

        The digest is that of both sets and both keys. So results on other pairs have other names.
        """
        image, mask = pair
        key = self.masks.key(mask)
        identity = canonical_json([*self.digests, self.images.key(image), key])
        return f"{key}-{sha256_bytes(identity)[:8]}"

    def digest(self) -> str:
        """Return the digest of the sets and of every pair."""
        named = [[self.images.key(image), self.masks.key(mask)] for image, mask in self.pairs]
        images, masks = self.digests
        return sha256_json({"images": images, "masks": masks, "pairs": named})


def open_pairs(
    store: Store, settings: EvaluateSettings, images: StageRef, masks: StageRef
) -> FrozenPairs:
    """Open the samples, and choose the pairs.

    Raises:
        PipelineError: samples are missing, masks differ in size, or an image is smaller than they.
    """
    from dpnet.loading.pairs import validation_pairs
    from dpnet.loading.samples import Samples

    columns = ("width", "height", "ratio_bin", "hole_ratio")
    holes = Samples(store, masks, "eval", columns=columns)
    side = holes.value("width", 0)
    photos = Samples(store, images, settings.split, side, ("width", "height"))
    _check_sizes(photos, holes, side)
    digests = (images.content_digest, masks.content_digest)
    pairs = validation_pairs(photos, holes, digests, seed=settings.seed, count=settings.max_pairs)
    return FrozenPairs(photos, holes, pairs, digests, side)


def _check_sizes(images: Samples, masks: Samples, side: int) -> None:
    """Raise PipelineError if masks differ in size, or if an image is smaller than the masks.

    Larger images are cropped.
    """
    for position, sides in enumerate(
        zip(masks.column("width"), masks.column("height"), strict=True)
    ):
        if sides != (side, side):
            raise PipelineError(
                f"the mask {masks.key(position)} is {sides[0]} x {sides[1]} pixels but others are"
                f" {side} x {side}: build the masks again with one masks.size."
            )
    widths, heights = images.column("width"), images.column("height")
    for position, (width, height) in enumerate(zip(widths, heights, strict=True)):
        if min(width, height) < side:
            raise PipelineError(
                f"the image {images.key(position)} is {width} x {height} pixels but the masks"
                f" are {side} x {side}: give images.size and masks.size the same value, and use"
                " images.mode center-crop, short-side or tiles."
            )
