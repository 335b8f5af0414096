"""NumPy arrays, torch tensors and Pillow pictures: into the one form that is worked on, and back.

That form is a tensor N C H W of uint8 or floating point, C being 1 grey, 2 grey and alpha, 3 RGB,
4 RGB and alpha. Errors are one sentence that names the image or the mask.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from data_prep.core.errors import PipelineError
from dpnet.inpainting.tiles import Tell

_MODES = ("1", "L", "LA", "P", "RGB", "RGBA")  # 8 bits a channel, grey or RGB
_CHANNELS = (1, 3, 4)  # of arrays and tensors
_FLOATS = ("float16", "float32", "float64", "bfloat16")
_ARRAY_FORMS = "H x W, H x W x C or N x H x W x C"
_TENSOR_FORMS = "H x W, C x H x W or N x C x H x W"


class Pixels(NamedTuple):
    """An image or a batch of them.

    Attributes:
        values: N C H W. back: makes the kind that it came from of such a tensor.
    """

    values: Tensor
    back: Callable[[Tensor], Any]


def take_image(image: Any, name: str) -> Pixels:
    """The pixels of a NumPy array, torch tensor or Pillow picture.

    A picture of mode 1 becomes L and a palette becomes RGB or RGBA; every other kind comes back as
    it was. Raises PipelineError for other kinds, shapes and types.
    """
    if isinstance(image, Image.Image):
        array = picture_array(image, name)
        return Pixels(_channels_first(array), lambda t: _picture(t, image))
    if isinstance(image, Tensor):
        forms, axis, kind = _TENSOR_FORMS, -3, str(image.dtype).removeprefix("torch.")
    elif isinstance(image, np.ndarray):
        forms, axis, kind = _ARRAY_FORMS, -1, str(image.dtype)
    else:
        raise _unknown_kind(image, name)
    if kind not in ("uint8", *_FLOATS):
        raise PipelineError(
            f"{name} is of {kind}: give uint8 from 0 to 255, or floating point from 0 to 1 (of 16"
            " bits a channel, divide by 65535)."
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


def take_mask(mask: Any, images: Tensor, name: str, tell: Tell) -> Tensor:
    """`valid` N1HW (bool, True = known) of a mask for `images` N C H W, on their device.

    White, 1 or True is hole, in any kind that an image can have; of integers 255 is white, or 1
    where there is no larger value. One mask serves all images of a batch. Colours count as their
    mean, and what is transparent as black. A mask that is not binary is hole from half of white up,
    and `tell` is called to say so. Raises PipelineError when it does not fit the images.
    """
    count, (height, width) = len(images), images.shape[2:]
    last = not isinstance(mask, Tensor)
    if isinstance(mask, Image.Image):
        mask = picture_array(mask, name)
    elif not isinstance(mask, (np.ndarray, Tensor)):
        raise _unknown_kind(mask, name)
    given = mask
    if not isinstance(mask, Tensor):
        if mask.dtype.kind not in "buif":
            raise PipelineError(f"{name} is of {mask.dtype}: give booleans or numbers.")
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
    if mask.shape[2:] != images.shape[2:]:
        raise PipelineError(
            f"{name} is {mask.shape[3]} x {mask.shape[2]} pixels but the picture is"
            f" {width} x {height}: give a mask of the picture's size."
        )
    if len(mask) not in (1, count):
        raise PipelineError(
            f"{name} is a batch of {len(mask)} for {count} images: give one for each, or one for"
            " all."
        )
    grey, white = _grey(mask, name)
    between = float(((grey > 0) & (grey < white)).float().mean())
    if between > 0:
        tell(
            f"{name} is not pure black and white ({between:.1%} of it is grey): a pixel counts as"
            f" hole from {128 if white == 255 else 0.5} up."
        )
    return (grey < white / 2).to(images.device).expand(count, -1, -1, -1)


def has_alpha(picture: Image.Image) -> bool:
    return picture.mode in ("LA", "RGBA") or "transparency" in picture.info


def picture_array(picture: Image.Image, name: str) -> NDArray[np.uint8]:
    """Uint8 [H, W] or [H, W, C] of a Pillow picture. Raises PipelineError for other modes."""
    if picture.mode not in _MODES:
        raise PipelineError(
            f"{name} is a picture of mode {picture.mode}: convert it to 8-bit RGB or grey first."
        )
    grey = picture.mode in ("1", "L", "LA")
    if has_alpha(picture):
        picture = picture.convert("RGBA")
        picture = picture.convert("LA") if grey else picture
    else:
        picture = picture.convert("L" if grey else "RGB")
    return np.array(picture)


def _picture(values: Tensor, like: Image.Image) -> Image.Image:
    array = _array_back(3)(values)
    picture = Image.fromarray(array[..., 0] if array.shape[2] == 1 else array)
    if "icc_profile" in like.info:
        picture.info["icc_profile"] = like.info["icc_profile"]
    return picture


def _channels_first(array: NDArray[Any]) -> Tensor:
    """N C H W of an array H W, H W C or N H W C; a copy, because torch has no read-only tensors."""
    values = torch.from_numpy(array.copy())
    if array.ndim == 2:
        return values[None, None]
    return values.reshape(-1, *array.shape[-3:]).permute(0, 3, 1, 2)


def _array_back(dimensions: int) -> Callable[[Tensor], NDArray[Any]]:
    def back(values: Tensor) -> NDArray[Any]:
        if dimensions == 2:
            values = values[0, 0]
        else:
            values = values.permute(0, 2, 3, 1)
            values = values[0] if dimensions == 3 else values
        return np.ascontiguousarray(values.numpy())

    return back


def _tensor_back(dimensions: int) -> Callable[[Tensor], Tensor]:
    def back(values: Tensor) -> Tensor:
        return {2: values[0, 0], 3: values[0], 4: values}[dimensions]

    return back


def _grey(mask: Tensor, name: str) -> tuple[Tensor, float]:
    """N1HW in float32 of a mask N C H W, and the value that is white in it."""
    whole = not mask.is_floating_point()
    mask = mask.float()
    low, high = (float(value) for value in mask.aminmax())
    white = 255.0 if whole and high > 1 else 1.0
    if not (low >= 0 and high <= white):  # NaN as well
        raise PipelineError(
            f"{name} holds values from {low:g} to {high:g}: give booleans, numbers from 0 to 1, or"
            " integers from 0 to 255; white is the hole."
        )
    if mask.shape[1] in (2, 4):
        return mask[:, :-1].mean(1, keepdim=True) * (mask[:, -1:] / white), white
    return mask.mean(1, keepdim=True), white


def _unknown_kind(given: Any, name: str) -> PipelineError:
    return PipelineError(
        f"{name} is a {type(given).__name__}: give a NumPy array, a torch tensor or a Pillow"
        " picture (dpnet.inpaint takes also a list of images)."
    )


def _shape(given: Any) -> str:
    return " x ".join(map(str, given.shape))
