"""The work of `dpnet inpaint`: fill image files, folders of them, or globs.

A bad file is reported and does not stop the others.
"""

from __future__ import annotations

import glob
import logging
import re
import time
import unicodedata
from collections.abc import Callable, Sequence
from os.path import realpath  # Path.resolve fails on a loop of links
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from data_prep.core.apart import DECODE_S, Apart, DeathError
from data_prep.core.errors import ConfigError, PipelineError
from data_prep.core.progress import Progress
from data_prep.core.text import count_of, printable
from data_prep.pictures.formats import LOOK, is_picture_name, looks_like_photo
from dpnet.inpainting.api import fill_image
from dpnet.inpainting.conversion import has_alpha
from dpnet.inpainting.read_file import read_file
from dpnet.inpainting.tiles import TILE_MIN, on_fastest_device
from dpnet.model import Generator
from dpnet.model_store.find_model import find_model
from dpnet.model_store.weights import load_generator

log = logging.getLogger(__name__)

# How a result is saved, by extension; lossless if the format can be.
SAVE: dict[str, dict[str, Any]] = {
    ".png": {},
    ".webp": {"lossless": True, "exact": True},
    ".tif": {"compression": "tiff_deflate"},
    ".tiff": {"compression": "tiff_deflate"},
    ".jpg": {"quality": 95, "subsampling": 0},
    ".jpeg": {"quality": 95, "subsampling": 0},
}
_JPEG = (".jpg", ".jpeg")
_MASK_ENDING = re.compile(r"_mask\d*$", re.IGNORECASE)
_NAMED = 5  # files of a folder that are left out and named in a message
# Words in a mask's name which suggest that white is known.
_INVERTED = re.compile(r"(?:^|[^a-z])(?:valid|known|keep|inverted)(?:[^a-z]|$)", re.IGNORECASE)


Read = Callable[[Path], Image.Image]


class Job(NamedTuple):
    """One image to fill; `mask` is a path, or a sentence that says why there is no mask."""

    image: Path
    mask: Path | str
    out: Path


class Plan(NamedTuple):
    """The images to fill, and the other entries of the given folders."""

    jobs: list[Job]
    left_out: list[Path]


def inpaint_files(
    image: str, mask: str, out: str, *, root: str | None, model: str, tile: int
) -> dict[str, Any]:
    """Fill the holes of image files.

    Args:
        image: a file, a folder or a glob.
        mask: a file, a folder or a glob; see `plan_jobs`.
        out: file to write, or a folder for several images.
        root: where models are searched; None as for `load_model`.
        model: name of a model, as for `load_model`.
        tile: side of a tile in pixels, at least 64.

    Returns:
        JSON values about the model and each image. If several images are given, the failed ones
        are in `failed`, and then `ok` is false. Entries of folders that are no images are in
        `left_out`.

    Raises:
        PipelineError: nothing can be done, or the only image cannot be filled.
    """
    if tile < TILE_MIN:
        raise ConfigError(f"--tile is {tile}: give at least {TILE_MIN} pixels.")
    start = time.monotonic()
    for path in (image, mask):
        if not _several(path) and not Path(path).exists():
            raise ConfigError(f"{path} does not exist: check the path.")
    jobs, left_out = plan_jobs(image, mask, out)
    store, folder, used = find_model(model, root)
    log.info("inpaint: loads %s to fill %s", used, count_of(len(jobs), "image"))
    generator = on_fastest_device(load_generator(store, folder))
    done: list[dict[str, Any]] = []
    failed: list[dict[str, str]] = []
    if not _several(image):
        done.append(_fill_file(generator, jobs[0], tile, read_file, progress=True))
    else:
        with (
            Progress("inpaint", len(jobs), "images") as progress,
            Apart(read_file, DECODE_S) as read,  # a decoder that crashes must not end the others
        ):
            for number, job in enumerate(jobs, 1):
                try:
                    done.append(_fill_file(generator, job, tile, read))
                except PipelineError as error:
                    message, name = str(error), printable(str(job.image))
                    message = message if name in message else f"{name}: {message}"
                    log.warning("%s", message)
                    failed.append({"image": name, "error": message})
                progress.update(number, f"{len(failed)} failed" if failed else "")
    return {
        "ok": not failed,
        "model": used,
        "pictures": done,
        "failed": failed,
        "left_out": [printable(str(path)) for path in left_out],
        "seconds": round(time.monotonic() - start, 2),
    }


