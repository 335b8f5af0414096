"""Compare variants of the network and its recipe: trained alike, judged on the same pairs.

    python benchmarks/study.py --photos DIR [--variants full,own,...] [--seeds 0,1,2]
        [--samples 100000] [--model small] [--work ./study] [--lpips FILE] [--vgg FILE] [--quick]

Each variant sees the same photos, in the same order, with the same masks and the same number of
samples. It is judged on the same frozen pairs of the val split, with the metrics of `dpnet
evaluate`: hole PSNR, SSIM, and LPIPS where --lpips names AlexNet's weights. Everything is kept in
--work: run the same command again, and finished variants are skipped, and an interrupted one goes
on from its last checkpoint. `--samples` may grow between two runs: training goes on.

DIR has folders train, val and test, or its photos are split by hash. The table has the mean of each
metric with the 95 % interval of its difference from the smooth fill, over pairs. The curve of each
variant is `WORK/VARIANT-SEED/curve.jsonl`: hole PSNR against samples. --test judges the test split;
do that once, at the end.

--quick is small enough for two minutes and shows only that everything runs.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from PIL import Image
from study_networks import NETWORKS

from data_prep.core.digest import sha256_file
from data_prep.core.manifest import StageRef
from data_prep.core.storage.open import open_store
from data_prep.core.storage.store import Store
from data_prep.images.settings import ImagesSettings
from data_prep.images.stage import prepare_images
from data_prep.masks.settings import MasksSettings
from data_prep.masks.stage import prepare_masks
from data_prep.raw.sample_photos import write_sample_photos
from dpnet.evaluation.bench import Bench
from dpnet.evaluation.exact import one_thread_per_call
from dpnet.evaluation.lpips import load_lpips
from dpnet.evaluation.metrics import bootstrap_means
from dpnet.evaluation.pairs import open_pairs
from dpnet.evaluation.settings import EvaluateSettings
from dpnet.evaluation.weights import WeightsFile
from dpnet.loading.batch import to_device
from dpnet.model.config import PRESETS, ModelConfig
from dpnet.model.generator import Generator
from dpnet.model.normalization import DecoderNorm, EncoderNorm
from dpnet.model_store.layout import EXPORTED
from dpnet.model_store.weights import save_generator
from dpnet.training.job import NOT_REQUESTED, TrainJob
from dpnet.training.loop import open_loader
from dpnet.training.settings import LossSettings, ModelSettings, TrainSettings
from dpnet.training.state import TrainState
from dpnet.training.step import Likeness, Step
from dpnet.training.validation import Validation
from dpnet.training.vgg import load_vgg

METHODS = ("dpnet", "smooth_fill", "telea", "mean_fill")
METRICS = ("hole_psnr", "ssim", "hole_ssim", "lpips")
# Between tiny and base, for a CPU: 1.0 M parameters.
SMALL = ModelConfig(
    widths=(16, 48, 96), blocks=4, attention_dim=32, guide=31,
    discriminator_widths=(32, 64, 128, 128),
)  # fmt: skip
MODELS = {**PRESETS, "small": SMALL}


@dataclass(frozen=True)
class Variant:
    """One change of the full network or of its recipe.

    Attributes:
        what: the change, in words.
        model: changed fields of the network's config.
        losses: changed weights.
        train: changed settings of training.
        network: another network of about the same cost, by its name in `study_networks`.
        where: the part whose normalization changes; "" for both.
    """

    what: str
    model: Mapping[str, Any] = field(default_factory=dict)
    losses: Mapping[str, Any] = field(default_factory=dict)
    train: Mapping[str, Any] = field(default_factory=dict)
    network: str = ""
    where: str = ""


LOSSES = {"hole": 6.0, "valid": 1.0, "adversarial": 0.0, "perceptual": 0.0, "style": 0.0}
VARIANTS = {
    "full": Variant("the network and the recipe as they are packaged"),
    "own": Variant("each region normalised by its own statistics", {"statistics": "own"}),
    "own-encoder": Variant("the same, in the encoder only", {"statistics": "own"}, where="encoder"),
    "own-decoder": Variant("the same, in the decoder only", {"statistics": "own"}, where="decoder"),
    "whole": Variant("both regions by the whole map's statistics", {"statistics": "whole"}),
    "instance": Variant("instance normalization", {"normalization": "instance"}),
    "region": Variant("region normalization", {"normalization": "region"}),
    "no-pyramid": Variant("plain 3x3 convolutions", {"pyramid": False}),
    "no-attention": Variant("no attention", {"attention": "none"}),
    "single": Variant("attention with keys of one layer", {"attention": "single"}),
    "binary": Variant("binary masks", {"mask": "binary"}),
    "no-smooth": Variant("the network never sees the smooth fill", network="no_smooth"),
    "perceptual": Variant("L1 and VGG features", losses={"perceptual": 0.1}),
    "style": Variant("L1, VGG features and style", losses={"perceptual": 0.1, "style": 250.0}),
    "gan": Variant("L1 and GAN", losses={"adversarial": 0.05}),
    "all-terms": Variant(
        "L1, VGG features, style and GAN",
        losses={"perceptual": 0.1, "style": 250.0, "adversarial": 0.05},
    ),
    "unet": Variant("a plain U-Net", network="unet"),
    "partial": Variant("a U-Net of partial convolutions", network="partial"),
    "gated": Variant("a U-Net of gated convolutions", network="gated"),
    "rn": Variant("RN's generator: residual blocks with region normalization", network="rn"),
    "fourier": Variant(
        "residual blocks of fast Fourier convolutions, as LaMa's", network="fourier"
    ),
}


@dataclass(frozen=True)
class Study:
    """The parts that all variants share."""

    work: Path
    images: StageRef
    masks: StageRef
    config: ModelConfig
    settings: TrainSettings
    losses: Mapping[str, Any]
    lpips: Path | None
    vgg: Path | None
    split: str
    bf16_features: bool

    @property
    def root(self) -> str:
        return str(self.work / "root")


class Here:
    """The session of one rank in this process."""

    rank, world, local_world, node, attempt = 0, 1, 1, "here", "study"
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def notice(self) -> bool:
        return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--photos", help="folder of photos; default: those of scikit-image")
    parser.add_argument("--work", type=Path, default=Path("study"), help="where everything is kept")
    parser.add_argument("--variants", default="full,own", help="names, or all")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--samples", type=int, default=100_000, help="training samples of each")
    parser.add_argument("--model", choices=sorted(MODELS), default="tiny")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rate", type=float, default=1e-3, help="peak learning rate")
    parser.add_argument(
        "--final",
        type=float,
        default=0.0,
        help="last share of the steps, in which the learning rate falls",
    )
    parser.add_argument("--loss", action="append", default=[], metavar="TERM=WEIGHT")
    parser.add_argument("--lpips", type=Path, help="AlexNet's weights, .safetensors")
    parser.add_argument("--vgg", type=Path, help="VGG16's weights, for perceptual and style")
    parser.add_argument(
        "--bf16-features", action="store_true", help="VGG in bfloat16: 1.5 times faster with AMX"
    )
    parser.add_argument("--per-bin", type=int, default=40, help="pairs of each ratio bin")
    parser.add_argument("--minutes", type=float, default=1e9, help="stop after a checkpoint then")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--test", action="store_true", help="judge the test split, once at the end")
    parser.add_argument(
        "--judge",
        action="append",
        default=[],
        metavar="DIR",
        help="photos of another kind to judge on too, on their val split",
    )
    parser.add_argument("--export", type=Path, metavar="DIR", help="write the last variant's model")
    parser.add_argument("--pictures", type=Path, metavar="FILE", help="draw the last variant's")
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.quick:
        arguments.samples, arguments.size, arguments.per_bin = 320, 32, 4
        arguments.work = arguments.work / "quick"
    study = prepare(arguments)
    others = {
        each: replace(study, images=shards(study, arguments, each)) for each in arguments.judge
    }
    names = list(VARIANTS) if arguments.variants == "all" else arguments.variants.split(",")
    if arguments.export and VARIANTS[names[-1]].network:
        parser.error(f"--export: {names[-1]} is another network, and only DPNet's are exported.")
    deadline = time.monotonic() + 60 * arguments.minutes
    results: dict[str, dict[str, list[Any]]] = {}
    for seed in map(int, arguments.seeds.split(",")):
        for name in names:
            if study.vgg is None and {"perceptual", "style"} & set(VARIANTS[name].losses):
                print(f"{name}: left out, because it needs --vgg", file=sys.stderr)
                continue
            state = train(study, name, seed, deadline)
            if state is None:
                sys.exit("the time is over: run the same command again to go on.")
            for where, judged in {arguments.photos: study, **others}.items():
                rows = judge(judged, name, seed, state)
                results.setdefault(where, {}).setdefault(name, []).append(rows)
    if arguments.export:
        export(arguments.export, study, names[-1], state)
    if arguments.pictures:
        draw(arguments.pictures, study, state)
    for where, of_place in results.items():
        print(f"\n{where or 'sample photographs'}, {study.split} split\n\n{table(of_place)}")
        for name, runs in of_place.items():
            print(f"\n{name} by hole size\n\n{table_by_size(runs)}")


def prepare(arguments: argparse.Namespace) -> Study:
    """Make the shards, unless they are there, and return what all variants share."""
    work = arguments.work.absolute()
    work.mkdir(parents=True, exist_ok=True)
    photos = arguments.photos
    if photos is None:
        photos = str(work / "photos")
        write_sample_photos(Path(photos))
    store = open_store(str(work / "root"))
    images, size = _shards(store, photos, "study", arguments.size), arguments.size
    masks = prepare_masks(
        MasksSettings(name="study", size=size, train=4000, eval_per_bin=arguments.per_bin), store
    )
    settings = TrainSettings(
        steps=-(-arguments.samples // arguments.batch), batch_size=arguments.batch,
        learning_rate=arguments.rate, discriminator_learning_rate=1e-4, beta1=0.9,
        warmup_steps=50, finetune_share=arguments.final, ema_decay=0.998,
        adversarial_from=200, validation_pairs=120,
    )  # fmt: skip
    given = {term: float(weight) for term, _, weight in (e.partition("=") for e in arguments.loss)}
    return Study(
        work, images, masks, MODELS[arguments.model], settings, LOSSES | given, arguments.lpips,
        arguments.vgg, "test" if arguments.test else "val", arguments.bf16_features,
    )  # fmt: skip


def shards(study: Study, arguments: argparse.Namespace, photos: str) -> StageRef:
    """Make the shards of other photos in the study's root, unless they are there."""
    name = "-".join(Path(photos).absolute().parts[-2:]).lower()
    return _shards(open_store(study.root), photos, name, arguments.size)


