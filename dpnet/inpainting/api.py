"""Fill the holes of images in Python: `dpnet.inpaint` and `dpnet.load_model`.

In a mask, white (1, True) is the hole. Inside this package `valid` is 1 where a pixel is known.
"""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from data_prep.core.errors import PipelineError
from dpnet.inpainting.conversion import Pixels, image_pixels, valid_pixels
from dpnet.inpainting.tiles import TILE, Report, fill, on_fastest_device
from dpnet.model import Generator
from dpnet.model_store.find_model import find_model
from dpnet.model_store.weights import load_generator

ROUNDING = 1e-3  # how far a resize may push floating point below 0 or above 1
FEW_KNOWN = 0.05  # with a smaller known share the mask is probably inverted

Kind = TypeVar("Kind")


def inpaint(
    image: Kind,
    mask: Any,
    model: Generator | str | None = None,
    *,
    tile: int = TILE,
    root: str | None = None,
) -> Kind:
    """Fill the hole of an image, or of several images.

    Known pixels and an alpha channel do not change by a single bit. The pixels inside the hole have
    no influence on the result.

    Args:
        image: a NumPy array (H W, H W C or N H W C) or a torch tensor (H W, C H W or N C H W, on
            any device), of uint8 or of floating point in [0, 1], with 1, 3 or 4 channels (grey,
            RGB, RGB and alpha). Or an 8-bit Pillow image. Or a list of such images, which may
            differ in size. An image may have any size.
        mask: an array, tensor or Pillow image of the image's height and width, white (255, 1 or
            True) in the hole. One for each image, or one for all images of a batch or list.
        model: a generator, or the name of a model as for `load_model`. None means the champion of
            the root.
        tile: if a side of the image is longer than this many pixels (at least 64), only the hole
            and its surroundings are computed, in overlapping tiles of this side if necessary. A
            larger tile shows the model more of the image and needs more memory.
        root: where models are searched. None means DPNET_ROOT, else ./dpnet-demo.

    Returns:
        The filled image, of the same kind, type, size and device as `image`. Pillow images of mode
        1 become L, and those of mode P become RGB or RGBA. If the mask has no hole, the result is
        `image` itself.

    Raises:
        PipelineError: the image, the mask or the model cannot be used.

    Warns:
        UserWarning: the mask is not pure black and white, or almost no pixel is known.
    """
    generator = model if isinstance(model, nn.Module) else load_model(model or "", root)
    messages: list[str] = []
    report = messages.append
    result: Any
    if isinstance(image, (list, tuple)):
        masks = mask if isinstance(mask, (list, tuple)) else [mask] * len(image)
        if len(masks) != len(image):
            raise PipelineError(
                f"there are {len(masks)} masks for {len(image)} images: give one mask for each"
                " image, or one for all."
            )
        result = [
            fill_image(generator, each, its_mask, tile, f"image {n}", f"mask {n}", report)
            for n, (each, its_mask) in enumerate(zip(image, masks, strict=True))
        ]
    else:
        result = fill_image(generator, image, mask, tile, "the image", "the mask", report)
    for message in dict.fromkeys(messages):
        warnings.warn(message, stacklevel=2)
    return result  # type: ignore[no-any-return]


def load_model(reference: str = "", root: str | None = None) -> Generator:
    """Load a trained generator to the fastest device of this machine.

    Args:
        reference: "" (the champion of the root), `models:/NAME@champion`, `models:/NAME/VERSION`,
            `pretrained` (the packaged weights), or the path or URI of a run's folder, of the folder
            `model` in it, or of a folder that `dpnet export` has written.
        root: where models are searched. None means DPNET_ROOT, else ./dpnet-demo, else the packaged
            weights.

    Returns:
        The generator in eval mode, on the GPU if there is one.

    Raises:
        PipelineError: the model does not exist, or its files are damaged.
    """
    store, folder, _ = find_model(reference, root)
    return on_fastest_device(load_generator(store, folder))


