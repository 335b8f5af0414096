"""The evaluation stage: compare a trained generator with other methods.

It writes metrics.parquet (a row for each pair and method), report.json (the figures and their
definitions), pictures/ and report.html. Until the commit, parts/ holds the measurements of the
finished parts of mask shards. So an interrupted evaluation resumes at the next part. Workers
measure, here or on a cluster; only this process writes.
"""

from __future__ import annotations

import json
import logging
import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from data_prep.core.lease import check_leases
from data_prep.core.manifest import Manifest, StageRef, read_manifest
from data_prep.core.paths import EVALUATIONS
from data_prep.core.progress import Progress
from data_prep.core.stage import Produced, Request, Work, find_committed, run_stage
from data_prep.core.storage.store import Store
from data_prep.shards.shards import table_bytes, write_file
from dpnet.evaluation.pairs import open_pairs
from dpnet.evaluation.parts import PartStore, clear_parts, split_into_parts
from dpnet.evaluation.peers import find_peers
from dpnet.evaluation.protocol import (
    NO_INCEPTION,
    NO_LPIPS_WEIGHTS,
    PROTOCOL,
    PROTOCOL_VERSION,
    SET_PROTOCOL,
    count_empty,
    count_perfect,
    figures,
    methods_with,
    not_computed,
    set_notes,
    summarise,
)
from dpnet.evaluation.settings import EvaluateSettings
from dpnet.evaluation.weights import Weights, is_official, weights_of
from dpnet.evaluation.workers import DrawExamples, MeasurePart, Place, Plan, RunTasks, here
from dpnet.tracking.run_log import read_log

if TYPE_CHECKING:
    import pyarrow as pa

    from dpnet.evaluation.examples import Example
    from dpnet.evaluation.pairs import FrozenPairs

log = logging.getLogger(__name__)

_KEYS = {"image": "string", "mask": "string", "ratio_bin": "string", "hole_ratio": "float64"}
_VALUES = ("psnr", "hole_psnr", "ssim", "hole_ssim", "l1", "hole_l1", "lpips")
_PARTS = "parts"
_COLUMNS = {**_KEYS, "method": "string", **dict.fromkeys(_VALUES, "float64")}


def evaluate(
    settings: EvaluateSettings,
    images: StageRef,
    masks: StageRef,
    run: StageRef,
    store: Store,
    place: Place | None = None,
) -> StageRef:
    """Measure a run's generator and the other methods on frozen pairs, and write the report.

    Args:
        settings: settings of the evaluation.
        images: the images stage.
        masks: the masks stage.
        run: the train stage.
        store: the root.
        place: where the pairs are measured; by default on the threads of this machine. The result
            does not depend on it.

    Raises:
        ConfigError: an option of the settings names what does not exist.
        PipelineError: the data, the model, the weights of a metric, the results of another model
            or the cluster cannot be used.
    """
    plan = Plan(
        store, settings, images, masks, run, find_peers(settings, store), weights_of(settings)
    )
    place = here(settings.threads) if place is None else place
    ref = run_stage(store, _request(plan), lambda work: _build(work, plan, place))
    # After the commit, so that a kill before it costs no measurement.
    clear_parts(store, f"{ref.folder}/{_PARTS}")
    return ref


def find_evaluation(
    settings: EvaluateSettings, images: StageRef, masks: StageRef, run: StageRef, store: Store
) -> StageRef | None:
    """Return the committed evaluation of a run, or None. Nothing is downloaded.

    Args:
        settings: settings of the evaluation.
        images: the images stage.
        masks: the masks stage.
        run: the train stage.
        store: the root.
    """
    weights = weights_of(settings.model_copy(update={"allow_downloads": False}))
    peers = find_peers(settings, store)
    return find_committed(
        store, _request(Plan(store, settings, images, masks, run, peers, weights))
    )


def _request(plan: Plan) -> Request:
    compared = {f"compare/{peer.name}": peer.digest for peer in plan.peers}
    return Request(
        stage="evaluate",
        name=plan.run.name,
        top=EVALUATIONS,
        settings=plan.settings.requested() | {"protocol": PROTOCOL_VERSION},
        inputs={"images": plan.images, "masks": plan.masks, "run": plan.run},
        sources={**plan.weights.sources, **compared},
    )


def _build(work: Work, plan: Plan, place: Place) -> Produced:
    from dpnet.evaluation.report import render_report

    store, inputs, settings = work.store, work.request.inputs, plan.settings
    frozen = open_pairs(store, settings, inputs["images"], inputs["masks"])
    with ThreadPoolExecutor(settings.threads or os.cpu_count() or 1) as pool:
        for peer in plan.peers:
            peer.check([frozen.name(pair) for pair in frozen.pairs], frozen.side, pool)
    methods = methods_with([peer.name for peer in plan.peers])
    no_lpips, no_inception = _reasons(plan.weights, frozen)
    used = Weights(
        None if no_lpips else plan.weights.lpips, None if no_inception else plan.weights.inception
    )
    plan = replace(plan, weights=used, frozen=frozen)
    parts = PartStore(store, work.key(_PARTS), frozen, list(methods), used.inception is not None)
    with place(plan) as run_tasks:
        table, speed = _measure_all(parts, run_tasks)
        examples = _examples(frozen, table, settings.pictures, run_tasks)
    pairs_digest = frozen.digest()
    sets = _sets(parts, used)
    report = {
        "pairs": len(frozen.pairs),
        "pairs_digest": pairs_digest,
        "inputs": {role: ref.content_digest for role, ref in inputs.items()},
        "settings": dict(work.request.settings),
        "methods": methods,
        "compared": {peer.name: peer.digest for peer in plan.peers},
        **_versions(plan),
        "figures": figures(table, pairs_digest),
        "perfect": count_perfect(table),
        "empty_holes": count_empty(table),
        **({"sets": sets} if sets else {}),
        "protocol": PROTOCOL | (SET_PROTOCOL if sets else {}),
        "not_computed": not_computed(no_lpips, no_inception),
    }
    for note in set_notes(report):
        log.warning(note)
    page = render_report(report, examples, read_log(store, inputs["run"].folder), _chain(work))
    files = [
        write_file(work, "metrics.parquet", table_bytes(table)),
        write_file(work, "report.json", json.dumps(report, indent=1, ensure_ascii=False).encode()),
        *(write_file(work, f"pictures/{each.name}.png", each.strip) for each in examples),
        # Not content, since it shows the duration of stages.
        write_file(work, "report.html", page.encode(), content=False),
    ]
    return Produced(files, summarise(report) | speed)