def _shards(store: Store, photos: str, name: str, size: int) -> StageRef:
    return prepare_images(
        ImagesSettings(
            source=photos, name=name, mode="tiles", size=size,
            tile=[side for side in (96, 128, 192, 256) if side >= size], tile_stride=0.5,
            max_tiles=16, format="png", max_failure_ratio=0.5,
        ),
        store,
    )  # fmt: skip


def build(study: Study, variant: Variant, settings: TrainSettings) -> TrainState:
    """Return the state of a variant before its first step."""
    config = replace(study.config, **dict(variant.model))
    state = TrainState(config, settings, Here.device)
    if variant.where:
        keep = EncoderNorm if variant.where == "decoder" else DecoderNorm
        for layer in [*state.generator.modules(), *state.ema.modules()]:
            # The decoder's first normalization is named "middle", and is one of the decoder.
            if isinstance(layer, keep) and hasattr(layer, "statistics"):
                layer.statistics.whose = study.config.statistics
    if variant.network:
        torch.manual_seed(settings.seed)
        generator = NETWORKS[variant.network](study.config).to(Here.device)
        ema = deepcopy(generator).eval().requires_grad_(False)
        optimizer = state._adam(generator, settings)
        state.generator, state.ema, state.generator_optimizer = generator, ema, optimizer
        state._parts |= {"generator": generator, "ema": ema, "generator_optimizer": optimizer}
    return state


