"""The evaluation stage: compare a trained generator with methods without learning.

It writes metrics.parquet (a row for each pair and method), report.json (the figures and their
definitions), pictures/ and report.html. Until the commit, parts/ holds the rows of each finished
shard of masks. So an interrupted evaluation resumes at the next shard.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path, PurePosixPath
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
    NO_LPIPS_WEIGHTS,
    PROTOCOL,
    PROTOCOL_VERSION,
    Rows,
    count_empty,
    count_perfect,
    figures,
    not_computed,
    summarise,
)
from dpnet.evaluation.settings import EvaluateSettings
from dpnet.evaluation.weights import find_weights, weights_source
from dpnet.tracking.run_log import read_log

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from dpnet.evaluation.lpips import Lpips
    from dpnet.evaluation.report import PictureRow
    from dpnet.loading.samples import Samples
    from dpnet.model import Generator

    Array = NDArray[np.uint8]

Pair = tuple[int, int]  # positions of the image and of the mask

_KEYS = {"image": "string", "mask": "string", "ratio_bin": "string", "hole_ratio": "float64"}
_VALUES = ("psnr", "hole_psnr", "ssim", "hole_ssim", "l1", "hole_l1", "lpips")
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

    Raises:
        ConfigError: `evaluate.lpips_weights` names a missing file.
        PipelineError: the data, the model or the weights of LPIPS cannot be used.
    """
    lpips_file = find_weights(settings)
    request = Request(
        stage="evaluate",
        name=run.name,
        top=EVALUATIONS,
        settings=settings.requested() | {"protocol": PROTOCOL_VERSION},
        inputs={"images": images, "masks": masks, "run": run},
        sources=weights_source(lpips_file),
    )
    return run_stage(store, request, lambda work: _build(work, settings, lpips_file))


@dataclass(frozen=True)
class _Bench:
    """The data, the networks and the threads that measure pairs."""

    images: Samples
    masks: Samples
    generator: Generator
    lpips: Lpips | None
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
        from dpnet.evaluation.metrics import evaluate_pair

        for start in range(0, len(pairs), BATCH):
            rows: Rows = []
            for pair, truth, valid, methods in self.filled(pairs[start : start + BATCH]):
                keys, count = self.keys(pair), len(methods)
                # The threads measure while this one computes LPIPS.
                measured = self.pool.map(
                    evaluate_pair, methods.values(), [truth] * count, [valid] * count
                )
                distances = self._distances(truth, methods)
                rows += [
                    {**keys, "method": method, **values, "lpips": distance}
                    for method, values, distance in zip(methods, measured, distances, strict=True)
                ]
            yield rows

    def filled(
        self, pairs: Sequence[Pair]
    ) -> Iterator[tuple[Pair, Array, Array, dict[str, Array]]]:
        """Yield (pair, truth, valid, composite of each method) for each of `pairs`."""
        for start in range(0, len(pairs), BATCH):
            batch = list(self.composites(pairs[start : start + BATCH]))
            methods = self.pool.map(by_method, *list(zip(*batch, strict=True))[1:])
            for (pair, truth, valid, _), composites in zip(batch, methods, strict=True):
                yield pair, truth, valid, composites

    def _distances(self, truth: Array, methods: Mapping[str, Array]) -> Sequence[float | None]:
        if self.lpips is None:
            return [None] * len(methods)
        return self.lpips.distances(truth, list(methods.values()))

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


def _build(work: Work, settings: EvaluateSettings, lpips_file: Path | None) -> Produced:
    from dpnet.evaluation.report import render_report
    from dpnet.inpainting.tiles import device_of, on_fastest_device
    from dpnet.loading.pairs import validation_pairs
    from dpnet.loading.samples import Samples
    from dpnet.model_store.weights import load_generator

    store, inputs = work.store, work.request.inputs
    masks = Samples(
        store, inputs["masks"], "eval", columns=("width", "height", "ratio_bin", "hole_ratio")
    )
    side = masks.value("width", 0)
    images = Samples(store, inputs["images"], settings.split, side, ("width", "height"))
    _check_sizes(images, masks, side)
    digests = (inputs["images"].content_digest, inputs["masks"].content_digest)
    pairs = validation_pairs(images, masks, digests, seed=settings.seed, count=settings.max_pairs)
    generator = on_fastest_device(load_generator(store, inputs["run"].folder))
    lpips, reason = _lpips(lpips_file, work.request, side)
    if lpips is not None:
        lpips.to(device_of(generator))
    with ThreadPoolExecutor(settings.threads or os.cpu_count() or 1) as pool:
        bench = _Bench(images, masks, generator, lpips, pool)
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
        "empty_holes": count_empty(rows),
        "protocol": PROTOCOL,
        "not_computed": not_computed(reason),
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


def _lpips(file: Path | None, request: Request, side: int) -> tuple[Lpips | None, str | None]:
    """Return the network of LPIPS, or None and the reason why there is none."""
    if file is None:
        return None, NO_LPIPS_WEIGHTS
    from dpnet.evaluation.lpips import LEAST_SIDE, load_lpips

    if side < LEAST_SIDE:
        return None, f"needs images of at least {LEAST_SIDE} pixels a side, and these have {side}."
    return load_lpips(file, request.sources["lpips"]), None


def _check_sizes(images: Samples, masks: Samples, side: int) -> None:
    """Raise PipelineError if masks differ in size, or if an image is smaller than the masks.

    Larger images are cropped.
    """
    for position, sides in enumerate(
        zip(masks.column("width"), masks.column("height"), strict=True)
    ):
        if sides != (side, side):
            raise PipelineError(
                f"the mask {masks.key(position)} is {sides[0]} x {sides[1]} pixels but others are"
                f" {side} x {side}: build the masks again with one masks.size."
            )
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
    for pair, truth, valid, methods in bench.filled(chosen):
        check_leases()
        keys = bench.keys(pair)
        psnr = {name: hole_psnr(image, truth, valid) or 0.0 for name, image in methods.items()}
        made.append(PictureRow(strip(truth, valid, methods), **keys, hole_psnr=psnr))
    return made


def _chain(work: Work) -> list[Manifest]:
    """Return the manifests of the inputs, and this stage's own without its results."""
    request = work.request
    inputs = (read_manifest(work.store, ref.folder) for ref in request.inputs.values())
    return [*inputs, request.draft()]
