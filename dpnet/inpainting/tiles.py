"""Fill the holes of images of any size with a generator: small ones whole, large ones in tiles.

This file needs only torch, NumPy and the standard library. `valid` is 1 (True) where a pixel is
known.

In a large image only the hole and its surroundings are computed. If this area is larger than a
tile, it is cut into overlapping tiles that start on the network's grid. So that no seam shows, the
tiles share the values that the network computes from the whole area: the units of the colours, the
smooth fill of the hole (`Generator.units`), and the statistics of the dynamic and region
normalization. For the statistics each tile with a hole runs twice: once to gather them and once to
use them. The paper has no tiles; all of this is our choice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from itertools import count, product

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from data_prep.core.errors import PipelineError
from data_prep.core.progress import Progress
from dpnet.model.generator import MULTIPLE, Generator, Units
from dpnet.model.normalization import shared_statistics

TILE = 512  # side in pixels of a tile; limits the memory
TILE_MIN = 64
OVERLAP = 0.25  # share of a tile's side over which neighbours fade into each other

Box = tuple[slice, slice]  # rows, columns
Report = Callable[[str], None]  # takes a sentence that people should read
# Takes the number of finished tiles and of all tiles before each one, and at the end. What it
# raises ends the work.
Step = Callable[[int, int], None]


def fill(
    generator: Generator,
    images: Tensor,
    valid: Tensor,
    tile: int = TILE,
    report: Report = lambda message: None,
    *,
    progress: bool = False,
    step: Step = lambda done, total: None,
) -> Tensor:
    """Fill the holes of a batch of images.

    Known pixels do not change by a single bit. The pixels inside a hole, NaN included, have no
    influence. Images with sides of at most `tile` are computed whole, several at once. For a larger
    image only `hole_area` is computed, in tiles if that area is larger than a tile.

    Args:
        generator: in eval mode; it runs on its own device, in bfloat16 on a GPU.
        images: N C H W, uint8 or floating point in [0, 1]. C is 3 (RGB) or 1 (grey: filled with the
            mean of the three predicted channels).
        valid: N 1 H W, bool; each image has a known pixel.
        tile: side in pixels, at least 64; rounded down to a multiple of 16.
        report: called with a sentence if a hole covers a whole tile.
        progress: show the tiles of large images on standard error.
        step: called for each tile; a group of small images that run together counts as one.

    Returns:
        A new tensor with the shape, type and device of `images`.

    Raises:
        PipelineError: the tile or the GPU's memory is too small, or the model's output is not
            finite.
    """
    if tile < TILE_MIN:
        raise PipelineError(
            f"a tile of {tile} pixels is too small: give --tile {TILE_MIN} or more."
        )
    tile -= tile % MULTIPLE
    height, width = valid.shape[2:]
    filled = images.detach().clone()
    holed = [n for n in range(len(images)) if not valid[n].all()]
    large = max(height, width) > tile
    at_once = 1 if large else max(1, tile * tile // (height * width))
    try:
        for start in range(0, len(holed), at_once):
            some = holed[start : start + at_once]
            area = hole_area(valid[some[0], 0], tile) if large else (slice(None), slice(None))
            part, known = images[some, :, *area], valid[some, :, *area]
            if max(known.shape[2:]) <= tile:
                groups = -(-len(holed) // at_once)
                step(start // at_once, groups)
                raw = predict(generator, part, known)
                step(start // at_once + 1, groups)
            else:
                raw = _predict_large(generator, part, known, tile, report, progress, step)
            filled[some, :, *area] = composite(part, known, raw)
    except torch.OutOfMemoryError as error:
        raise PipelineError(
            f"the GPU's memory is too small for tiles of {tile} pixels: give a smaller tile"
            " (--tile), or use the CPU with CUDA_VISIBLE_DEVICES=''."
        ) from error
    return filled


def inpaint_arrays(
    generator: Generator, images: NDArray[np.uint8], valid: NDArray[np.uint8]
) -> NDArray[np.uint8]:
    """Fill the holes of a batch of arrays in one forward pass.

    Args:
        generator: in eval mode.
        images: uint8 [N, H, W, 3].
        valid: uint8 [N, H, W] in {0, 1}, 1 where a pixel is known.

    Returns:
        The composites, uint8 [N, H, W, 3].

    Raises:
        PipelineError: the model's output is not finite.
    """
    images_N3HW = torch.from_numpy(np.array(images)).permute(0, 3, 1, 2)
    valid_N1HW = torch.from_numpy(np.array(valid))[:, None] > 0
    filled = composite(images_N3HW, valid_N1HW, predict(generator, images_N3HW, valid_N1HW))
    return np.ascontiguousarray(filled.permute(0, 2, 3, 1).numpy())


@torch.no_grad()
def predict(
    generator: Generator, images: Tensor, valid: Tensor, units: Units | None = None
) -> Tensor:
    """Return the raw prediction of the generator.

    Args:
        generator: in eval mode.
        images: as for `fill`.
        valid: as for `fill`.
        units: the units of the whole image, if `images` is a tile of it.

    Returns:
        float32 N 3 H W in [0, 1], on the generator's device.

    Raises:
        PipelineError: the prediction is not finite.
    """
    device = device_of(generator)
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        raw: Tensor = generator(_colours(images, device), valid.to(device).float(), units)
    raw = raw.float()
    if not torch.isfinite(raw).all():
        raise PipelineError(
            "the model predicts values that are not finite, so its training has failed: use an"
            " earlier version, or train again."
        )
    return raw


def composite(images: Tensor, valid: Tensor, raw: Tensor) -> Tensor:
    """Return the images with the prediction in their holes, in the images' form."""
    raw = raw.to(images.device)
    if images.shape[1] == 1:
        raw = raw.mean(1, keepdim=True)
    if images.dtype == torch.uint8:
        raw = (raw * 255).round().clamp(0, 255)
    return torch.where(valid.to(images.device), images, raw.to(images.dtype))