def train(study: Study, name: str, seed: int, deadline: float) -> TrainState | None:
    """Train a variant to its end, from its last checkpoint, or return None if the time is over."""
    variant, folder = VARIANTS[name], study.work / f"{name}-{seed}"
    folder.mkdir(exist_ok=True)
    settings = study.settings.model_copy(update={"seed": seed, **variant.train})
    losses = LossSettings(**{**study.losses, **variant.losses}, vgg="vgg16")
    check_recipe(folder / "recipe.json", study, settings, losses)
    state = build(study, variant, settings)
    file = folder / "state.pt"
    if file.exists():
        state.from_dict(torch.load(file, weights_only=True), str(file))
    check_schedule(folder / "schedule.json", settings, state.step)
    vgg = None
    if study.vgg is not None and (losses.perceptual or losses.style):
        vgg = load_vgg(study.vgg, "vgg16", Here.device)
    job = TrainJob(
        study.root, f"runs/{name}", study.images, study.masks, ModelSettings(), losses, settings, {}
    )
    if state.step >= settings.steps:
        return state
    store, here = open_store(study.root), Here()
    validation = Validation(store, job)
    every = max(1, min(500, settings.steps // 4))
    gpu = here.device.type == "cuda"
    step = Step(state, losses, settings, vgg=vgg, bf16=gpu, backend="inductor" if gpu else None)
    if study.bf16_features and isinstance(step._likeness, Likeness):
        step._likeness.bf16 = True
    state.generator.train()
    start, since = time.perf_counter(), state.step
    batches = open_loader(job, here, store).batches(state.step, settings.steps)  # type: ignore[arg-type]
    for number, batch in batches:
        measured = step(number, *to_device(batch, here.device))
        if state.step % every and state.step < settings.steps:
            continue
        rate = (state.step - since) * settings.batch_size / (time.perf_counter() - start)
        record = {
            "samples": state.step * settings.batch_size,
            **validation.measure(state.ema, state.step, 0, 1),
            "losses": {key: round(float(value), 4) for key, value in measured.losses.items()},
            "gradient": round(float(measured.gradients["generator"]), 3),
            "images_s": round(rate, 1),
        }
        with (folder / "curve.jsonl").open("a") as out:
            out.write(json.dumps(record) + "\n")
        print(
            f"{name} seed {seed}: {record['samples']} samples, {record['hole_psnr']:.3f} dB, smooth"
            f" fill {record['smooth_fill_psnr']:.3f} dB, {rate:.0f} images/s",
            file=sys.stderr, flush=True,
        )  # fmt: skip
        new = file.with_suffix(".new")
        torch.save(state.to_dict(), new)
        new.rename(file)
        if time.monotonic() > deadline and state.step < settings.steps:
            batches.close()
            return None
    return state


def check_recipe(file: Path, study: Study, settings: TrainSettings, losses: LossSettings) -> None:
    """Write down how a variant is trained, or end the script if it was trained in another way."""
    recipe = json.loads(
        json.dumps(
            {
                "data": [study.images.content_digest, study.masks.content_digest],
                "network": study.config.to_json(),
                "losses": losses.model_dump(),
                # The first two may change while the learning rate is still constant.
                "train": settings.model_dump(exclude={"steps", "finetune_share", *NOT_REQUESTED}),
            }
        )
    )
    if not file.exists():
        file.write_text(json.dumps(recipe))
    elif json.loads(file.read_text()) != recipe:
        sys.exit(f"{file.parent} was trained with other options or photos: choose another --work.")


def check_schedule(file: Path, settings: TrainSettings, step: int) -> None:
    """Write down the schedule, or end the script if the learning rate fell by another one."""
    now = {"steps": settings.steps, "finetune_share": settings.finetune_share}
    before = json.loads(file.read_text()) if file.exists() else now
    least = min(settings.model_copy(update=each).constant_until for each in (before, now))
    if before != now and step > least:
        sys.exit(
            f"{file.parent} is at step {step}, and its learning rate fell by another --samples or"
            " --final: give the same ones, or choose another --work."
        )
    file.write_text(json.dumps(now))


def judge(study: Study, name: str, seed: int, state: TrainState) -> list[dict[str, Any]]:
    """Return the rows of metrics of a trained variant, measured once."""
    place = study.images.folder.rpartition("/")[2]
    file = study.work / f"{name}-{seed}" / f"{study.split}-{state.step}-{place}.json"
    if file.exists():
        found: list[dict[str, Any]] = json.loads(file.read_text())
        return found
    with bench(study, state.ema) as measure:
        rows = [row for some in measure.measure(measure.frozen.pairs) for row in some.rows]
    file.write_text(json.dumps(rows))
    return rows


def export(folder: Path, study: Study, name: str, state: TrainState) -> None:
    """Write the averaged generator as an exported model, with how it was trained."""
    assert isinstance(state.ema, Generator)
    trained = {
        "variant": VARIANTS[name].what,
        "samples": state.step * study.settings.batch_size,
        "images": study.images.content_digest,
        "masks": study.masks.content_digest,
    }
    store = open_store(str(folder.absolute().parent))
    save_generator(store, folder.name, state.ema, {"trained": trained}, EXPORTED)


def draw(file: Path, study: Study, state: TrainState) -> None:
    """Draw the first two pairs of each hole size: truth, masked, DPNet, smooth fill, Telea."""
    of_size: dict[str, list[Any]] = {}
    with bench(study, state.ema) as measure:
        for pair in measure.frozen.pairs:
            of_size.setdefault(measure.frozen.keys(pair)["ratio_bin"], []).append(pair)
        rows = []
        for each in measure.fill([pair for pairs in of_size.values() for pair in pairs[:2]]):
            masked = np.where(each.valid[..., None] > 0, each.truth, np.uint8(255))
            filled = [each.methods[name] for name in METHODS[:3]]
            framed = [
                np.pad(p, ((2, 2), (2, 2), (0, 0)), constant_values=255)
                for p in (each.truth, masked, *filled)
            ]
            rows.append(np.concatenate(framed, axis=1))
    sheet = np.concatenate([np.concatenate(rows[n::2]) for n in (0, 1)], axis=1)
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(sheet.repeat(2, axis=0).repeat(2, axis=1)).save(file)


@contextmanager
def bench(study: Study, generator: Any) -> Iterator[Bench]:
    """Open the product's own measurement for a generator."""
    store = open_store(study.root)
    settings = EvaluateSettings(split=study.split)
    frozen = open_pairs(store, settings, study.images, study.masks)
    lpips = None
    if study.lpips is not None:
        lpips = load_lpips(WeightsFile(study.lpips, sha256_file(study.lpips))).to(Here.device)
    threads = os.cpu_count() or 1
    with one_thread_per_call(), ThreadPoolExecutor(threads) as pool:
        on_cpu = Here.device.type == "cpu"
        yield Bench(frozen, generator.eval(), [], lpips, None, pool, threads, on_cpu)


def table(results: Mapping[str, Sequence[Any]]) -> str:
    """Return a table in Markdown: the mean of each metric, and the gain over the smooth fill."""
    lines = ["| variant | seeds | " + " | ".join(METRICS) + " |", "|---" * (2 + len(METRICS)) + "|"]
    simple = next(iter(results.values()))[:1] if results else []
    for method in METHODS[1:]:
        lines.append(_line(method, simple, method))
    lines += [_line(name, runs, METHODS[0]) for name, runs in results.items()]
    return "\n".join(lines)


def _line(name: str, runs: Sequence[Any], method: str) -> str:
    cells = []
    for metric in METRICS:
        ours, smooth = (
            np.mean([[r[metric] for r in rows if r["method"] == m] for rows in runs], axis=0)
            if all(r[metric] is not None for rows in runs for r in rows)
            else None
            for m in (method, "smooth_fill")
        )
        if ours is None or smooth is None:
            cells.append("–")
            continue
        gain = ours - smooth
        means = bootstrap_means([gain], np.random.default_rng(0))[0]
        low, high = np.quantile(means, [0.025, 0.975])
        cells.append(f"{ours.mean():.4f} ({gain.mean():+.4f}: {low:+.4f} to {high:+.4f})")
    return f"| {name} | {len(runs)} | " + " | ".join(cells) + " |"


def table_by_size(runs: Sequence[Any]) -> str:
    """Return a table in Markdown: hole PSNR and LPIPS of the network and the smooth fill by bin."""
    chosen = ("hole_psnr", "lpips")
    lines = [
        "| hole | pairs | " + " | ".join(f"{m}, gain" for m in chosen) + " |",
        "|---" * 4 + "|",
    ]
    for size in sorted({row["ratio_bin"] for row in runs[0]}):
        of_bin = [[row for row in rows if row["ratio_bin"] == size] for rows in runs]
        cells = _line("", of_bin, METHODS[0]).split(" | ")
        values = dict(zip(METRICS, (cell.removesuffix(" |") for cell in cells[2:]), strict=True))
        pairs = len(of_bin[0]) // len({row["method"] for row in of_bin[0]})
        lines.append(f"| {size} | {pairs} | " + " | ".join(values[m] for m in chosen) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
