"""Contact sheets: many small pictures on one, to look at what was made."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from data_prep.core.storage.store import Store
from data_prep.masks.plan import BINS
from data_prep.shards.shards import read_index, split_shards

if TYPE_CHECKING:
    from PIL import Image

CELL = 96  # side of a mask on a sheet, in pixels
GAP = 4  # between cells, in pixels; a caption's letters are three times as high
PAPER, FRAME, INK = (255, 255, 255), (150, 150, 150), (30, 30, 30)


def contact_sheet(
    rows: Sequence[tuple[str, Sequence[Image.Image]]], cell: int, columns: int = 16
) -> Image.Image:
    """An RGB picture with a caption and a line of pictures for each row.

    Pictures are shrunk to fit a square of `cell` pixels, never enlarged, and framed; a row of more
    than `columns` goes on in the next line. The same rows give the same pixels.
    """
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(3 * GAP)
    line, caption = cell + GAP, 5 * GAP
    across = max((min(len(pictures), columns) for _, pictures in rows), default=0)
    captions = [_one_line(text) for text, _ in rows]
    wide = max((int(font.getlength(text)) for text in captions), default=0)
    lines = sum(-(-len(pictures) // columns) for _, pictures in rows)
    size = (max(across * line, wide) + 2 * GAP, lines * line + len(rows) * caption + GAP)
    sheet = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(sheet)
    top = GAP
    for text, (_, pictures) in zip(captions, rows, strict=True):
        draw.text((GAP, top), text, INK, font)
        top += caption
        for start in range(0, len(pictures), columns):
            for column, picture in enumerate(pictures[start : start + columns]):
                _place(sheet, picture, GAP + column * line, top, cell)
            top += line
    return sheet


def mask_sheet(store: Store, folder: str, per_bin: int = 16) -> Image.Image:
    """A contact sheet of the mask set in `folder`: holes are white.

    A row of at most `per_bin` evaluation masks for each ratio bin, and one of training masks.
    """
    by_bin: dict[str, list[tuple[str, dict[str, Any]]]] = {name: [] for name in BINS}
    for tar in split_shards(store, folder, "eval"):
        for row in read_index(store, tar):
            by_bin[row["ratio_bin"]].append((tar, row))
    rows = []
    for name, masks in by_bin.items():
        touching = sum(bool(row["touches_border"]) for _, row in masks)
        counts = (
            f"{len(masks)} masks, {touching} of them reach to the border or near it"
            if masks
            else "none"
        )
        rows.append((f"evaluation, {name} hole: {counts}", masks[:per_bin]))
    first = split_shards(store, folder, "train")[0]
    training = [(first, row) for row in read_index(store, first)[:per_bin]]
    rows.append(("training", training))
    pictures = [(text, [_payload(store, tar, row) for tar, row in masks]) for text, masks in rows]
    return contact_sheet(pictures, CELL, per_bin)


def _payload(store: Store, tar: str, row: dict[str, Any]) -> Image.Image:
    from PIL import Image

    return Image.open(io.BytesIO(store.read_range(tar, row["offset"], row["size"])))


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _place(sheet: Image.Image, picture: Image.Image, left: int, top: int, cell: int) -> None:
    """The picture in the middle of its cell, with a frame around it."""
    from PIL import Image, ImageOps

    inside = cell - 2  # the frame is a pixel wide
    shown = picture.convert("L" if picture.mode == "1" else "RGB")
    scale = min(1.0, inside / max(shown.size))
    width, height = (max(1, round(side * scale)) for side in shown.size)
    small = shown.resize((width, height), Image.Resampling.LANCZOS).convert("RGB")
    framed = ImageOps.expand(small, 1, FRAME)
    sheet.paste(framed, (left + (cell - framed.width) // 2, top + (cell - framed.height) // 2))
