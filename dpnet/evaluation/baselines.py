"""Methods without learning, to compare a model with: mean fill, pull-push, two of OpenCV.

Each takes an image, uint8 [H, W, 3], and a mask `valid`, uint8 [H, W] (1 = known, 0 = hole). Each
returns the composite, uint8 [H, W, 3]. Its known pixels are those of the image, bit for bit.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Image = NDArray[np.uint8]

RADIUS = 3  # pixels; the radius of OpenCV's own example
MID_GREY = 128  # the fill of an image without known pixels


def mean_fill(image: Image, valid: Image) -> Image:
    """Fill the hole with the mean colour of the image's known pixels, rounded."""
    known = image[valid > 0]
    colour = np.rint(known.mean(axis=0)) if len(known) else np.full(3, MID_GREY)
    return composite(image, valid, colour.astype(np.uint8))


def smooth_fill(image: Image, valid: Image) -> Image:
    """Fill the hole by pull-push, which is an input of DPNet's decoder (`dpnet.model.fill`)."""
    import torch

    from dpnet.model.fill import pull_push
    from dpnet.model.generator import known_mean

    known = torch.from_numpy(valid)[None, None].float()
    pixels = torch.from_numpy(composite(image, valid, np.uint8(0)))
    colour = pixels.permute(2, 0, 1)[None].float() / 255
    filled = pull_push(colour, known, known_mean(colour, known))[0].permute(1, 2, 0)
    return composite(image, valid, (filled * 255).round().to(torch.uint8).numpy())


def telea(image: Image, valid: Image) -> Image:
    """Fill the hole by fast marching, as OpenCV does (Telea, J. Graphics Tools 9(1), 2004)."""
    import cv2

    return _inpaint(image, valid, cv2.INPAINT_TELEA)


def navier_stokes(image: Image, valid: Image) -> Image:
    """Fill the hole by fluid dynamics, as OpenCV does (Bertalmio et al., CVPR 2001)."""
    import cv2

    return _inpaint(image, valid, cv2.INPAINT_NS)


def _inpaint(image: Image, valid: Image, method: int) -> Image:
    """Fill the hole with a method of OpenCV.

    All channels are treated in the same way, so their order does not matter. An image without
    known pixels becomes grey, because OpenCV would keep the truth in it.
    """
    import cv2

    if not valid.any():
        return mean_fill(image, valid)
    hole = (valid == 0).astype(np.uint8)
    # Empty the hole first, so that the method cannot see the truth.
    filled = cv2.inpaint(composite(image, valid, np.uint8(0)), hole, RADIUS, method)
    return composite(image, valid, filled)


def composite(image: Image, valid: Image, fill: Image | np.uint8) -> Image:
    """Return `image` where pixels are known, and `fill` in the hole."""
    return np.where(valid[..., None] > 0, image, fill)