def fill_image(
    generator: Generator,
    image: Any,
    mask: Any,
    tile: int,
    name: str,
    mask_name: str,
    report: Report,
    *,
    progress: bool = False,
) -> Any:
    """Fill the hole of one image or batch.

    Args:
        generator: the model, in eval mode.
        image: as for `inpaint`, but not a list.
        mask: as for `inpaint`.
        tile: side of a tile in pixels, at least 64.
        name: the image's name in messages.
        mask_name: the mask's name in messages.
        report: called with a sentence if the mask is unusual.
        progress: show the tiles of a large image on standard error.

    Returns:
        The filled image; `image` itself if there is no hole.

    Raises:
        PipelineError: the image or the mask cannot be used.
    """
    hole = find_hole(image, mask, name, mask_name, report)
    if hole is None:
        return image
    return hole.back(fill(generator, hole.colours, hole.valid, tile, report, progress=progress))


class Hole(NamedTuple):
    """An image or a batch with a hole, checked and ready for `fill`.

    Attributes:
        pixels: the whole image.
        valid: bool N 1 H W, True where a pixel is known.
        alpha: whether the last channel of the image is alpha, which is never filled.
    """

    pixels: Pixels
    valid: Tensor
    alpha: bool

    @property
    def colours(self) -> Tensor:
        """Return the channels to fill, N C H W."""
        return self.pixels.values[:, :-1] if self.alpha else self.pixels.values

    def back(self, filled: Tensor) -> Any:
        """Return filled colours as an image of the original kind."""
        if self.alpha:
            filled = torch.cat([filled, self.pixels.values[:, -1:]], 1)
        return self.pixels.back(filled)


def find_hole(image: Any, mask: Any, name: str, mask_name: str, report: Report) -> Hole | None:
    """Check an image and its mask. Return the hole, or None if there is none.

    Args:
        image: as for `inpaint`, but not a list.
        mask: as for `inpaint`.
        name: the image's name in messages.
        mask_name: the mask's name in messages.
        report: called with a sentence if the mask is unusual.

    Raises:
        PipelineError: the image or the mask cannot be used.
    """
    pixels = image_pixels(image, name)
    valid = valid_pixels(mask, pixels.values, mask_name, report)
    if valid.all():
        return None
    _check_known(valid, mask_name, report)
    hole = Hole(pixels, valid, pixels.values.shape[1] in (2, 4))
    _check_values(hole.colours, valid, name)
    return hole


def _check_known(valid: Tensor, mask_name: str, report: Report) -> None:
    """Raise PipelineError if no pixel is known; report it if almost none is."""
    for number, share in enumerate(valid.float().mean(dim=(1, 2, 3)).tolist()):
        name = mask_name if len(valid) == 1 else f"{mask_name} (number {number} of the batch)"
        if share == 0:
            raise PipelineError(
                f"{name} is white everywhere, so no pixel of the image is known: white is the hole."
                " Make the pixels to keep black."
            )
        if share < FEW_KNOWN:
            report(
                f"{name} leaves only {share:.1%} of the image known: white is the hole. If white"
                " should be known, invert the mask."
            )


def _check_values(colours: Tensor, valid: Tensor, name: str) -> None:
    """Raise PipelineError unless the known colours are finite and, if not uint8, in [0, 1]."""
    if colours.dtype == torch.uint8:
        return
    low, high = (float(v) for v in torch.where(valid, colours, 0.5).aminmax())
    if not abs(low) + abs(high) < float("inf"):
        raise PipelineError(
            f"{name} has known pixels that are NaN or infinite: repair them, or make them part of"
            " the hole."
        )
    if low < -ROUNDING or high > 1 + ROUNDING:
        raise PipelineError(
            f"{name} has known values from {low:g} to {high:g}: give floating point from 0 to 1,"
            " or uint8 from 0 to 255."
        )