def device_of(generator: Generator) -> torch.device:
    """Return the device of the generator's weights."""
    return next(generator.parameters()).device


def on_fastest_device(generator: Generator) -> Generator:
    """Move the generator to the GPU if there is one, and return it."""
    return generator.to("cuda" if torch.cuda.is_available() else "cpu")


def hole_area(valid: Tensor, tile: int) -> Box:
    """Return the area of a large image to compute: the hole and its surroundings.

    The area adds a quarter of a tile on each side of the hole and has at least the size of a tile,
    within the image. Pixels outside the area have no influence on the result. `valid` is H W and
    has a hole.
    """
    rows, columns = (_span((~valid).any(axis), tile) for axis in (1, 0))
    return rows, columns


def _span(holed: Tensor, tile: int) -> slice:
    """Return the area along one axis; `holed` is True in rows or columns that have a hole."""
    at = holed.nonzero()
    first, end = int(at[0]), int(at[-1]) + 1
    size = min(len(holed), max(tile, end - first + 2 * int(tile * OVERLAP)))
    start = min(max(0, (first + end - size) // 2), len(holed) - size)
    return slice(start, start + size)


def tile_boxes(height: int, width: int, tile: int) -> list[Box]:
    """Return the tiles of at most `tile` x `tile` pixels that cover an image, row by row."""
    return [
        (slice(y, min(y + tile, height)), slice(x, min(x + tile, width)))
        for y, x in product(_starts(height, tile), _starts(width, tile))
    ]


@torch.no_grad()
def _predict_large(
    generator: Generator,
    image: Tensor,
    valid: Tensor,
    tile: int,
    report: Report,
    progress: bool,
    step: Step,
) -> Tensor:
    """Return the raw prediction 1 3 H W of one image in tiles; it may be 0 outside the hole.

    Only tiles with a hole run, also to gather the statistics. The arguments are those of `fill`.
    """
    device = device_of(generator)
    height, width = valid.shape[2:]
    boxes = [b for b in tile_boxes(height, width, tile) if not valid[..., *b].all()]
    if any(not valid[..., *box].any() for box in boxes):
        report(
            f"a hole covers a whole tile of {tile} pixels, which then has no known pixel: a larger"
            " tile (--tile) gives a better result and needs more memory."
        )
    # Padded like the network pads, so that the units are those of the whole image.
    pad = (0, -width % MULTIPLE, 0, -height % MULTIPLE)
    units = generator.units(F.pad(_colours(image, device), pad), F.pad(valid.to(device), pad))
    total = torch.zeros((1, 3, height, width), device=device)
    weights = torch.zeros((1, 1, height, width), device=device)

    # With one tile, or a normalization that tiles cannot share, there is nothing to gather.
    gather = len(boxes) > 1 and generator.config.normalization in ("dynamic", "region")
    sharing = shared_statistics(generator) if gather else nullcontext()
    runs = len(boxes) * (1 + gather)
    shown = Progress("inpaint", runs, "tiles") if progress else nullcontext()
    number = count(1)
    step(0, runs)
    with sharing as statistics, shown as bar:

        def run(box: Box) -> Tensor:
            own = units._replace(smooth=units.smooth[..., *box])
            raw = predict(generator, image[..., *box], valid[..., *box], own)
            done = next(number)
            if bar is not None:
                bar.update(done)
            step(done, runs)
            return raw

        if statistics is not None:
            for box in boxes:
                run(box)
            statistics.use()
        for box in boxes:
            weight = _weight(box, (height, width), tile).to(device)
            total[..., *box] += weight * run(box)
            weights[..., *box] += weight
    return total.div_(weights.clamp_(min=1e-12))  # 0 where no tile ran, because there is no hole


def _colours(images: Tensor, device: torch.device) -> Tensor:
    """Return images as N 3 H W in float32 in [0, 1], on `device`."""
    images = images.to(device)
    images = images.float() / 255 if images.dtype == torch.uint8 else images.float()
    return images.expand(-1, 3, -1, -1)


def _starts(side: int, tile: int) -> list[int]:
    """Return where the tiles of one axis begin, at multiples of 16.

    Tiles are evenly spread and overlap by about OVERLAP of a tile or more. The last tile may be
    some pixels narrower, so that it also begins on the network's grid.
    """
    last = -(-max(0, side - tile) // MULTIPLE)  # counted in steps of the grid
    step = (tile - int(tile * OVERLAP)) // MULTIPLE
    count = -(-last // step)
    return [0, *(round(i * last / count) * MULTIPLE for i in range(1, count + 1))]


def _weight(box: Box, sides: Sequence[int], tile: int) -> Tensor:
    """Return weights H W of a tile's pixels: they fall linearly to each edge inside the image."""
    rows, columns = (_ramp(part, side, tile) for part, side in zip(box, sides, strict=True))
    return rows[:, None] * columns


def _ramp(part: slice, side: int, tile: int) -> Tensor:
    """Return the weights of a tile along one axis of `side` pixels."""
    fade = int(tile * OVERLAP) + 1
    at = torch.arange(part.start, part.stop, dtype=torch.float32)
    weight = torch.ones_like(at)
    if part.start > 0:
        weight = torch.minimum(weight, (at - part.start + 1) / fade)
    if part.stop < side:
        weight = torch.minimum(weight, (part.stop - at) / fade)
    return weight
