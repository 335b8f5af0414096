"""B8: listings of 10^5 to 10^7 images, manifests of 10^2 to 10^5 shards, orders for 1,024 ranks.

    python benchmarks/scale.py [--json]

Each size runs in its own process and gives seconds and peak memory. The processor time is more
reliable than the seconds when other programs use the machine. The listing is synthetic, with keys
in no order. No image exists, because planning reads none.

The ratios: `plan_s` and `plan_gb` are for 10^7 images, `order_s` is for 10^5 shards and 1,024
ranks. `linear` is the time of one image among 10^7, divided by the time of one among 10^5.
`linear_gb` is the same for the memory, without the memory of the interpreter.

The order has shards of 1,000 samples and 1,024 lanes. The time is for finding the samples of one
step of all ranks, 16 for each rank, in the middle of the second epoch, without earlier state. That
is the case when a training resumes there. The last figure is how many shards one rank opens for its
first batch after that.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from compare import Row, in_a_process, report

from data_prep.raw.listing import Item

IMAGES = (10**5, 10**6, 10**7)
SHARDS = (10**2, 10**3, 10**4, 10**5)
RANKS = (1, 32, 1024)
LANES, SAMPLES, OF_RANK = 1024, 1000, 16


def synthetic_items(count: int) -> Iterator[Item]:
    for number in range(count):
        mixed = number * 0x9E3779B1 & 0xFFFFFFFF  # a different number below 2^32 each time
        key = f"photos/{mixed >> 20:03x}/IMG_{mixed:010d}.jpg"
        yield Item(key, 20_000 + mixed % 100_000, mixed | 1 << 40)


def peak_gb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def plan(count: int) -> dict[str, float]:
    """List and plan `count` images as the stage does; return seconds of each step, and GB."""
    import numpy as np
    import pyarrow.compute  # noqa: F401

    from data_prep.images.keys import PHOTO, item_kinds, key_hashes
    from data_prep.images.next_version import listing_digest
    from data_prep.images.plan import plan_items
    from data_prep.images.splits import assign_splits
    from data_prep.raw.listing import collect

    figures = {"start GB": peak_gb()}
    begun, start = time.process_time(), time.perf_counter()

    def lap(name: str) -> None:
        nonlocal start
        now = time.perf_counter()
        figures[name], start = now - start, now

    listing = collect(synthetic_items(count))
    lap("listing")
    hashes = key_hashes(listing.table["key"])
    kind = item_kinds(listing, "synthetic")
    listing_digest(listing)
    lap("hashing")
    given = np.full(count, -1, np.int8)
    split, notes = assign_splits(given, kind == PHOTO, hashes.draw, 0.05, 0.05)
    planned = plan_items(listing, hashes, kind, split, notes, shard_items=1000)
    assert sum(len(shard.rows) for shard in planned.shards) == count
    lap("splits and shards")
    return {**figures, "processor": time.process_time() - begun, "GB": peak_gb()}


def manifest(count: int) -> dict[str, float]:
    """Commit and read the manifest of `count` shards; return seconds of each, and MB."""
    from data_prep.core.manifest import FileRecord, load_reference
    from data_prep.core.stage import Produced, Request, run_stage
    from data_prep.core.storage.local import LocalStore

    names = [f"train-{number:06d}" for number in range(count)]
    files = [
        FileRecord(f"{name}.{kind}", 30_000_000, f"{hash((name, kind)) & 2**256 - 1:064x}")
        for name in names
        for kind in ("tar", "parquet")
    ]
    request = Request("images", "scale", "images/scale", {"shards": count})
    with tempfile.TemporaryDirectory() as root:
        store = LocalStore(Path(root))
        start = time.perf_counter()
        made = run_stage(store, request, lambda work: Produced(files, {}))
        written = time.perf_counter()
        assert load_reference(store, made.folder).content_digest == made.content_digest
        read = time.perf_counter()
        size = (Path(root) / made.folder / "manifest.json").stat().st_size
    return {"write": written - start, "read": read - written, "MB": size / 1e6, "GB": peak_gb()}


def order(shards: int, ranks: int) -> dict[str, float]:
    """Find one step's samples in the middle of the second epoch; return seconds, shards, GB."""
    from dpnet.loading.order import ShardOrder, rank_cursors

    start = time.perf_counter()
    found = ShardOrder("digest", 0, [SAMPLES] * shards, LANES)
    batch = OF_RANK * ranks
    step = shards * SAMPLES * 3 // 2 // batch
    samples = found.samples_at(step * batch, (step + 1) * batch)
    assert len(samples) == batch
    seconds = time.perf_counter() - start
    mine = [cursor - step * batch for cursor in rank_cursors(step, batch, 0, ranks)]
    opened = len({tuple(samples[i, :2]) for i in mine})
    return {"seconds": seconds, "shards": opened, "GB": peak_gb()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    parser.add_argument("--run", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        what, *counts = arguments.run
        print(
            json.dumps(
                {"plan": plan, "manifest": manifest, "order": order}[what](*map(int, counts))
            )
        )
        return

    def measured(what: str, *counts: int) -> dict[str, float]:
        words = [what, *map(str, counts)]
        print(" ".join(words), file=sys.stderr, flush=True)
        return dict(in_a_process([sys.executable, __file__, "--run", *words]))

    rows: list[Row] = []
    seconds, memory, start_gb = {}, {}, 0.0
    for count in IMAGES:
        figures = measured("plan", count)
        start_gb = figures.pop("start GB")
        memory[count], processor = figures.pop("GB"), figures.pop("processor")
        seconds[count] = sum(figures.values())
        rows += [Row(f"{count:,} images: {step}", [s], "s") for step, s in figures.items()]
        rows.append(Row(f"{count:,} images: in all", [seconds[count]], "s"))
        rows.append(Row(f"{count:,} images: processor time", [processor], "s"))
        rows.append(Row(f"{count:,} images: peak memory", [memory[count]], "GB"))
    for count in SHARDS:
        figures = measured("manifest", count)
        rows += [
            Row(f"{count:,} shards: manifest written", [figures["write"]], "s"),
            Row(f"{count:,} shards: manifest read", [figures["read"]], "s"),
            Row(f"{count:,} shards: manifest", [figures["MB"]], "MB"),
            Row(f"{count:,} shards: peak memory", [figures["GB"]], "GB"),
        ]
    for count in SHARDS:
        for ranks in RANKS:
            figures = measured("order", count, ranks)
            where = f"{count:,} shards, {ranks:,} ranks"
            rows += [
                Row(f"{where}: order at a step", [figures["seconds"]], "s"),
                Row(f"{where}: opened by one rank", [figures["shards"]], "shards"),
                Row(f"{where}: peak memory", [figures["GB"]], "GB"),
            ]
    order_s = figures["seconds"]
    least, most = IMAGES[0], IMAGES[-1]
    times = most / least
    ratios = {
        "plan_s": seconds[most],
        "plan_gb": memory[most],
        "linear": seconds[most] / seconds[least] / times,
        "order_s": order_s,
        "linear_gb": (memory[most] - start_gb) / max(memory[least] - start_gb, 1e-3) / times,
    }
    report("B8: growth", rows, ratios, as_json=arguments.json)


if __name__ == "__main__":
    main()
