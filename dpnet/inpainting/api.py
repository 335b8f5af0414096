"""Fill the holes of photographs: `dpnet.inpaint` and `dpnet.load_model`.

In a mask white (1, True) is the hole; inside, `valid` is 1 where a pixel is known.
"""

from __future__ import annotations

import os
import warnings
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from data_prep.core.errors import PipelineError
from data_prep.core.paths import DEMO_ROOT
from dpnet.inpainting.conversion import take_image, take_mask
from dpnet.inpainting.tiles import TILE, Tell, fill, on_fastest_device
from dpnet.model import Generator
from dpnet.model_store.find_model import find_model
from dpnet.model_store.weights import load_generator

ROUNDING = 1e-3  # how far beyond 0 and 1 floating point may be, as after a resize
FEW_KNOWN = 0.05  # below this known share the mask is probably inverted

Kind = TypeVar("Kind")


def inpaint(
    image: Kind,
    mask: Any,
    model: Generator | str | None = None,
    *,
    tile: int = TILE,
    root: str | None = None,
) -> Kind:
    """`image` with the hole filled, in the kind, type, size and device that it was given in.

    Known pixels come back bit for bit, and an alpha channel as it was. What the image holds in the
    hole has no influence. An image whose mask has no hole comes back itself. What looks wrong about
    a mask (not binary, or hardly anything known) is a `UserWarning`.

    Args:
        image: a NumPy array (H W, H W C or N H W C), a torch tensor (H W, C H W or N C H W; any
            device), uint8 or floating point in [0, 1], with 1, 3 or 4 channels (grey, RGB, RGB and
            alpha); or an 8-bit Pillow picture (mode 1 comes back as L, P as RGB or RGBA); or a list
            of such images, which may differ in size. Of any size.
        mask: of the image's height and width, white (255, 1 or True) where the hole is, in any of
            these kinds; one for each image, or one for all of a batch or list.
        model: a generator; or what `--model` of the command takes (see `load_model`); None is the
            champion of the root.
        tile: of an image with a longer side than this, only the hole and what is around it is
            worked on, if need be in overlapping tiles of this side; a larger tile sees further and
            takes more memory.
        root: where models are looked up; DPNET_ROOT, else ./dpnet-demo, where it is None.

    Raises PipelineError with one sentence for whatever cannot be used.
    """
    generator = model if isinstance(model, nn.Module) else load_model(model or "", root)
    told: list[str] = []
    result: Any
    if isinstance(image, (list, tuple)):
        masks = mask if isinstance(mask, (list, tuple)) else [mask] * len(image)
        if len(masks) != len(image):
            raise PipelineError(
                f"there are {len(masks)} masks for {len(image)} images: give one for each, or one"
                " for all."
            )
        result = [
            fill_image(generator, each, its_mask, tile, f"image {n}", f"mask {n}", told.append)
            for n, (each, its_mask) in enumerate(zip(image, masks, strict=True))
        ]
    else:
        result = fill_image(generator, image, mask, tile, "the image", "the mask", told.append)
    for message in dict.fromkeys(told):
        warnings.warn(message, stacklevel=2)
    return result  # type: ignore[no-any-return]


def fill_image(
    generator: Generator,
    image: Any,
    mask: Any,
    tile: int,
    name: str,
    mask_name: str,
    tell: Tell,
    *,
    progress: bool = False,
) -> Any:
    """One image or batch of `inpaint`, which see; the names are for messages.

    `tell` takes what looks wrong about the mask. It is `image` itself if there is no hole.
    """
    pixels = take_image(image, name)
    values = pixels.values
    valid = take_mask(mask, values, mask_name, tell)
    if valid.all():
        return image
    _check_known(valid, mask_name, tell)
    alpha = values.shape[1] in (2, 4)
    colours = values[:, :-1] if alpha else values
    _check_values(colours, valid, name)
    filled = fill(generator, colours, valid, tile, tell, progress=progress)
    return pixels.back(torch.cat([filled, values[:, -1:]], 1) if alpha else filled)


def load_model(reference: str = "", root: str | None = None) -> Generator:
    """The generator that `reference` names, ready to run on the fastest device there is.

    `reference` is "" (the champion of the root), `models:/NAME@champion`, `models:/NAME/VERSION`,
    the path or URI of a run's folder (or of the `model` folder in it), or one that `dpnet export`
    has written. `root` is as in `inpaint`. Raises PipelineError when there is none, or its files
    are not whole.
    """
    store, folder, _ = find_model(reference, root or os.environ.get("DPNET_ROOT") or DEMO_ROOT)
    return on_fastest_device(load_generator(store, folder))


def _check_known(valid: Tensor, mask_name: str, tell: Tell) -> None:
    """Raise PipelineError where nothing is known; tell where it is hardly anything."""
    for number, share in enumerate(valid.float().mean(dim=(1, 2, 3)).tolist()):
        name = mask_name if len(valid) == 1 else f"{mask_name} (number {number} of the batch)"
        if share == 0:
            raise PipelineError(
                f"{name} is white everywhere, so no pixel of the picture is known: white is the"
                " hole; leave black what is to be kept."
            )
        if share < FEW_KNOWN:
            tell(
                f"{name} leaves only {share:.1%} of the picture known: white is the hole;"
                " if it is meant the other way round, invert the mask."
            )


def _check_values(colours: Tensor, valid: Tensor, name: str) -> None:
    """Raise PipelineError unless the known colours are finite and, if not uint8, in [0, 1]."""
    if colours.dtype == torch.uint8:
        return
    low, high = (float(v) for v in torch.where(valid, colours, 0.5).aminmax())
    if not abs(low) + abs(high) < float("inf"):
        raise PipelineError(
            f"{name} has known pixels that are NaN or infinite: repair them or make them part of"
            " the hole."
        )
    if low < -ROUNDING or high > 1 + ROUNDING:
        raise PipelineError(
            f"{name} has known values from {low:g} to {high:g}: give floating point from 0 to 1,"
            " or uint8 from 0 to 255."
        )
