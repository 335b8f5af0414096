"""`dpnet inpaint`: picture files, folders and globs of them, in and out.

One bad file stops no other one: it is reported, and the rest is done.
"""

from __future__ import annotations

import glob
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image, ImageOps

from data_prep.core.errors import PipelineError
from data_prep.core.progress import Progress, say
from dpnet.inpainting.api import fill_image
from dpnet.inpainting.conversion import has_alpha
from dpnet.inpainting.tiles import TILE_MIN, on_fastest_device
from dpnet.model import Generator
from dpnet.model_store.find_model import find_model
from dpnet.model_store.weights import load_generator

# How a result is saved, by extension. Lossless wherever the format can be.
_SAVE: dict[str, dict[str, Any]] = {
    ".png": {},
    ".webp": {"lossless": True, "exact": True},
    ".tif": {"compression": "tiff_deflate"},
    ".tiff": {"compression": "tiff_deflate"},
    ".jpg": {"quality": 95, "subsampling": 0},
    ".jpeg": {"quality": 95, "subsampling": 0},
}
_JPEG = (".jpg", ".jpeg")
_PICTURES = (*_SAVE, ".bmp", ".gif")  # what is taken from a folder
_MASK_ENDING = re.compile(r"_mask\d*$")
# Words in a mask's name that say that white is what is known.
_INVERTED = re.compile(r"(?:^|[^a-z])(?:valid|known|keep|inverted)(?:[^a-z]|$)", re.IGNORECASE)


class Job(NamedTuple):
    """One picture to fill. `mask` is a path, or the sentence that says why there is none."""

    image: Path
    mask: Path | str
    out: Path


def inpaint_files(
    image: str, mask: str, out: str, *, root: str, model: str, tile: int
) -> dict[str, Any]:
    """Fill the holes of picture files; what was done, as JSON values.

    `image` is a file, a folder or a glob, `mask` as well; see `plan_jobs`. Raises PipelineError
    with one sentence for what is wrong with all of it (then nothing is written), and for whatever
    is wrong with a single picture where only one is asked for. Of several, those that cannot be
    filled are in the list `failed`, and `ok` is false.
    """
    if tile < TILE_MIN:
        raise PipelineError(f"--tile is {tile}: give at least {TILE_MIN} pixels.")
    start = time.monotonic()
    jobs = plan_jobs(image, mask, out)
    store, folder, used = find_model(model, root)
    generator = on_fastest_device(load_generator(store, folder))
    done: list[dict[str, Any]] = []
    failed: list[dict[str, str]] = []
    if not _several(image):
        done.append(_fill_file(generator, jobs[0], tile, progress=True))
    else:
        with Progress("inpaint", len(jobs), "pictures") as progress:
            for number, job in enumerate(jobs, 1):
                try:
                    done.append(_fill_file(generator, job, tile))
                except PipelineError as error:
                    told, name = str(error), str(job.image)
                    told = told if name in told else f"{name}: {told}"
                    say(told)
                    failed.append({"image": name, "error": told})
                progress.update(number, f"{len(failed)} failed" if failed else "")
    return {
        "ok": not failed,
        "model": used,
        "pictures": done,
        "failed": failed,
        "seconds": round(time.monotonic() - start, 2),
    }


def plan_jobs(image: str, mask: str, out: str) -> list[Job]:
    """Which picture is filled by which mask, and where it is written.

    A folder stands for the pictures in it, not those in its folders. One mask file serves all
    pictures. Of several, a picture `photo.jpg` takes the one whose name without extension is
    `photo`, else the one that is `photo_mask` with or without digits after it; files with such
    names are no pictures to fill where pictures and masks lie together. Several pictures go into
    the folder `out`, as STEM.png.

    Raises PipelineError when there are none, when two would be written to one file, or when one
    would be written over a picture or a mask.
    """
    images = _listed(image)
    masks = _listed(mask)
    if _several(mask):
        images = [i for i in images if not (i in masks and _MASK_ENDING.search(i.stem))] or images
    target = Path(out)
    if _several(image):
        if target.exists() and not target.is_dir():
            raise PipelineError(f"{out} is a file: several pictures need a folder to go into.")
        outs = [target / f"{i.stem}.png" for i in images]
    else:
        outs = [target / f"{images[0].stem}.png" if target.is_dir() else target]
        if outs[0].suffix.lower() not in _SAVE:
            raise PipelineError(
                f"cannot write {out!r}: name it with one of the extensions {', '.join(_SAVE)}."
            )
    matched = [_mask_of(i, masks, mask) if _several(mask) else masks[0] for i in images]
    jobs = [Job(*each) for each in zip(images, matched, outs, strict=True)]
    _check_outs(jobs, masks)
    _tell_polarity([job.mask for job in jobs if isinstance(job.mask, Path)])
    return jobs


