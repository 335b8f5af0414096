"""Read an image or a mask for `dpnet inpaint` from a file.

Another process imports this module, so it imports no model.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image

from data_prep.core.errors import ConfigError, PipelineError
from data_prep.pictures.limits import MOST_PIXELS, HeicError, Limits, PhotoError, PhotoSizeError
from data_prep.pictures.open_image import opened
from data_prep.pictures.orientation import upright_image

_LIMITS = Limits(MOST_PIXELS, option="the limit")
_MAX_BYTES = 2_000_000_000  # of a file


class TooLargeError(PipelineError):
    """Image with more pixels or bytes than are allowed."""


def read_file(path: Path) -> Image.Image:
    """Return the image in a file, decoded and upright."""
    with explained(str(path)), opened(_bytes_of(path), _LIMITS) as image:
        return upright_image(image)


@contextmanager
def explained(name: str) -> Iterator[None]:
    """Turn every error of reading an image in the block into a sentence that names the image."""
    try:
        yield
    except FileNotFoundError:
        raise ConfigError(f"{name} does not exist: check the path.") from None
    except OSError as error:
        reason = error.strerror or error
        raise PipelineError(f"{name} cannot be read: {reason}. Check the path.") from None
    except PhotoSizeError as error:
        raise TooLargeError(f"{name} is too large: {error}. Give a smaller image.") from None
    except HeicError:
        raise PipelineError(
            f"{name} is HEIC, the format of iPhones, which cannot be read: export it as JPEG."
        ) from None
    except PhotoError as error:
        raise PipelineError(
            f"{name} cannot be decoded: {error}. Give an undamaged JPEG, PNG or WebP file."
        ) from None
    except MemoryError:
        raise PipelineError(
            f"{name} cannot be decoded: there is too little memory. Give a smaller image."
        ) from None


def _bytes_of(path: Path) -> bytes:
    """Return the bytes of a file; refuse devices and pipes, which may never end."""
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:  # a pipe would block
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise OSError("it is not a file")
        if status.st_size > _MAX_BYTES:
            raise PhotoSizeError(f"it has {status.st_size} bytes, the limit is {_MAX_BYTES}")
        return file.read(_MAX_BYTES)
