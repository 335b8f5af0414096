"""The evaluation stage: compare a trained generator with other methods.

It writes metrics.parquet (a row for each pair and method), report.json (the figures and their
definitions), pictures/ and report.html. Until the commit, parts/ holds the rows of each finished
shard of masks. So an interrupted evaluation resumes at the next shard.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from data_prep.core.digest import sha256_json
from data_prep.core.lease import check_leases
from data_prep.core.manifest import Manifest, StageRef, read_manifest
from data_prep.core.paths import EVALUATIONS
from data_prep.core.progress import Progress
from data_prep.core.record import parse_json
from data_prep.core.stage import Produced, Request, Work, run_stage
from data_prep.core.storage.store import Store
from data_prep.shards.shards import table_bytes, write_file
from dpnet.evaluation.pairs import open_pairs
from dpnet.evaluation.peers import Peer, find_peers
from dpnet.evaluation.protocol import (
    NO_LPIPS_WEIGHTS,
    PROTOCOL,
    PROTOCOL_VERSION,
    Rows,
    count_empty,
    count_perfect,
    figures,
    methods_with,
    not_computed,
    summarise,
)
from dpnet.evaluation.settings import EvaluateSettings
from dpnet.evaluation.weights import find_weights, weights_source
from dpnet.tracking.run_log import read_log

if TYPE_CHECKING:
    import pyarrow as pa

    from dpnet.evaluation.bench import Bench
    from dpnet.evaluation.examples import Example
    from dpnet.evaluation.lpips import Lpips

_KEYS = {"image": "string", "mask": "string", "ratio_bin": "string", "hole_ratio": "float64"}
_VALUES = ("psnr", "hole_psnr", "ssim", "hole_ssim", "l1", "hole_l1", "lpips")
_COLUMNS = {**_KEYS, "method": "string", **dict.fromkeys(_VALUES, "float64")}


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
        ConfigError: `evaluate.lpips_weights` or `evaluate.compare` names what does not exist.
        PipelineError: the data, the model, the weights of LPIPS or the results of another model
            cannot be used.
    """
    given = _Given(find_weights(settings), find_peers(settings, store))
    compared = {f"compare/{peer.name}": peer.digest for peer in given.peers}
    request = Request(
        stage="evaluate",
        name=run.name,
        top=EVALUATIONS,
        settings=settings.requested() | {"protocol": PROTOCOL_VERSION},
        inputs={"images": images, "masks": masks, "run": run},
        sources={**weights_source(given.lpips_file), **compared},
    )
    return run_stage(store, request, lambda work: _build(work, settings, given))


@dataclass(frozen=True)
class _Given:
    """The files and models that the settings name outside of the root."""

    lpips_file: Path | None
    peers: Sequence[Peer]


def _build(work: Work, settings: EvaluateSettings, given: _Given) -> Produced:
    from dpnet.evaluation.bench import Bench
    from dpnet.evaluation.report import render_report
    from dpnet.inpainting.tiles import device_of, on_fastest_device
    from dpnet.model_store.weights import load_generator

    store, inputs = work.store, work.request.inputs
    frozen = open_pairs(store, settings, inputs["images"], inputs["masks"])
    generator = on_fastest_device(load_generator(store, inputs["run"].folder))
    lpips, reason = _lpips(given.lpips_file, work.request, frozen.side)
    if lpips is not None:
        lpips.to(device_of(generator))
    with ThreadPoolExecutor(settings.threads or os.cpu_count() or 1) as pool:
        for peer in given.peers:
            peer.prepare([frozen.name(pair) for pair in frozen.pairs], frozen.side, pool)
        bench = Bench(frozen, generator, given.peers, lpips, pool)
        methods = methods_with([peer.name for peer in given.peers])
        table = _measure_all(work, bench, list(methods))
        examples = _examples(bench, table, settings.pictures)
    pairs_digest = frozen.digest()
    report = {
        "pairs": len(frozen.pairs),
        "pairs_digest": pairs_digest,
        "inputs": {role: ref.content_digest for role, ref in inputs.items()},
        "settings": dict(work.request.settings),
        "methods": methods,
        "compared": {peer.name: peer.digest for peer in given.peers},
        "figures": figures(table, pairs_digest),
        "perfect": count_perfect(table),
        "empty_holes": count_empty(table),
        "protocol": PROTOCOL,
        "not_computed": not_computed(reason),
    }
    page = render_report(report, examples, read_log(store, inputs["run"].folder), _chain(work))
    files = [
        write_file(work, "metrics.parquet", table_bytes(table)),
        write_file(work, "report.json", json.dumps(report, indent=1, ensure_ascii=False).encode()),
        *(write_file(work, f"pictures/{each.name}.png", each.strip) for each in examples),
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


def _measure_all(work: Work, bench: Bench, methods: Sequence[str]) -> pa.Table:
    """Measure all pairs, and keep the rows of each mask shard as soon as they are complete.

    Returns the rows of metrics.parquet. In memory they are columns of about 130 bytes a row; only
    the rows of one shard are Python objects at a time, and only the images of one batch.
    """
    import pyarrow as pa

    frozen, tables = bench.frozen, []
    schema = pa.schema([(name, pa.type_for_alias(kind)) for name, kind in _COLUMNS.items()])
    done = 0  # pairs of the finished shards
    with Progress("evaluate", len(frozen.pairs), "pairs") as progress:
        for shard, group in groupby(frozen.pairs, key=lambda pair: frozen.masks.shard_key(pair[1])):
            wanted = list(group)
            key = work.key(f"parts/{PurePosixPath(shard).stem}.json")
            part = _read_part(work.store, key, [frozen.keys(pair) for pair in wanted], methods)
            if part is None:
                part = []
                for some in bench.measure(wanted):
                    check_leases()
                    part += some
                    progress.update(done + len(part) // len(methods))
                body = {"sha256": sha256_json(part), "rows": part}
                work.store.write(key, json.dumps(body).encode())
            else:
                progress.update(done + len(wanted), resumed=len(wanted))
            done += len(wanted)
            tables.append(pa.Table.from_pylist(part, schema=schema))
    return pa.concat_tables(tables)


def _read_part(store: Store, key: str, wanted: Rows, methods: Sequence[str]) -> Rows | None:
    """Return the rows that an interrupted evaluation kept, if they are undamaged and as wanted."""
    try:
        body = parse_json(store.read(key))
        rows: Rows = body["rows"]
        names = [{name: row[name] for name in _KEYS} for row in rows[:: len(methods)]]
        return rows if sha256_json(rows) == body["sha256"] and names == wanted else None
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def _examples(bench: Bench, table: pa.Table, count: int) -> list[Example]:
    """Return the pairs that the report shows, `count` of each kind."""
    from dpnet.evaluation.examples import choose_examples, draw_example

    frozen = bench.frozen
    width = table.num_rows // len(frozen.pairs)
    number_of = {pair: number for number, pair in enumerate(frozen.pairs)}
    marks = choose_examples(frozen.pairs, table, count)
    made = []
    for pair, truth, valid, methods in bench.fill(list(marks)):
        check_leases()
        own = table.slice(number_of[pair] * width, width).to_pylist()
        made.append(draw_example(truth, valid, methods, own, marks[pair]))
    return made


def _chain(work: Work) -> list[Manifest]:
    """Return the manifests of the inputs, and this stage's own without its results."""
    request = work.request
    inputs = (read_manifest(work.store, ref.folder) for ref in request.inputs.values())
    return [*inputs, request.draft()]