def _check_outs(jobs: Sequence[Job], masks: Sequence[Path]) -> None:
    inputs = {path.resolve() for path in (*(job.image for job in jobs), *masks)}
    sources: dict[Path, Path] = {}
    for job in jobs:
        written = job.out.resolve()
        if written in sources:
            raise PipelineError(
                f"{sources[written]} and {job.image} would both be written to {job.out}: rename"
                " one, or take them one at a time."
            )
        if written in inputs:
            raise PipelineError(
                f"{job.out} is a picture or mask to be read, and would be written over: choose"
                " another place with -o."
            )
        sources[written] = job.image


def _tell_polarity(masks: Sequence[Path]) -> None:
    named = [path for path in dict.fromkeys(masks) if _INVERTED.search(path.stem)]
    if named:
        more = f" (and {len(named) - 1} more)" if len(named) > 1 else ""
        say(
            f"{named[0]}{more}: the name sounds as if white were what is known, but white is taken"
            " as the hole; invert the mask if it is meant so."
        )


def _several(path: str) -> bool:
    return Path(path).is_dir() or (glob.has_magic(path) and not Path(path).exists())


def _listed(path: str) -> list[Path]:
    """The files that a path, folder or glob stands for, sorted."""
    if not _several(path):
        return [Path(path)]
    if Path(path).is_dir():
        found = [p for p in Path(path).iterdir() if p.suffix.lower() in _PICTURES]
    else:
        found = [Path(name) for name in glob.glob(path, recursive=True)]
    found = sorted(p for p in found if p.is_file())
    if not found:
        raise PipelineError(f"{path} holds no picture: check the path.")
    return found


def _mask_of(image: Path, masks: Sequence[Path], where: str) -> Path | str:
    """The mask of a picture by its name; a sentence where there is none, or more than one."""
    others = [m for m in masks if m != image]
    found = [m for m in others if m.stem == image.stem] or [
        m for m in others if _MASK_ENDING.sub("", m.stem) == image.stem
    ]
    if len(found) == 1:
        return found[0]
    if not found:
        return (
            f"{image} has no mask in {where}: name it {image.stem}.png or {image.stem}_mask.png"
            " (digits may follow)."
        )
    names = ", ".join(m.name for m in found[:3])
    return f"{image} has {len(found)} masks in {where} ({names}): keep one."


def _fill_file(
    generator: Generator, job: Job, tile: int, *, progress: bool = False
) -> dict[str, Any]:
    """Read, fill and write one picture; what was done, as JSON values."""
    if isinstance(job.mask, str):
        raise PipelineError(job.mask)
    start = time.monotonic()
    picture, mask = _open(job.image), _open(job.mask)
    jpeg = job.out.suffix.lower() in _JPEG
    if jpeg and has_alpha(picture):
        raise PipelineError(
            f"{job.image} has an alpha channel, which {job.out.suffix} cannot hold: write a .png or"
            " .webp."
        )
    result = fill_image(
        generator, picture, mask, tile, str(job.image), str(job.mask), say, progress=progress
    )
    if result is picture:
        say(f"{job.mask} has no hole (white, 255, is hole): the picture comes back as it is.")
    if jpeg:
        say(
            f"{job.out.suffix} is lossy, so known pixels change a little too: .png keeps them"
            " exactly."
        )
        result = result.convert("L" if result.mode in ("1", "L") else "RGB")
    _save(result, job.out)
    return {
        "image": str(job.image),
        "mask": str(job.mask),
        "out": str(job.out),
        "filled": result is not picture,
        "width": result.width,
        "height": result.height,
        "seconds": round(time.monotonic() - start, 2),
    }


def _save(picture: Image.Image, out: Path) -> None:
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        picture.save(out, icc_profile=picture.info.get("icc_profile"), **_SAVE[out.suffix.lower()])
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise PipelineError(f"cannot write {out}: {reason}; choose another path.") from error


def _open(path: Path) -> Image.Image:
    """The picture in a file, decoded and upright."""
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image)
    except FileNotFoundError:
        raise PipelineError(f"{path} does not exist: check the path.") from None
    except (IsADirectoryError, PermissionError) as error:
        raise PipelineError(f"{path} cannot be read: {error.strerror}.") from None
    except Image.DecompressionBombError as error:
        raise PipelineError(f"{path} is too large to open: {error}") from None
    except (OSError, ValueError, SyntaxError) as error:
        raise PipelineError(
            f"{path} is not a picture that can be read: give a whole JPEG, PNG or WebP file."
        ) from error
