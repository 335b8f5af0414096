"""The sample photos: real photos from the scikit-image package.

Each split has photos of its own. Tiles of one photo resemble each other, so a network tested on
tiles next to its training tiles would seem better than it is. The two motorcycle photos show one
scene from two cameras, so they share a split. Drawings, text, microscopy, charts and the logo are
not photos and not included.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

from data_prep.core.errors import PipelineError, storage_error

SAMPLE_PHOTOS = {
    "train": (
        "astronaut.png",
        "clock_motion.png",
        "coins.png",
        "grass.png",
        "gravel.png",
        "hubble_deep_field.jpg",
        "moon.png",
        "motorcycle_left.png",
        "motorcycle_right.png",
        "retina.jpg",
    ),
    "val": ("brick.png", "camera.png"),
    "test": ("chelsea.png", "coffee.png", "rocket.jpg"),
}


def write_sample_photos(folder: Path) -> None:
    """Write the photos to `folder/{train,val,test}/NAME`. Other files there stay.

    Raises:
        PipelineError: The installed scikit-image does not contain one of the photos.
        StorageError: The folder cannot be written.
    """
    packaged = _packaged_data()
    for split, names in SAMPLE_PHOTOS.items():
        for name in names:
            try:
                data = (packaged / name).read_bytes()
            except FileNotFoundError:
                raise PipelineError(
                    f"the installed scikit-image does not contain the photo {name}. Install"
                    " scikit-image 0.25 or 0.26, or give your own photos."
                ) from None
            target = folder / split / name
            try:
                _write_once(target, data)
            except OSError as error:
                raise storage_error(error, str(target)) from error


def _write_once(target: Path, data: bytes) -> None:
    """Write a whole file or nothing; do not touch an equal file, so that it keeps its time."""
    if target.is_file() and target.read_bytes() == data:
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    staged = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        staged.write_bytes(data)
        os.replace(staged, target)
    finally:
        staged.unlink(missing_ok=True)


def _packaged_data() -> Path:
    spec = importlib.util.find_spec("skimage")  # the import would take a second
    if spec is None or spec.origin is None:
        raise PipelineError("scikit-image is not installed. Run `pip install scikit-image`.")
    return Path(spec.origin).parent / "data"