def plan_jobs(image: str, mask: str, out: str) -> Plan:
    """Decide which image uses which mask, and where the result is written.

    A folder means the images in it, but not those in its subfolders. One mask file serves all
    images. If there are several masks, `photo.jpg` uses the mask named `photo`, else the mask named
    `photo_mask`, which may end in digits. The same letters in another case, or in another form of
    Unicode, are the same name if there is no better one. Where images and masks are in one folder,
    files with such names are masks. Several results go to the folder `out`, as STEM.png.

    Raises:
        PipelineError: there is no image or mask, two results have the same file, or a result would
            overwrite an image or a mask.
    """
    left_out: list[Path] = []
    images = _listed(image, left_out)
    masks = _listed(mask, left_out)
    if _several(mask):
        images = [i for i in images if not (i in masks and _MASK_ENDING.search(i.stem))] or images
    target = Path(out)
    if _several(image):
        if target.exists() and not target.is_dir():
            raise ConfigError(f"{out} is a file: give a folder (-o) for several images.")
        outs = [target / f"{i.stem}.png" for i in images]
    else:
        outs = [target / f"{images[0].stem}.png" if target.is_dir() else target]
        if outs[0].suffix.lower() not in SAVE:
            raise ConfigError(
                f"cannot write {out!r}: name it with one of the extensions {', '.join(SAVE)}."
            )
    matched = [_mask_of(i, masks, mask) if _several(mask) else masks[0] for i in images]
    jobs = [Job(*each) for each in zip(images, matched, outs, strict=True)]
    _check_outs(jobs, masks)
    _report_inverted_names([job.mask for job in jobs if isinstance(job.mask, Path)])
    left_out = [path for path in dict.fromkeys(left_out) if realpath(path) != realpath(target)]
    _report_left_out(left_out)
    return Plan(jobs, left_out)


def _check_outs(jobs: Sequence[Job], masks: Sequence[Path]) -> None:
    """Raise PipelineError if results have the same file or overwrite a file that is read."""
    inputs = {realpath(path) for path in (*(job.image for job in jobs), *masks)}
    sources: dict[str, Path] = {}
    for job in jobs:
        written = realpath(job.out)
        if written in sources:
            raise ConfigError(
                f"the results of {sources[written]} and {job.image} would both be written to"
                f" {job.out}: rename one image, or fill them one at a time."
            )
        if written in inputs:
            raise ConfigError(
                f"{job.out} is an image or mask that is read, and would be overwritten: choose"
                " another place with -o."
            )
        sources[written] = job.image


def _report_inverted_names(masks: Sequence[Path]) -> None:
    """Warn once about masks with names which suggest that white is known."""
    named = [path for path in dict.fromkeys(masks) if _INVERTED.search(path.stem)]
    if named:
        more = f" (and {len(named) - 1} more)" if len(named) > 1 else ""
        log.warning(
            f"{named[0]}{more}: the name suggests that white is known, but white is the hole. If"
            " white should be known, invert the mask."
        )


def _several(path: str) -> bool:
    """Return whether a path is a folder or a glob."""
    return Path(path).is_dir() or (glob.has_magic(path) and not Path(path).exists())


def _listed(path: str, left_out: list[Path]) -> list[Path]:
    """Return the files of a path, folder or glob, sorted.

    Entries of a folder that are no images are appended to `left_out`.
    """
    if not _several(path):
        return [Path(path)]
    if Path(path).is_dir():
        entries = sorted(Path(path).iterdir())
        found = [entry for entry in entries if _is_image(entry)]
        left_out += [entry for entry in entries if entry not in set(found)]
    else:
        found = sorted(Path(name) for name in glob.glob(path, recursive=True))
        found = [entry for entry in found if entry.is_file()]
    if not found:
        raise ConfigError(f"{path} contains no image: check the path.")
    return found


def _is_image(path: Path) -> bool:
    """Return whether a folder's entry is an image by its name, or else by its first bytes.

    An image in a format that cannot be read counts too, so that it fails with a reason.
    """
    if not path.is_file() or path.name.startswith("."):
        return False
    if is_picture_name(path.name):
        return True
    try:
        with path.open("rb") as file:
            return looks_like_photo(file.read(LOOK))
    except OSError:
        return False


