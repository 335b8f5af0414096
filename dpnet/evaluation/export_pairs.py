"""Write the frozen pairs as PNG files, so that any model can be run on exactly these pairs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

from data_prep.core.errors import storage_error
from data_prep.core.manifest import StageRef
from data_prep.core.progress import Progress
from data_prep.core.storage.store import Store
from data_prep.core.text import printable
from dpnet.evaluation.pairs import Pair, open_pairs
from dpnet.evaluation.settings import EvaluateSettings

TRUTH, MASKED, MASK, LIST = "truth", "masked", "mask", "pairs.json"


def export_pairs(
    settings: EvaluateSettings, images: StageRef, masks: StageRef, store: Store, folder: Path
) -> int:
    """Write truth/, masked/ and mask/ with a PNG NAME.png of each pair, then pairs.json.

    White is the hole, in the mask and in the masked image. A folder of results with a picture
    NAME.png for each pair can be compared with `--compare`.

    Returns:
        The number of pairs.

    Raises:
        PipelineError: the data cannot be used.
        StorageError: the folder cannot be written.
    """
    frozen = open_pairs(store, settings, images, masks)

    def write(pair: Pair) -> None:
        truth, valid = frozen.images.image(pair[0]), frozen.masks.valid(pair[1])
        hole = np.where(valid > 0, 0, 255).astype(np.uint8)
        masked = np.where(valid[..., None] > 0, truth, np.uint8(255))
        for kind, pixels in ((TRUTH, truth), (MASKED, masked), (MASK, hole)):
            Image.fromarray(pixels).save(folder / kind / f"{frozen.name(pair)}.png")

    listed = [{"name": frozen.name(pair), **frozen.keys(pair)} for pair in frozen.pairs]
    content = {
        "pairs_digest": frozen.digest(),
        "side": frozen.side,
        "hole": "white (255) in mask/ and masked/",
        "pairs": listed,
    }
    try:
        for kind in (TRUTH, MASKED, MASK):
            (folder / kind).mkdir(parents=True, exist_ok=True)
        with Progress("export pairs", len(listed), "pairs") as progress:
            for number, pair in enumerate(frozen.pairs, 1):
                write(pair)
                progress.update(number)
        text = json.dumps(content, indent=1, ensure_ascii=False)
        (folder / LIST).write_text(text + "\n", "utf-8")
    except OSError as error:
        raise storage_error(error, f"the folder {printable(str(folder))}") from error
    return len(listed)
