"""The evaluation stage: compare a trained generator with methods without learning.

It writes metrics.parquet (a row for each pair and method), report.json (the figures and their
definitions), pictures/ and report.html. Until the commit, parts/ holds the rows of each finished
shard of masks. So an interrupted evaluation resumes at the next shard.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from data_prep.core.digest import sha256_json
from data_prep.core.errors import PipelineError
from data_prep.core.lease import check_leases
from data_prep.core.manifest import Manifest, StageRef, read_manifest
from data_prep.core.paths import EVALUATIONS
from data_prep.core.progress import Progress
from data_prep.core.record import parse_json
from data_prep.core.stage import Produced, Request, Work, run_stage
from data_prep.core.storage.store import Store
from data_prep.shards.shards import encode_table, write_file
from dpnet.evaluation.protocol import (
    METHODS,
    NOT_COMPUTED,
    PROTOCOL,
    PROTOCOL_VERSION,
    Rows,
    count_perfect,
    figures,
    summarise,
)
from dpnet.evaluation.settings import EvaluateSettings
from dpnet.tracking.run_log import read_log

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from dpnet.evaluation.report import PictureRow
    from dpnet.loading.samples import Samples
    from dpnet.model import Generator

    Array = NDArray[np.uint8]

Pair = tuple[int, int]  # positions of the image and of the mask

_KEYS = {"image": "string", "mask": "string", "ratio_bin": "string", "hole_ratio": "float64"}
_VALUES = ("psnr", "hole_psnr", "ssim", "hole_ssim", "l1", "hole_l1")
_COLUMNS = {**_KEYS, "method": "string", **dict.fromkeys(_VALUES, "float64")}
BATCH = 16  # fixed: another size can round values in another way


def evaluate(
    settings: EvaluateSettings, images: StageRef, masks: StageRef, run: StageRef, store: Store
) -> StageRef:
    """Measure a run's generator and the other methods on frozen pairs, and write the report.

    Args:
        settings: settings of the evaluation.
        images: the images stage.
        masks: the masks stage.
        run: the train stage.
        store: the root.
    """
    request = Request(
        stage="evaluate",
        name=run.name,
        top=EVALUATIONS,
        settings=settings.model_dump(exclude={"threads"}) | {"protocol": PROTOCOL_VERSION},
        inputs={"images": images, "masks": masks, "run": run},
    )
    return run_stage(store, request, lambda work: _build(work, settings))


@dataclass(frozen=True)
class _Bench:
    """The data, the generator and the threads that measure pairs."""

    images: Samples
    masks: Samples
    generator: Generator
    pool: Executor

    def composites(self, pairs: Sequence[Pair]) -> Iterator[tuple[Pair, Array, Array, Array]]:
        """Yield (pair, truth [H, W, 3], valid [H, W], DPNet's composite) for each of `pairs`."""
        import numpy as np

        from dpnet.inpainting.tiles import inpaint_arrays

        for start in range(0, len(pairs), BATCH):
            batch = pairs[start : start + BATCH]
            truths = np.stack(list(self.pool.map(self.images.image, [i for i, _ in batch])))
            valid = np.stack(list(self.pool.map(self.masks.valid, [m for _, m in batch])))
            filled = inpaint_arrays(self.generator, truths, valid)
            yield from zip(batch, truths, valid, filled, strict=True)

    def measure(self, pairs: Sequence[Pair]) -> Iterator[Rows]:
        """Yield rows of metrics.parquet, batch by batch."""
        for start in range(0, len(pairs), BATCH):
            batch = self.composites(pairs[start : start + BATCH])
            of_pairs = self.pool.map(self._measure_pair, *zip(*batch, strict=True))
            yield [row for rows in of_pairs for row in rows]

    def _measure_pair(self, pair: Pair, truth: Array, valid: Array, filled: Array) -> Rows:
        from dpnet.evaluation.metrics import evaluate_pair

        keys = self.keys(pair)
        return [
            {**keys, "method": method, **evaluate_pair(composite, truth, valid)}
            for method, composite in by_method(truth, valid, filled).items()
        ]

    def keys(self, pair: Pair) -> dict[str, Any]:
        """Return the columns of a row that identify its pair."""
        image, mask = pair
        names = {"image": self.images.key(image), "mask": self.masks.key(mask)}
        return names | {name: self.masks.value(name, mask) for name in ("ratio_bin", "hole_ratio")}


def by_method(truth: Array, valid: Array, filled: Array) -> dict[str, Array]:
    """Return the composite of every method. `filled` is that of DPNet."""
    from dpnet.evaluation.baselines import mean_fill, smooth_fill, telea

    return {
        "dpnet": filled,
        "smooth_fill": smooth_fill(truth, valid),
        "telea": telea(truth, valid),
        "mean_fill": mean_fill(truth, valid),
    }


def _build(work: Work, settings: EvaluateSettings) -> Produced:
    from dpnet.evaluation.report import render_report
    from dpnet.inpainting.tiles import on_fastest_device
    from dpnet.loading.pairs import validation_pairs
    from dpnet.loading.samples import Samples
    from dpnet.model_store.weights import load_generator

    store, inputs = work.store, work.request.inputs
    masks = Samples(store, inputs["masks"], "eval", columns=("width", "ratio_bin", "hole_ratio"))
    side = masks.value("width", 0)
    images = Samples(store, inputs["images"], settings.split, side, ("width", "height"))
    _check_sizes(images, side)
    digests = (inputs["images"].content_digest, inputs["masks"].content_digest)
    pairs = validation_pairs(images, masks, digests, seed=settings.seed, count=settings.max_pairs)
    generator = on_fastest_device(load_generator(store, inputs["run"].folder))
    with ThreadPoolExecutor(settings.threads or os.cpu_count() or 1) as pool:
        bench = _Bench(images, masks, generator, pool)
        rows = _measure_all(work, bench, pairs)
        pictures = _pictures(bench, pairs, settings.pictures)
    named = [[row["image"], row["mask"]] for row in rows[:: len(METHODS)]]
    pairs_digest = sha256_json({"images": digests[0], "masks": digests[1], "pairs": named})
    report = {
        "pairs": len(pairs),
        "pairs_digest": pairs_digest,
        "inputs": {role: ref.content_digest for role, ref in inputs.items()},
        "settings": dict(work.request.settings),
        "figures": figures(rows, pairs_digest),
        "perfect": count_perfect(rows),
        "protocol": PROTOCOL,
        "not_computed": NOT_COMPUTED,
    }
    page = render_report(report, pictures, read_log(store, inputs["run"].folder), _chain(work))
    files = [
        write_file(work, "metrics.parquet", encode_table(rows, _COLUMNS)),
        write_file(work, "report.json", json.dumps(report, indent=1, ensure_ascii=False).encode()),
        *(write_file(work, f"pictures/{row.name}.png", row.png) for row in pictures),
        # Not content, since it shows the duration of stages.
        write_file(work, "report.html", page.encode(), content=False),
    ]
    work.lease.check()  # another runner would need the parts
    for entry in list(store.list(work.key("parts"))):
        store.delete(entry.key)
    return Produced(files, summarise(report))


def _check_sizes(images: Samples, side: int) -> None:
    """Raise PipelineError if an image is smaller than the masks. Larger images are cropped."""
    widths, heights = images.column("width"), images.column("height")
    for position, (width, height) in enumerate(zip(widths, heights, strict=True)):
        if min(width, height) < side:
            raise PipelineError(
                f"the image {images.key(position)} is {width} x {height} pixels but the masks"
                f" are {side} x {side}: give images.size and masks.size the same value, and use"
                " images.mode center-crop, short-side or tiles."
            )


def _measure_all(work: Work, bench: _Bench, pairs: Sequence[Pair]) -> Rows:
    """Measure all pairs, and keep the rows of each mask shard as soon as they are complete."""
    rows: Rows = []
    with Progress("evaluate", len(pairs), "pairs") as progress:
        for shard, group in groupby(pairs, key=lambda pair: bench.masks.shard_key(pair[1])):
            wanted = list(group)
            key = work.key(f"parts/{PurePosixPath(shard).stem}.json")
            part = _read_part(work.store, key, [bench.keys(pair) for pair in wanted])
            if part is None:
                part = []
                for some in bench.measure(wanted):
                    check_leases()
                    part += some
                    progress.update((len(rows) + len(part)) // len(METHODS))
                body = {"sha256": sha256_json(part), "rows": part}
                work.store.write(key, json.dumps(body).encode())
                rows += part
            else:
                rows += part
                progress.update(len(rows) // len(METHODS), resumed=len(part) // len(METHODS))
    return rows


def _read_part(store: Store, key: str, wanted: Rows) -> Rows | None:
    """Return the rows that an interrupted evaluation kept, if they are undamaged and as wanted."""
    try:
        body = parse_json(store.read(key))
        rows: Rows = body["rows"]
        names = [{name: row[name] for name in _KEYS} for row in rows[:: len(METHODS)]]
        return rows if sha256_json(rows) == body["sha256"] and names == wanted else None
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def _pictures(bench: _Bench, pairs: Sequence[Pair], count: int) -> list[PictureRow]:
    """Return the first `count` pairs of each bin as rows of images."""
    from dpnet.evaluation.metrics import hole_psnr
    from dpnet.evaluation.report import PictureRow, strip

    seen: dict[str, int] = {}
    chosen = []
    for pair in pairs:
        name = bench.keys(pair)["ratio_bin"]
        seen[name] = seen.get(name, 0) + 1
        if seen[name] <= count:
            chosen.append(pair)
    made = []
    for pair, truth, valid, filled in bench.composites(chosen):
        check_leases()
        keys, methods = bench.keys(pair), by_method(truth, valid, filled)
        psnr = {name: hole_psnr(image, truth, valid) or 0.0 for name, image in methods.items()}
        made.append(PictureRow(strip(truth, valid, methods), **keys, hole_psnr=psnr))
    return made


def _chain(work: Work) -> list[Manifest]:
    """Return the manifests of the inputs, and this stage's own without its results."""
    request = work.request
    inputs = (read_manifest(work.store, ref.folder) for ref in request.inputs.values())
    return [*inputs, request.draft()]
