"""Contact sheets: many small images in one, to look at prepared data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_prep.core.errors import ConfigError, PipelineError
from data_prep.core.storage.store import Store
from data_prep.core.text import count_of, printable
from data_prep.inspection.inspect import read_checked_manifest
from data_prep.masks.plan import BINS
from data_prep.pictures.limits import STORED, PhotoError
from data_prep.pictures.open_image import opened
from data_prep.shards.shards import read_index, split_shards

if TYPE_CHECKING:
    from PIL import Image

CELL = 96  # side of a cell, in pixels
ACROSS, PER_SPLIT = 12, 36  # images in a line, and of a split
GAP = 4  # between cells, in pixels; a caption's letters are three times as high
_ADVICE = "run `dpnet verify` for details"
PAPER, FRAME, INK = (255, 255, 255), (150, 150, 150), (30, 30, 30)


def contact_sheet(
    rows: Sequence[tuple[str, Sequence[Image.Image]]], cell: int, columns: int = 16
) -> Image.Image:
    """Return an RGB image with a caption and lines of framed images for each row.

    The same rows give the same pixels.

    Args:
        rows: captions with their images.
        cell: side of a cell in pixels. Larger images are reduced to fit; smaller ones are not
            enlarged.
        columns: cells in a line. A longer row continues in the next line.
    """
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(3 * GAP)
    line, caption = cell + GAP, 5 * GAP
    across = max((min(len(images), columns) for _, images in rows), default=0)
    captions = [_one_line(text) for text, _ in rows]
    wide = max((int(font.getlength(text)) for text in captions), default=0)
    lines = sum(-(-len(images) // columns) for _, images in rows)
    size = (max(across * line, wide) + 2 * GAP, lines * line + len(rows) * caption + GAP)
    sheet = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(sheet)
    top = GAP
    for text, (_, images) in zip(captions, rows, strict=True):
        draw.text((GAP, top), text, INK, font)
        top += caption
        for start in range(0, len(images), columns):
            for column, image in enumerate(images[start : start + columns]):
                _place(sheet, image, GAP + column * line, top, cell)
            top += line
    return sheet


def image_sheet(store: Store, folder: str) -> Image.Image:
    """Return a contact sheet with some samples of each split, spread over its shards.

    The same set gives the same sheet.

    Raises:
        PipelineError: a sample cannot be decoded.
    """
    rows = []
    for split, numbers in read_checked_manifest(store, folder).summary["splits"].items():
        tars = split_shards(store, folder, split)
        images = [image for tar in tars_for(tars) for image in _some(store, *tar)]
        samples, shards = int(numbers["samples"]), int(numbers["shards"])
        caption = f"{split}: {count_of(samples, 'image')} in {count_of(shards, 'shard')}"
        rows.append((caption, images))
    return contact_sheet(rows, CELL, ACROSS)


def tars_for(tars: Sequence[str]) -> list[tuple[str, int]]:
    """Return evenly spread tars, each with its number of images on the sheet."""
    places = [number * len(tars) // PER_SPLIT for number in range(PER_SPLIT if tars else 0)]
    return [(tars[place], number) for place, number in sorted(Counter(places).items())]


def _some(store: Store, tar: str, number: int) -> Iterator[Image.Image]:
    """Yield at most `number` images of a shard, evenly spread, each by a range read."""
    key = ""
    try:
        rows = read_index(store, tar)
        number = min(number, len(rows))
        for row in (rows[(2 * n + 1) * len(rows) // (2 * number)] for n in range(number)):
            key = str(row["key"])
            data = store.read_range(tar, row["offset"], row["size"])
            with opened(data, STORED) as image:
                image.draft("RGB", (CELL, CELL))  # decodes a large JPEG at a lower resolution
                small = image.convert("RGB")
            yield small
    except FileNotFoundError:
        raise PipelineError(f"{tar} or its index is missing: {_ADVICE}.") from None
    except (OSError, ValueError, KeyError, TypeError, PhotoError):
        part = f"sample {key} of {tar}" if key else f"the index of {tar}"
        raise PipelineError(f"{part} cannot be decoded: {_ADVICE}.") from None


def save_sheet(sheet: Callable[[], Image.Image], path: Path) -> None:
    """Write a sheet as PNG. Raise PipelineError if `path` cannot be written."""
    if not path.parent.is_dir() or path.is_dir():
        raise ConfigError(f"{path} cannot be written. Name a PNG file in an existing folder.")
    sheet().save(path, "PNG")


def mask_sheet(store: Store, folder: str, per_bin: int = 16) -> Image.Image:
    """Return a contact sheet of the mask set in `folder`; holes are white.

    Each ratio bin has a row of at most `per_bin` evaluation masks. The last row has training masks.
    """
    by_bin: dict[str, list[tuple[str, dict[str, Any]]]] = {name: [] for name in BINS}
    for tar in split_shards(store, folder, "eval"):
        for row in read_index(store, tar):
            by_bin[row["ratio_bin"]].append((tar, row))
    rows = []
    for name, masks in by_bin.items():
        touching = sum(bool(row["touches_border"]) for _, row in masks)
        counts = (
            f"{len(masks)} masks, {touching} of them at or near the border" if masks else "none"
        )
        rows.append((f"evaluation, {name} hole: {counts}", masks[:per_bin]))
    first = split_shards(store, folder, "train")[0]
    training = [(first, row) for row in read_index(store, first)[:per_bin]]
    rows.append(("training", training))
    images = [(text, [_payload(store, tar, row) for tar, row in masks]) for text, masks in rows]
    return contact_sheet(images, CELL, per_bin)


def _payload(store: Store, tar: str, row: dict[str, Any]) -> Image.Image:
    try:
        with opened(store.read_range(tar, row["offset"], row["size"]), STORED) as image:
            return image.copy()
    except PhotoError:
        raise PipelineError(f"sample {row['key']} of {tar} cannot be decoded: {_ADVICE}.") from None


def _one_line(text: str) -> str:
    return printable(" ".join(text.split()))


def _place(sheet: Image.Image, image: Image.Image, left: int, top: int, cell: int) -> None:
    """Paste an image into the middle of its cell, with a frame around it."""
    from PIL import Image, ImageOps

    inside = cell - 2  # the frame is a pixel wide
    shown = image.convert("L" if image.mode == "1" else "RGB")
    scale = min(1.0, inside / max(shown.size))
    width, height = (max(1, round(side * scale)) for side in shown.size)
    small = shown.resize((width, height), Image.Resampling.LANCZOS).convert("RGB")
    framed = ImageOps.expand(small, 1, FRAME)
    sheet.paste(framed, (left + (cell - framed.width) // 2, top + (cell - framed.height) // 2))
