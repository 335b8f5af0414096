"""Single samples by position, for validation and evaluation.

Training reads whole shards in order (`dpnet.loading.loader`). Both use `ShardFiles`, so both check
every sample with its hash.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.core.errors import ItemError, PipelineError
from data_prep.core.manifest import StageRef
from data_prep.core.storage.store import Store
from data_prep.masks.codec import valid_from_png
from dpnet.loading.decoding import TooSmallError, decode_image, unusable
from dpnet.loading.shard_files import OpenShard, ShardFiles, find_shards

Pixels = NDArray[np.uint8]


class Samples:
    """The samples of one split of a committed images or masks stage, by position.

    All indexes are read and checked at once, so a damaged one is refused before the work starts.
    Samples are read one by one. Several threads may read.

    Args:
        store: the root.
        ref: the images or masks stage.
        split: name of the split.
        size: side in pixels. Larger images are cut to the square in their middle.
        columns: further columns of the index that `column` and `value` can return.

    Raises:
        PipelineError: the stage is missing or not the one in `ref`, the split is empty, or an
            index is missing or damaged.
    """

    def __init__(
        self,
        store: Store,
        ref: StageRef,
        split: str,
        size: int | None = None,
        columns: Sequence[str] = (),
    ) -> None:
        self.size = size
        files = ShardFiles(store, None)
        found = find_shards(store, ref, split)
        self._shards = [files.open_in_place(shard, columns) for shard in found.shards]
        self._ends = list(accumulate(shard.samples for shard in found.shards))

    def __len__(self) -> int:
        return self._ends[-1]

    def image(self, position: int) -> Pixels:
        """Return an image as RGB, uint8 [H, W, 3]."""
        return self._decode(position, lambda data: self._cut(decode_image(data)))

    def valid(self, position: int) -> Pixels:
        """Return a mask, uint8 [H, W] in {0, 1}, 1 = known."""
        return self._decode(position, valid_from_png)

    def shard_key(self, position: int) -> str:
        """Return the key of the sample's tar under the root."""
        return self._find(position)[0].shard.key

    def key(self, position: int) -> str:
        """Return the sample's key."""
        shard, at = self._find(position)
        return str(shard.keys[at])

    def value(self, column: str, position: int) -> Any:
        """Return the sample's value in a column of the index."""
        shard, at = self._find(position)
        return shard.columns[column][at].as_py()

    def column(self, name: str) -> NDArray[Any]:
        """Return a column of the index for all samples, by position."""
        return np.concatenate([shard.columns[name].to_numpy() for shard in self._shards])

    def _find(self, position: int) -> tuple[OpenShard, int]:
        """Return the sample's shard and its position in it."""
        number = bisect_right(self._ends, position)
        shard = self._shards[number]
        return shard, position - self._ends[number] + shard.shard.samples

    def _decode(self, position: int, decode: Callable[[bytes], Pixels]) -> Pixels:
        shard, at = self._find(position)
        try:
            data = shard.read(at)  # a missing shard is a PipelineError, which passes
        except ValueError as error:
            raise unusable(shard.name_of(at), error) from error
        try:
            return decode(data)
        except (OSError, ValueError, ItemError, PipelineError) as error:
            raise unusable(shard.name_of(at), error) from error

    def _cut(self, image: Pixels) -> Pixels:
        if self.size is None:
            return image
        height, width = image.shape[:2]
        if min(height, width) < self.size:
            raise TooSmallError(height, width, self.size)
        top, left = (height - self.size) // 2, (width - self.size) // 2
        return image[top : top + self.size, left : left + self.size]
