"""Evaluation: pairs per second, and where the time goes.

    python benchmarks/evaluation.py [--preset tiny] [--size 256] [--pairs 48] [--ray] [--json]

Part one runs each step of an evaluation by itself, on the same pairs and in one thread: reading a
sample's bytes and checking their hash, decoding, the model, each method without learning, each
metric, and writing a part. The figures are milliseconds of processor time for a pair, all methods
of the pair together. Weights are random: they change no speed.

Part two runs whole evaluations with LPIPS and FID's features on the threads of this machine, and
with --ray also with Ray Data on a cluster of this machine. The speed of Ray Data includes the start
of its workers. "Everything else" is FID, P-IDS, U-IDS, the figures, the report and the commit.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

from compare import Row, report, take_turns

sys.path.append(str(Path(__file__).parents[1] / "tests/support"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--preset", default="tiny", choices=["tiny", "small", "base"])
    parser.add_argument("--size", type=int, default=256, help="side of an image in pixels")
    parser.add_argument("--pairs", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--ray", action="store_true", help="also measure Ray Data on this machine")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        given = prepare(Path(folder), args.preset, args.size, args.pairs)
        steps = take_turns({"steps": partial(time_steps, *given)}, args.repeats)["steps"]
        whole = take_turns(
            {name: partial(evaluate_whole, *given, place) for name, place in places(args.ray)},
            args.repeats,
        )
    rows = [Row(name, [each[name] for each in steps], "ms") for name in steps[0]]
    for name, measured in whole.items():
        rows += [
            Row(f"{name}: {what}", [each[what] for each in measured], unit)
            for what, unit in (("measuring", "pairs/s"), ("everything else", "s"))
        ]
    title = (
        f"{args.pairs} pairs of {args.size} x {args.size} pixels, {args.preset}; steps: ms of"
        " processor time for a pair, all methods"
    )
    report(title, rows, {}, as_json=args.json)


def places(with_ray: bool) -> list[tuple[str, Any]]:
    """Return the places to evaluate on, by name."""
    from dpnet.evaluation.workers import here

    found: list[tuple[str, Any]] = [(f"{os.cpu_count()} threads", here(0))]
    if with_ray:
        from dpnet.pipeline.ray_data import ray_data

        found.append(("Ray Data", ray_data("local")))
    return found


def prepare(folder: Path, preset: str, size: int, pairs: int) -> tuple[Any, Any]:
    """Make a root with noisy photos, masks and a model with random weights.

    Returns:
        The root, and the plan of an evaluation.
    """
    import numpy as np
    import torch
    from PIL import Image
    from random_weights import random_alexnet, random_inception

    from data_prep.core.stage import Produced, Request, Work, run_stage
    from data_prep.core.storage.local import LocalStore
    from data_prep.images.settings import ImagesSettings
    from data_prep.images.stage import prepare_images
    from data_prep.masks.settings import MasksSettings
    from data_prep.masks.stage import prepare_masks
    from dpnet.evaluation.settings import EvaluateSettings
    from dpnet.evaluation.weights import weights_of
    from dpnet.evaluation.workers import Plan
    from dpnet.model import build_generator
    from dpnet.model_store.weights import save_generator

    store = LocalStore(folder / "root")
    (folder / "photos").mkdir()
    random = np.random.default_rng(0)
    for number in range(max(12, pairs)):
        coarse = Image.fromarray(random.integers(0, 256, (size // 4, size // 4, 3), np.uint8))
        coarse.resize((size, size), Image.Resampling.BICUBIC).save(
            folder / f"photos/{number}.jpg", quality=95
        )
    photos = {"source": str(folder / "photos"), "name": "bench", "size": size}
    images = prepare_images(ImagesSettings(**photos, val=0.1, test=0.4), store)
    drawn = MasksSettings(
        name="bench", size=size, train=1, eval_per_bin=-(-pairs // 6), shard_samples=8
    )
    masks = prepare_masks(drawn, store)

    def build(work: Work) -> Produced:
        torch.manual_seed(0)
        generator = build_generator(preset)
        torch.nn.init.normal_(generator.out.weight, std=0.01)
        return Produced(save_generator(store, work.folder, generator, {"size": size}), {"steps": 1})

    run = run_stage(store, Request("train", "bench", "runs", {}), build)
    settings = EvaluateSettings(
        lpips_weights=str(random_alexnet(folder / "alexnet.safetensors")),
        inception_weights=str(random_inception(folder / "inception.safetensors")),
        max_pairs=pairs,
        pictures=0,
    )
    return store, Plan(store, settings, images, masks, run, [], weights_of(settings))


def time_steps(store: Any, plan: Any) -> dict[str, float]:
    """Return milliseconds of processor time for a pair in each step, in one thread."""
    from dpnet.evaluation import baselines, metrics
    from dpnet.evaluation.bench import Measured
    from dpnet.evaluation.parts import PartStore, split_into_parts
    from dpnet.inpainting.tiles import inpaint_arrays

    with plan.open(1) as bench:
        frozen, pairs = bench.frozen, bench.frozen.pairs
        filled = list(bench.fill(pairs))

        def read(pair: Any) -> None:
            for samples, position in zip((frozen.images, frozen.masks), pair, strict=True):
                shard, at = samples._find(position)
                shard.read(at)

        def decode_and_read(pair: Any) -> None:
            frozen.images.image(pair[0])
            frozen.masks.valid(pair[1])

        def of_methods(metric: Callable[..., Any]) -> Callable[[Any], None]:
            def measure(each: Any) -> None:
                for picture in each.methods.values():
                    metric(picture, each.truth)

            return measure

        def simple(fill: Callable[..., Any]) -> Callable[[Any], Any]:
            return lambda each: fill(each.truth, each.valid)

        steps: Mapping[str, tuple[Sequence[Any], Callable[[Any], Any]]] = {
            "read and check": (pairs, read),
            "read, check and decode": (pairs, decode_and_read),
            "model": (
                filled,
                lambda e: inpaint_arrays(bench.generator, e.truth[None], e.valid[None]),
            ),
            "smooth fill": (filled, simple(baselines.smooth_fill)),
            "Telea": (filled, simple(baselines.telea)),
            "Navier-Stokes": (filled, simple(baselines.navier_stokes)),
            "mean fill": (filled, simple(baselines.mean_fill)),
            "PSNR": (filled, of_methods(metrics.psnr)),
            "L1": (filled, of_methods(metrics.l1)),
            "SSIM": (filled, of_methods(metrics.ssim)),
            "LPIPS": (filled, lambda e: bench.lpips.distances(e.truth, list(e.methods.values()))),
            "Inception features": (
                filled,
                lambda e: bench.inception.features([e.truth, *e.methods.values()]),
            ),
        }
        found = {}
        for name, (items, step) in steps.items():
            step(items[0])  # the first call makes buffers
            start = process_time()
            for each in items:
                step(each)
            found[name] = 1000 * (process_time() - start) / len(items)
        found["decode"] = found.pop("read, check and decode") - found["read and check"]
        rows, features = zip(*bench.measure(pairs), strict=True)
        parts = PartStore(store, "parts", frozen, list(filled[0].methods), True)
        part = split_into_parts(frozen)[0]
        start = process_time()
        parts.write(part, Measured(rows[0], features[0]))
        found["write a part"] = 1000 * (process_time() - start) / features[0].shape[1]
        parts.clear()
    return found


def evaluate_whole(store: Any, plan: Any, place: Any) -> dict[str, float]:
    """Evaluate once, and return the speed of measuring and the seconds of everything else."""
    import shutil

    from dpnet.evaluation.stage import evaluate

    start = perf_counter()
    ref = evaluate(plan.settings, plan.images, plan.masks, plan.run, store, place)
    seconds, speed = perf_counter() - start, ref.summary["pairs_per_second"]
    shutil.rmtree(store.path(ref.folder))
    return {"measuring": speed, "everything else": seconds - ref.summary["pairs"] / speed}


if __name__ == "__main__":
    main()