def _versions(plan: Plan) -> dict[str, dict[str, str]]:
    """Return the part of the report that names the registered versions among the peers."""
    versions = {peer.name: peer.version for peer in plan.peers if peer.version}
    return {"versions": versions} if versions else {}


def _reasons(weights: Weights, frozen: FrozenPairs) -> tuple[str | None, str | None]:
    """Return why LPIPS and why FID is not computed, each None if it is."""
    from dpnet.evaluation.lpips import LEAST_SIDE
    from dpnet.evaluation.sets import LEAST_PAIRS

    lpips = inception = None
    if weights.lpips is None:
        lpips = NO_LPIPS_WEIGHTS
    elif frozen.side < LEAST_SIDE:
        side = frozen.side
        lpips = f"needs images of at least {LEAST_SIDE} pixels a side, and these have {side}."
    if weights.inception is None:
        inception = NO_INCEPTION
    elif len(frozen.pairs) < LEAST_PAIRS:
        inception = f"needs at least {LEAST_PAIRS} pairs, and there is {len(frozen.pairs)}."
    return lpips, inception


def _measure_all(parts: PartStore, run_tasks: RunTasks) -> tuple[pa.Table, dict[str, Any]]:
    """Measure all pairs, and keep the measurements of each part as soon as they are complete.

    Returns the rows of metrics.parquet, and the speed for the summary. In memory the rows are
    columns of about 130 bytes each; only the rows of one part are Python objects at a time, and
    only the images of one batch.
    """
    import pyarrow as pa

    schema = pa.schema([(name, pa.type_for_alias(kind)) for name, kind in _COLUMNS.items()])
    tables: dict[str, pa.Table] = {}
    wanted = split_into_parts(parts.frozen)
    missing = []
    done = 0
    with Progress("evaluate", len(parts.frozen.pairs), "pairs") as progress:
        for part in wanted:
            rows = parts.read(part)
            if rows is None:
                missing.append(MeasurePart(part))
                continue
            done += len(part.pairs)
            progress.update(done, resumed=len(part.pairs))
            tables[part.name] = pa.Table.from_pylist(rows, schema=schema)
        start, resumed = time.monotonic(), done

        def tick(count: int) -> None:
            nonlocal done
            check_leases()
            done += count
            progress.update(done)

        progress.update(done)
        for number, measured in run_tasks(missing, tick):
            part = missing[number].part
            parts.write(part, measured)
            tables[part.name] = pa.Table.from_pylist(measured.rows, schema=schema)
    table = pa.concat_tables([tables[part.name] for part in wanted])
    return table, _speed(done - resumed, time.monotonic() - start)


def _speed(pairs: int, seconds: float) -> dict[str, Any]:
    """Return the speed of the pairs that were measured now, and log it."""
    if pairs == 0:
        return {}
    log.info("measured %s pairs in %.1f s: %.2f pairs/s", f"{pairs:,}", seconds, pairs / seconds)
    return {"pairs_per_second": round(pairs / seconds, 3)}


def _sets(parts: PartStore, weights: Weights) -> dict[str, Any] | None:
    """Return FID, P-IDS and U-IDS of every method, or None without weights."""
    if weights.inception is None:
        return None
    from dpnet.evaluation.sets import measure_sets

    pairs, sha256 = len(parts.frozen.pairs), weights.inception.sha256
    features = parts.features(split_into_parts(parts.frozen))
    found = measure_sets(features, pairs, parts.methods)
    return {**found, "inception": sha256, "official": is_official(sha256)}


def _examples(
    frozen: FrozenPairs, table: pa.Table, count: int, run_tasks: RunTasks
) -> list[Example]:
    """Return the pairs that the report shows, `count` of each kind."""
    from dpnet.evaluation.bench import BATCH
    from dpnet.evaluation.examples import choose_examples

    width = table.num_rows // len(frozen.pairs)
    number_of = {pair: number for number, pair in enumerate(frozen.pairs)}
    marks = choose_examples(frozen.pairs, table, count)
    shown = list(marks)
    tasks = []
    for start in range(0, len(shown), BATCH):
        some = shown[start : start + BATCH]
        rows = [table.slice(number_of[pair] * width, width).to_pylist() for pair in some]
        tasks.append(DrawExamples(some, [marks[pair] for pair in some], rows))
    made = dict(run_tasks(tasks, lambda count: check_leases()))
    return [each for number in range(len(tasks)) for each in made[number]]


def _chain(work: Work) -> list[Manifest]:
    """Return the manifests of the inputs, and this stage's own without its results."""
    request = work.request
    inputs = (read_manifest(work.store, ref.folder) for ref in request.inputs.values())
    return [*inputs, request.draft()]