def _report_left_out(paths: Sequence[Path]) -> None:
    """Warn once about the entries of folders that are no images."""
    if paths:
        names = ", ".join(f"{path}/" if path.is_dir() else str(path) for path in paths[:_NAMED])
        more = f" and {len(paths) - _NAMED} more" if len(paths) > _NAMED else ""
        log.warning(
            "left out, because they are hidden or no image files: %s", printable(f"{names}{more}")
        )


def _mask_of(image: Path, masks: Sequence[Path], where: str) -> Path | str:
    """Return the mask of an image; a sentence if there is none, or more than one."""
    others = [m for m in masks if m != image]
    found: list[Path] = []
    for same in (str, _unicode_form, _any_case):  # the closest name first
        for stem in (lambda m: m.stem, lambda m: _MASK_ENDING.sub("", m.stem)):
            found = found or [m for m in others if same(stem(m)) == same(image.stem)]
    if len(found) == 1:
        return found[0]
    if not found:
        return (
            f"{image} has no mask in {where}: name it {image.stem}.png or {image.stem}_mask.png"
            " (digits may follow)."
        )
    names = ", ".join(m.name for m in found[:3])
    return f"{image} has {len(found)} masks in {where} ({names}): keep only one."


def _unicode_form(name: str) -> str:
    """Return a name in one form of Unicode: macOS and archives write accents in two ways."""
    return unicodedata.normalize("NFC", name)


def _any_case(name: str) -> str:
    return _unicode_form(_unicode_form(name).casefold())


def _fill_file(
    generator: Generator, job: Job, tile: int, read: Read, *, progress: bool = False
) -> dict[str, Any]:
    """Read, fill and write one image, and return JSON values about it.

    Args:
        generator: the model, in eval mode.
        job: the image.
        tile: side of a tile in pixels.
        read: `read_file`, perhaps in another process.
        progress: show the tiles of a large image on standard error.

    Raises:
        PipelineError: whatever happens, because one image must not end the work on the others.
    """
    if isinstance(job.mask, str):
        raise PipelineError(job.mask)
    start = time.monotonic()
    try:
        image, mask = (_read(read, path) for path in (job.image, job.mask))
        found = _fill(generator, job, job.mask, (image, mask), tile, progress=progress)
        return {**found, "seconds": round(time.monotonic() - start, 2)}
    except PipelineError:
        raise
    except Exception as error:
        log.debug("%s", job.image, exc_info=True)
        reason = " ".join(f"{type(error).__name__}: {error}".split()).rstrip(".:")
        raise PipelineError(
            f"{job.image} cannot be filled ({reason}): convert it and its mask to PNG files, or"
            " leave it out."
        ) from error


def _read(read: Read, path: Path) -> Image.Image:
    try:
        return read(path)
    except DeathError as error:
        raise PipelineError(
            f"{path} cannot be decoded: {error}. Give an undamaged JPEG, PNG or WebP file."
        ) from None


def _fill(
    generator: Generator,
    job: Job,
    mask_path: Path,
    images: tuple[Image.Image, Image.Image],
    tile: int,
    *,
    progress: bool,
) -> dict[str, Any]:
    """Fill and write one image.

    Args:
        generator: the model, in eval mode.
        job: the image's paths.
        mask_path: of its mask.
        images: the image and its mask.
        tile: side of a tile in pixels.
        progress: show the tiles of a large image on standard error.
    """
    image, mask = images
    jpeg = job.out.suffix.lower() in _JPEG
    if jpeg and has_alpha(image):
        raise PipelineError(
            f"{job.image} has an alpha channel, which {job.out.suffix} cannot store: write a .png"
            " or .webp file."
        )
    result = fill_image(
        generator, image, mask, tile, str(job.image), str(mask_path), log.warning, progress=progress
    )
    if result is image:
        log.warning(f"{mask_path} has no hole (white, 255, is the hole): the image is unchanged.")
    if jpeg:
        log.warning(
            f"{job.out.suffix} is lossy, so known pixels change a little too: write a .png file to"
            " keep them exactly."
        )
        result = result.convert("L" if result.mode in ("1", "L") else "RGB")
    _save(result, job.out)
    return {
        "image": str(job.image),
        "mask": str(mask_path),
        "out": str(job.out),
        "filled": result is not image,
        "width": result.width,
        "height": result.height,
    }


def _save(image: Image.Image, out: Path) -> None:
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        image.save(out, icc_profile=image.info.get("icc_profile"), **SAVE[out.suffix.lower()])
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise PipelineError(f"cannot write {out}: {reason}. Choose another path.") from error
