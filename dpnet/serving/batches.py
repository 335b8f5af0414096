"""Decide which waiting requests are filled together, so that no byte changes.

On a GPU one call for several small images takes
hardly longer than one for a single image. A library may choose another order of sums for another
number of images. So each size is tried once, both ways, and filled together only if all bytes are
the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dpnet.inpainting.api import Hole
from dpnet.inpainting.tiles import hole_area

MOST = 8  # images in one call; ours
Fill = Callable[[Tensor, Tensor], Tensor]  # colours N C H W and valid N 1 H W to filled colours
Shape = tuple[int, ...]


def batch_shape(hole: Hole, tile: int) -> Shape | None:
    """Return the shape that images of one batch share, or None for one larger than a tile."""
    shape = tuple(hole.colours.shape)
    return shape if shape[0] == 1 and max(shape[2:]) <= tile else None


def is_quick(hole: Hole, tile: int) -> bool:
    """Return whether a hole is filled in one call, whatever the size of its image."""
    if max(hole.valid.shape[2:]) <= tile:
        return True
    rows, columns = hole_area(hole.valid[0, 0], tile)
    sides = (rows.stop - rows.start, columns.stop - columns.start)
    return bool(max(sides) <= tile)


def size_of_batch(shapes: Sequence[Shape | None], most: int = MOST) -> int:
    """Return how many of the next requests run together: those with the shape of the first."""
    count = 1
    if shapes[0] is None:
        return count
    while count < min(most, len(shapes)) and shapes[count] == shapes[0]:
        count += 1
    return count


class Batches:
    """Fills several images in one call where that changes no byte."""

    def __init__(self) -> None:
        self._same: dict[tuple[str, Shape], bool] = {}  # by model and shape of the batch

    def fill(self, model: str, holes: Sequence[Hole], fill: Fill) -> list[Tensor]:
        """Return the filled colours of images of one shape.

        Args:
            model: id and digest of the model.
            holes: images of one shape.
            fill: fills a batch.
        """
        if len(holes) == 1:
            return [fill(holes[0].colours, holes[0].valid)]
        key = (model, (len(holes), *holes[0].colours.shape[1:]))
        same = self._same.get(key)
        together: list[Tensor] = []
        if same is not False:
            colours = torch.cat([hole.colours for hole in holes])
            filled = fill(colours, torch.cat([hole.valid for hole in holes]))
            together = list(filled.chunk(len(holes)))
            if same:
                return together
        alone = [fill(hole.colours, hole.valid) for hole in holes]
        if same is None:
            self._same[key] = all(map(torch.equal, together, alone))
        return alone
