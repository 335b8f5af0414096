"""Fill the holes of images of any size with a generator: small ones whole, large ones by tiles.

Needs torch, NumPy and the standard library alone. Here `valid` is 1 (True) where a pixel is known.

Of a large image only the hole and what is around it is worked on. Where that is larger than a tile,
tiles overlap, start on the network's grid, and share what the network would take from all of it:
the units of the colours with the smooth fill of the hole (`Generator.units`), and the statistics of
the dynamic and region normalization. For the latter the tiles that have a hole run twice, once to
gather the statistics and once to use them. So no seam shows where two tiles meet. All of this is
our choice.
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

TILE = 512  # pixels of side that go through the generator at once; bounds the memory
TILE_MIN = 64
OVERLAP = 0.25  # of a tile's side, over which neighbours fade into each other

Box = tuple[slice, slice]  # rows, columns
Tell = Callable[[str], None]  # takes what a person should know about a picture or a mask


def fill(
    generator: Generator,
    images: Tensor,
    valid: Tensor,
    tile: int = TILE,
    tell: Tell = lambda message: None,
    *,
    progress: bool = False,
) -> Tensor:
    """`images` with their holes filled, as a new tensor of their type, on their device.

    Known pixels are the same bit for bit. What an image holds in its hole, NaN included, has no
    influence. An image whose sides are at most `tile` is run whole, as many at once as have the
    pixels of a tile; of a larger one `hole_area`, by tiles if that is larger still.

    Args:
        generator: in eval mode; it works on its own device, in bfloat16 where that is a GPU.
        images: N C H W with C 3 (RGB) or 1 (grey: filled with the mean of the three channels),
            uint8 or floating point in [0, 1].
        valid: N 1 H W, bool; each sample knows some pixel.
        tile: side in pixels, at least 64; rounded down to a multiple of 16.
        tell: is called with a sentence when a hole is larger than a tile.
        progress: show the tiles of large images on standard error.

    Raises PipelineError when the model's output is not finite, the tile is too small, or the GPU's
    memory is.
    """
    if tile < TILE_MIN:
        raise PipelineError(f"a tile of {tile} pixels is too small: give at least {TILE_MIN}.")
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
                raw = predict(generator, part, known)
            else:
                raw = _predict_large(generator, part, known, tile, tell, progress)
            filled[some, :, *area] = composite(part, known, raw)
    except torch.OutOfMemoryError as error:
        raise PipelineError(
            f"the GPU's memory is too small for tiles of {tile} pixels: give a smaller tile"
            " (--tile), or hide the GPU with CUDA_VISIBLE_DEVICES=''."
        ) from error
    return filled


def inpaint_arrays(
    generator: Generator, images: NDArray[np.uint8], valid: NDArray[np.uint8]
) -> NDArray[np.uint8]:
    """Composites uint8 [N, H, W, 3]: the images with their holes filled.

    `images` is uint8 [N, H, W, 3], `valid` uint8 [N, H, W] in {0, 1}; they go through the generator
    as one batch. Raises PipelineError if the model's output is not finite.
    """
    images_N3HW = torch.from_numpy(np.array(images)).permute(0, 3, 1, 2)
    valid_N1HW = torch.from_numpy(np.array(valid))[:, None] > 0
    filled = composite(images_N3HW, valid_N1HW, predict(generator, images_N3HW, valid_N1HW))
    return np.ascontiguousarray(filled.permute(0, 2, 3, 1).numpy())


@torch.no_grad()
def predict(
    generator: Generator, images: Tensor, valid: Tensor, units: Units | None = None
) -> Tensor:
    """The raw prediction, float32 N3HW in [0, 1] on the generator's device.

    `images` and `valid` as in `fill`. Raises PipelineError unless it is finite.
    """
    device = device_of(generator)
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        raw: Tensor = generator(_colours(images, device), valid.to(device).float(), units)
    raw = raw.float()
    if not torch.isfinite(raw).all():
        raise PipelineError(
            "the model predicts values that are not finite: its training has failed; use an"
            " earlier version or train again."
        )
    return raw


def composite(images: Tensor, valid: Tensor, raw: Tensor) -> Tensor:
    """The images where they are known; where they are not, the prediction in their form."""
    raw = raw.to(images.device)
    if images.shape[1] == 1:
        raw = raw.mean(1, keepdim=True)
    if images.dtype == torch.uint8:
        raw = (raw * 255).round().clamp(0, 255)
    return torch.where(valid.to(images.device), images, raw.to(images.dtype))


def device_of(generator: Generator) -> torch.device:
    return next(generator.parameters()).device


def on_fastest_device(generator: Generator) -> Generator:
    """The generator on the GPU where there is one."""
    return generator.to("cuda" if torch.cuda.is_available() else "cpu")


def hole_area(valid: Tensor, tile: int) -> Box:
    """The part of a large image that is worked on: the hole with what is around it.

    `valid` is H W with a hole. A quarter of a tile around it, and a tile at least, where the image
    is so large. What lies further away has no part in the result.
    """
    rows, columns = (_span((~valid).any(axis), tile) for axis in (1, 0))
    return rows, columns


def _span(holed: Tensor, tile: int) -> slice:
    at = holed.nonzero()
    first, end = int(at[0]), int(at[-1]) + 1
    size = min(len(holed), max(tile, end - first + 2 * int(tile * OVERLAP)))
    start = min(max(0, (first + end - size) // 2), len(holed) - size)
    return slice(start, start + size)


def tile_boxes(height: int, width: int, tile: int) -> list[Box]:
    """Tiles of at most `tile` x `tile` pixels that cover an image, row by row."""
    return [
        (slice(y, min(y + tile, height)), slice(x, min(x + tile, width)))
        for y, x in product(_starts(height, tile), _starts(width, tile))
    ]


@torch.no_grad()
def _predict_large(
    generator: Generator, image: Tensor, valid: Tensor, tile: int, tell: Tell, progress: bool
) -> Tensor:
    """The raw prediction 1 3 H W of one image by tiles; it may be 0 where there is no hole.

    Only tiles with a hole are run, to gather the statistics as well.
    """
    device = device_of(generator)
    height, width = valid.shape[2:]
    boxes = [b for b in tile_boxes(height, width, tile) if not valid[..., *b].all()]
    if any(not valid[..., *box].any() for box in boxes):
        tell(
            f"A hole covers a whole tile of {tile} pixels, which then sees nothing to go on:"
            " a larger tile (--tile) gives a better result and takes more memory."
        )
    # Padded as the network pads, so that the units are those it would take of the whole image.
    pad = (0, -width % MULTIPLE, 0, -height % MULTIPLE)
    units = generator.units(F.pad(_colours(image, device), pad), F.pad(valid.to(device), pad))
    total = torch.zeros((1, 3, height, width), device=device)
    weights = torch.zeros((1, 1, height, width), device=device)

    # With one tile, or a normalization that tiles cannot share, there is nothing to gather.
    gather = len(boxes) > 1 and generator.config.normalization in ("dynamic", "region")
    sharing = shared_statistics(generator) if gather else nullcontext()
    shown = Progress("inpaint", len(boxes) * (1 + gather), "tiles") if progress else nullcontext()
    number = count(1)
    with sharing as statistics, shown as bar:

        def run(box: Box) -> Tensor:
            own = units._replace(smooth=units.smooth[..., *box])
            raw = predict(generator, image[..., *box], valid[..., *box], own)
            if bar is not None:
                bar.update(next(number))
            return raw

        if statistics is not None:
            for box in boxes:
                run(box)
            statistics.use()
        for box in boxes:
            weight = _weight(box, (height, width), tile).to(device)
            total[..., *box] += weight * run(box)
            weights[..., *box] += weight
    return total.div_(weights.clamp_(min=1e-12))  # 0 where no tile ran: there is no hole


def _colours(images: Tensor, device: torch.device) -> Tensor:
    """N3HW in float32 in [0, 1], on `device`."""
    images = images.to(device)
    images = images.float() / 255 if images.dtype == torch.uint8 else images.float()
    return images.expand(-1, 3, -1, -1)


def _starts(side: int, tile: int) -> list[int]:
    """Where the tiles of one axis begin, at multiples of 16.

    They are evenly spread and overlap by about OVERLAP of a tile or more. The last may be some
    pixels narrower than a tile, so that it too begins on the network's grid.
    """
    last = -(-max(0, side - tile) // MULTIPLE)  # counted in steps of the grid
    step = (tile - int(tile * OVERLAP)) // MULTIPLE
    count = -(-last // step)
    return [0, *(round(i * last / count) * MULTIPLE for i in range(1, count + 1))]


def _weight(box: Box, sides: Sequence[int], tile: int) -> Tensor:
    """Weights H W of a tile's pixels: they fall linearly to every rim inside the image."""
    rows, columns = (_ramp(part, side, tile) for part, side in zip(box, sides, strict=True))
    return rows[:, None] * columns


def _ramp(part: slice, side: int, tile: int) -> Tensor:
    fade = int(tile * OVERLAP) + 1
    at = torch.arange(part.start, part.stop, dtype=torch.float32)
    weight = torch.ones_like(at)
    if part.start > 0:
        weight = torch.minimum(weight, (at - part.start + 1) / fade)
    if part.stop < side:
        weight = torch.minimum(weight, (part.stop - at) / fade)
    return weight
