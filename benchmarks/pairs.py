"""Evaluation pairs by position: checked samples compared with plain range reads.

    python benchmarks/loader.py --pairs [--repeats 5] [--json]

Validation and evaluation read single samples (`dpnet.loading.samples`) and check each by its hash.
This benchmark shows what the check costs. Both contenders decode the same pairs of an image (JPEG
of 256 x 256 pixels) and a mask, in the same order, with two threads and a warm page cache:

* checked: `Samples`, as it is.
* plain: the same range reads and decoders without the manifest and without any hash. This is how
  validation and evaluation read before they shared the reader of training.

They take turns in one process. A ratio of 1.00 means that the hashes cost nothing. The processor
time says the same where other programs use the machine.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import perf_counter, process_time
from typing import Any, Protocol

from compare import Row, ratio, report, take_turns

SIZE, QUALITY, THREADS = 256, 95, 2
IMAGES, MASKS_PER_BIN = 1500, 500  # there are six bins, so each image is in two pairs
SHARD_SAMPLES = 250
Pair = tuple[int, int]


class Reader(Protocol):
    """Decodes a sample at a position."""

    def image(self, position: int) -> Any: ...
    def valid(self, position: int) -> Any: ...


class PlainSamples:
    """Range reads that trust the index and the shard."""

    def __init__(self, store: Any, folder: str, split: str) -> None:
        from data_prep.shards.shards import read_index, split_shards

        self.store = store
        self.rows = [
            {**row, "shard": shard}
            for shard in split_shards(store, folder, split)
            for row in read_index(store, shard)
        ]

    def _read(self, position: int) -> bytes:
        row = self.rows[position]
        data: bytes = self.store.read_range(row["shard"], row["offset"], row["size"])
        return data

    def image(self, position: int) -> Any:
        from dpnet.loading.decoding import decode_image

        return decode_image(self._read(position))

    def valid(self, position: int) -> Any:
        from data_prep.masks.codec import valid_from_png

        return valid_from_png(self._read(position))


def write_photos(folder: Path) -> None:
    """Write crops of the sample photos: most to the split val, one to each of the others."""
    import cv2
    import numpy as np

    from data_prep.raw.sample_photos import write_sample_photos

    whole = folder.parent / "whole"
    write_sample_photos(whole)
    random = np.random.default_rng(0)
    photos = [cv2.imread(str(path)) for path in sorted(whole.rglob("*.*"))]
    photos = [photo for photo in photos if photo is not None and min(photo.shape[:2]) >= SIZE]
    for split, count in {"train": 1, "val": IMAGES, "test": 1}.items():
        (folder / split).mkdir(parents=True)
        for number in range(count):
            photo: Any = photos[number % len(photos)]
            top, left = (int(random.integers(side - SIZE + 1)) for side in photo.shape[:2])
            crop = photo[top : top + SIZE, left : left + SIZE]
            cv2.imwrite(str(folder / split / f"{number:06d}.png"), crop)


def contenders(folder: Path) -> tuple[dict[str, tuple[Reader, Reader]], list[Pair]]:
    """Build the data. Return the readers of images and of masks, and the pairs."""
    from data_prep.core.storage.local import LocalStore
    from data_prep.images.settings import ImagesSettings
    from data_prep.images.stage import prepare_images
    from data_prep.masks.settings import MasksSettings
    from data_prep.masks.stage import prepare_masks
    from dpnet.loading.pairs import frozen_pairs
    from dpnet.loading.samples import Samples

    write_photos(folder / "photos")
    store = LocalStore(folder / "root")
    options: dict[str, Any] = {"source": str(folder / "photos"), "size": SIZE, "quality": QUALITY}
    options |= {"mode": "center-crop", "dedupe": "off", "near_duplicates": "off"}
    options |= {"shard_samples": SHARD_SAMPLES, "workers": THREADS}
    images = prepare_images(ImagesSettings.model_validate(options), store)
    options = {"size": SIZE, "train": 1, "eval_per_bin": MASKS_PER_BIN, "workers": THREADS}
    masks = prepare_masks(MasksSettings(**options, shard_samples=SHARD_SAMPLES), store)
    checked = Samples(store, images, "val"), Samples(store, masks, "eval")
    pairs = frozen_pairs("images", "masks", 0, len(checked[0]), len(checked[1]))
    plain = PlainSamples(store, images.folder, "val"), PlainSamples(store, masks.folder, "eval")
    return {"checked": checked, "plain": plain}, pairs


def decode_all(readers: tuple[Reader, Reader], pairs: Sequence[Pair]) -> tuple[float, float]:
    """Decode all pairs with THREADS threads. Return pairs per second, and processor ms per pair."""
    images, masks = readers

    def decode(pair: Pair) -> int:
        return int(images.image(pair[0])[0, 0, 0]) + int(masks.valid(pair[1])[0, 0])

    with ThreadPoolExecutor(THREADS) as pool:
        start, before = perf_counter(), process_time()
        total = sum(pool.map(decode, pairs))
        seconds, used = perf_counter() - start, process_time() - before
    assert total > 0
    return len(pairs) / seconds, 1000 * used / len(pairs)


def measure_pairs(repeats: int, *, as_json: bool) -> None:
    """Print the speed of both contenders, and their ratio."""
    folder = Path(tempfile.mkdtemp(prefix="dpnet-bench-"))
    try:
        made, pairs = contenders(folder)

        def turn(readers: tuple[Reader, Reader]) -> Callable[[], tuple[float, float]]:
            return lambda: decode_all(readers, pairs)

        for readers in made.values():  # warm up the page cache and the decoders
            decode_all(readers, pairs)
        measured = take_turns({name: turn(readers) for name, readers in made.items()}, repeats)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    rates = {name: [rate for rate, _ in turns] for name, turns in measured.items()}
    work = {name: [used for _, used in turns] for name, turns in measured.items()}
    rows = [Row(name, values, "pairs/s") for name, values in rates.items()]
    rows += [Row(f"{name}, processor", values, "ms/pair") for name, values in work.items()]
    ratios = {
        "checked_by_plain": ratio(rates["checked"], rates["plain"]),
        "processor_plain_by_checked": ratio(work["plain"], work["checked"]),
    }
    title = f"B2 pairs: {len(pairs)} pairs of {SIZE} x {SIZE} pixels, {repeats} repeats"
    report(title, rows, ratios, as_json=as_json)
