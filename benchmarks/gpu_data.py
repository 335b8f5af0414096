"""Prepared shards for the benchmarks of training, in two sizes.

    python benchmarks/gpu_data.py --out DIR [--photos DIR]

DIR/256 and DIR/64 are roots of the pipeline with image and mask shards of these sides, and
DIR/SIDE/sets.json names their folders. Without --photos the photos are those of scikit-image, cut
into tiles. An empty file DIR/ready is written last.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data_prep.core.errors import PipelineError
from data_prep.core.manifest import StageRef, load_reference
from data_prep.core.storage.open import open_store
from data_prep.core.storage.store import Store
from data_prep.images.settings import ImagesSettings
from data_prep.images.stage import prepare_images
from data_prep.masks.settings import MasksSettings
from data_prep.masks.stage import prepare_masks
from data_prep.pictures.formats import is_picture_name
from data_prep.raw.sample_photos import write_sample_photos
from dpnet.loading.shard_files import check_enough, find_shards

SIDES = (256, 64)
BATCH = 16  # samples that the shards must have at least
MASKS = 2000
MOST = 400  # photos to take: at most 40 MB of shards


def write_sets(folder: Path, photos: Path | None, most: int) -> None:
    """Prepare the shards of both sizes.

    Args:
        folder: where to write; it must not have shards yet.
        photos: a folder of photos, or None for the sample photos.
        most: photos to take, evenly spaced in the order of their names.

    Raises:
        PipelineError: there are too few photos, or too many cannot be used.
    """
    with tempfile.TemporaryDirectory(prefix="dpnet-photos-") as scratch:
        if photos is None:
            source = Path(scratch) / "photos"
            write_sample_photos(source)
        else:
            source = Path(scratch) / "photos.txt"
            source.write_text("\n".join(map(str, evenly_spaced(photos, most))) + "\n")
        for side in SIDES:
            write_set(folder / str(side), source, side)
    (folder / "ready").touch()


def evenly_spaced(photos: Path, most: int) -> list[Path]:
    """Return at most so many photos of a folder. Raises PipelineError if it has none."""
    found = sorted(
        path for path in photos.absolute().rglob("*") if is_picture_name(path.name)
    )  # fmt: skip
    if not found:
        raise PipelineError(f"{photos} has no photos: name a folder that has some.")
    count = min(most, len(found))
    return [found[number * len(found) // count] for number in range(count)]


def write_set(folder: Path, source: Path, side: int) -> None:
    """Prepare image and mask shards of one size in a root of their own."""
    store = open_store(str(folder))
    if source.is_dir():
        tiles = {"mode": "tiles", "tile": [256], "tile_stride": 0.5, "max_tiles": 100}
    else:
        tiles = {"mode": "center-crop"}
    given = {"source": str(source), "name": "gpu", "size": side, "max_failure_ratio": 0.5}
    images = prepare_images(ImagesSettings.model_validate(given | tiles), store)
    masks = prepare_masks(MasksSettings(name="gpu", size=side, train=MASKS, eval_per_bin=4), store)
    for each in (images, masks):
        check_enough(find_shards(store, each, "train"), BATCH)
    names = {"images": images.folder, "masks": masks.folder}
    (folder / "sets.json").write_text(json.dumps(names))


def load_sets(folder: Path) -> tuple[Store, StageRef, StageRef]:
    """Return the root of one size, its images and its masks. Ends the script if there are none."""
    file = folder / "sets.json"
    if not file.is_file():
        sys.exit(f"{file} is missing: make it with `python benchmarks/gpu_data.py --out DIR`")
    names, store = json.loads(file.read_text()), open_store(str(folder.absolute()))
    return store, load_reference(store, names["images"]), load_reference(store, names["masks"])


def main() -> None:
    """Prepare the shards, or end with one sentence."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--photos", type=Path, metavar="DIR")
    parser.add_argument("--most", type=int, default=MOST, help=f"photos (default: {MOST})")
    options = parser.parse_args()
    try:
        write_sets(options.out, options.photos, options.most)
    except PipelineError as error:
        sys.exit(f"gpu_data.py: {error}")


if __name__ == "__main__":
    main()
