"""Convert NumPy arrays, torch tensors and Pillow images to one form, and back.

The form is a tensor N C H W of uint8 or floating point. C is 1 (grey), 2 (grey and alpha), 3 (RGB)
or 4 (RGB and alpha). Every error names the image or the mask.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from data_prep.core.errors import PipelineError
from data_prep.pictures.limits import PhotoError
from data_prep.pictures.mask_reader import (
    WhitePixels,
    white_level,
    white_of_array,
    white_of_image,
)
from dpnet.inpainting.tiles import Report

_MODES = ("1", "L", "LA", "P", "RGB", "RGBA")  # 8 bits a channel, grey or RGB
_CHANNELS = (1, 3, 4)  # of arrays and tensors
_FLOATS = ("float16", "float32", "float64", "bfloat16")
_ARRAY_FORMS = "H x W, H x W x C or N x H x W x C"
_TENSOR_FORMS = "H x W, C x H x W or N x C x H x W"


class Pixels(NamedTuple):
    """An image or a batch of images.

    Attributes:
        values: a tensor N C H W.
        back: converts such a tensor to the kind of the original image.
    """

    values: Tensor
    back: Callable[[Tensor], Any]


def image_pixels(image: Any, name: str) -> Pixels:
    """Return the pixels of a NumPy array, torch tensor or Pillow image.

    A Pillow image of mode 1 comes back as L, and one with a palette as RGB or RGBA.

    Raises:
        PipelineError: the image has another kind, shape or type.
    """
    if isinstance(image, Image.Image):
        array = pillow_array(image, name)
        return Pixels(_channels_first(array), lambda t: _pillow_image(t, image))
    if isinstance(image, Tensor):
        forms, axis, kind = _TENSOR_FORMS, -3, str(image.dtype).removeprefix("torch.")
    elif isinstance(image, np.ndarray):
        forms, axis, kind = _ARRAY_FORMS, -1, str(image.dtype)
    else:
        raise _unknown_kind(image, name)
    if kind not in ("uint8", *_FLOATS):
        raise PipelineError(
            f"{name} has values of type {kind}: give uint8 from 0 to 255, or floating point from 0"
            " to 1 (divide 16-bit values by 65535)."
        )
    channels = 1 if image.ndim == 2 else image.shape[axis] if image.ndim in (3, 4) else 0
    if channels not in _CHANNELS or 0 in image.shape:
        raise PipelineError(
            f"{name} has the shape {_shape(image)}: give {forms}, with 1, 3 or 4 channels."
        )
    if isinstance(image, Tensor):
        return Pixels(
            image.detach().reshape(-1, channels, *image.shape[-2:]), _tensor_back(image.ndim)
        )
    return Pixels(_channels_first(image), _array_back(image.ndim))


def valid_pixels(mask: Any, images: Tensor, name: str, report: Report) -> Tensor:
    """Return `valid` N 1 H W (bool, True = known) of a mask, on the device of the images.

    Args:
        mask: of any kind that an image can have. White is the hole, by the rule of
            `data_prep.pictures.mask_reader`. One mask serves all images of a batch.
        images: N C H W.
        name: the mask's name in messages.
        report: called with a sentence if the mask is not binary.

    Raises:
        PipelineError: the mask does not fit the images, or is mostly grey.
    """
    count, (height, width) = len(images), images.shape[2:]
    if isinstance(mask, Image.Image):
        white = _white_of_pillow(mask, name, report)
    else:
        white = _mask_tensor(mask, (count, height, width), name)
    if white.shape[2:] != images.shape[2:]:
        raise PipelineError(
            f"{name} is {white.shape[3]} x {white.shape[2]} pixels but the image is"
            f" {width} x {height}: give a mask of the image's size."
        )
    if len(white) not in (1, count):
        raise PipelineError(
            f"{name} is a batch of {len(white)} masks for {count} images: give one mask for each"
            " image, or one for all."
        )
    if not isinstance(mask, Image.Image):
        white = _white(white, name, report)
    return (~white).to(images.device).expand(count, -1, -1, -1)


def _mask_tensor(mask: Any, size: tuple[int, int, int], name: str) -> Tensor:
    """Return a mask of NumPy or torch as a tensor N C H W.

    Args:
        mask: an array or a tensor.
        size: number of images, their height and their width.
        name: the mask's name in messages.
    """
    count, height, width = size
    if not isinstance(mask, (np.ndarray, Tensor)):
        raise _unknown_kind(mask, name)
    given, last = mask, not isinstance(mask, Tensor)
    if not isinstance(mask, Tensor):
        if mask.dtype.kind not in "buif":
            raise PipelineError(
                f"{name} has values of type {mask.dtype}: give booleans or numbers."
            )
        mask = torch.from_numpy(mask.astype(np.float32) if mask.dtype.kind == "f" else mask.copy())
    batch = mask.ndim == 3 and tuple(mask.shape[1:]) == (height, width)
    if batch and (last or len(mask) == count):
        mask = mask[:, None]
    elif mask.ndim == 2:
        mask = mask[None, None]
    elif mask.ndim in (3, 4):
        mask = mask[None] if mask.ndim == 3 else mask
        mask = mask.permute(0, 3, 1, 2) if last else mask
    if mask.ndim != 4 or mask.shape[1] not in (1, 2, 3, 4):
        raise PipelineError(
            f"{name} has the shape {_shape(given)}: give {_ARRAY_FORMS if last else _TENSOR_FORMS},"
            " with 1, 3 or 4 channels."
        )
    assert isinstance(mask, Tensor)
    return mask.detach()


def has_alpha(image: Image.Image) -> bool:
    """Return whether a Pillow image has transparency."""
    return image.mode in ("LA", "RGBA") or "transparency" in image.info


def pillow_array(image: Image.Image, name: str) -> NDArray[np.uint8]:
    """Return a Pillow image as uint8 [H, W] or [H, W, C].

    Raises:
        PipelineError: the image does not have 8 bits a channel in grey or RGB.
    """
    if image.mode not in _MODES:
        raise PipelineError(
            f"{name} is an image of mode {image.mode}: convert it to 8-bit RGB or grey first."
        )
    grey = image.mode in ("1", "L", "LA")
    if has_alpha(image):
        image = image.convert("RGBA")
        image = image.convert("LA") if grey else image
    else:
        image = image.convert("L" if grey else "RGB")
    return np.array(image)


def _pillow_image(values: Tensor, like: Image.Image) -> Image.Image:
    """Return values 1 C H W as a Pillow image with the colour profile of `like`."""
    array = _array_back(3)(values)
    image = Image.fromarray(array[..., 0] if array.shape[2] == 1 else array)
    if "icc_profile" in like.info:
        image.info["icc_profile"] = like.info["icc_profile"]
    return image


def _channels_first(array: NDArray[Any]) -> Tensor:
    """Return an array H W, H W C or N H W C as a tensor N C H W."""
    # A copy, because torch has no read-only tensors.
    values = torch.from_numpy(array.copy())
    if array.ndim == 2:
        return values[None, None]
    return values.reshape(-1, *array.shape[-3:]).permute(0, 3, 1, 2)


def _array_back(dimensions: int) -> Callable[[Tensor], NDArray[Any]]:
    """Return a function that converts N C H W to an array of so many dimensions."""

    def back(values: Tensor) -> NDArray[Any]:
        if dimensions == 2:
            values = values[0, 0]
        else:
            values = values.permute(0, 2, 3, 1)
            values = values[0] if dimensions == 3 else values
        return np.ascontiguousarray(values.numpy())

    return back


def _tensor_back(dimensions: int) -> Callable[[Tensor], Tensor]:
    """Return a function that converts N C H W to a tensor of so many dimensions."""

    def back(values: Tensor) -> Tensor:
        return {2: values[0, 0], 3: values[0], 4: values}[dimensions]

    return back


def _white(masks: Tensor, name: str, report: Report) -> Tensor:
    """Return the white pixels of masks N C H W, bool N 1 H W."""
    whole = not masks.is_floating_point()
    arrays = (masks if whole else masks.float()).permute(0, 2, 3, 1).cpu().numpy()
    low, high = float(arrays.min()), float(arrays.max())
    most = 1.0 if not whole else 65535.0 if arrays.dtype == np.uint16 else 255.0
    if not (low >= 0 and high <= most):  # NaN as well
        raise PipelineError(
            f"{name} has values from {low:g} to {high:g}: give booleans, numbers from 0 to 1, or"
            " integers from 0 to 255. White is the hole."
        )
    top = white_level(arrays) if whole else 1.0
    found = [_checked(partial(white_of_array, each, top), name) for each in arrays]
    _report_impure(sum(each.impure for each in found) / len(found), found[0].half, name, report)
    return torch.from_numpy(np.stack([each.white for each in found]))[:, None]


def _white_of_pillow(mask: Image.Image, name: str, report: Report) -> Tensor:
    """Return the white pixels of a Pillow image, bool 1 1 H W."""
    found = _checked(partial(white_of_image, mask), name)
    if found.labels:
        report(f"{name} is a map of labels: every label but 0 is the hole.")
    _report_impure(found.impure, found.half, name, report)
    return torch.from_numpy(found.white.copy())[None, None]


def _checked(read: Callable[[], WhitePixels], name: str) -> WhitePixels:
    """Return what `read` returns; raise its errors with the mask's name."""
    try:
        return read()
    except (PhotoError, ValueError) as error:  # Pillow cannot convert every mode
        raise PipelineError(
            f"{name} cannot be used: {error}. Give a mask that is white in the hole and black"
            " elsewhere, and check that image and mask are not exchanged."
        ) from None


def _report_impure(impure: float, half: float, name: str, report: Report) -> None:
    if impure > 0:
        report(
            f"{name} is not pure black and white ({impure:.1%} of it is grey): pixels of {half:g}"
            " and more are the hole."
        )


def _unknown_kind(given: Any, name: str) -> PipelineError:
    return PipelineError(
        f"{name} is a {type(given).__name__}: give a NumPy array, a torch tensor or a Pillow image"
        " (dpnet.inpaint also accepts a list of images)."
    )


def _shape(given: Any) -> str:
    return " x ".join(map(str, given.shape))
