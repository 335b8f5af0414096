"""The sample photographs: real ones that scikit-image carries in its package, as files.

Each split has photographs of its own, because tiles of one photograph resemble each other: tested
on tiles next to those it was trained on, a network would look better than it is. The two motorcycle
pictures are one scene from two cameras, so they share a split. Drawings, text, microscopy, charts
and the logo are left out: they are no photographs.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

from data_prep.core.errors import PipelineError, storage_error

PHOTOGRAPHS = {
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


def write_sample_photographs(folder: Path) -> None:
    """Write the photographs to `folder/{train,val,test}/NAME`; what is there already stays.

    Raises PipelineError when the installed scikit-image lacks one, StorageError when the folder
    cannot be written.
    """
    packaged = _packaged_data()
    for split, names in PHOTOGRAPHS.items():
        for name in names:
            try:
                data = (packaged / name).read_bytes()
            except FileNotFoundError:
                raise PipelineError(
                    f"the installed scikit-image does not carry the photograph {name}:"
                    " install scikit-image 0.25 or 0.26, or give your own photographs."
                ) from None
            target = folder / split / name
            try:
                _write_once(target, data)
            except OSError as error:
                raise storage_error(error, str(target)) from error


def _write_once(target: Path, data: bytes) -> None:
    """Write a whole file or none; the same file is not touched, so it keeps its time."""
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
    spec = importlib.util.find_spec("skimage")  # found, not imported: that takes a second
    if spec is None or spec.origin is None:
        raise PipelineError("scikit-image is not installed: run `pip install scikit-image`.")
    return Path(spec.origin).parent / "data"
