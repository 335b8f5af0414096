"""Small committed stages for tests, some real and some with only the files a test needs."""

from __future__ import annotations

import functools
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from data_prep.core.manifest import StageRef
from data_prep.core.stage import Produced, Request, Work, run_stage
from data_prep.core.storage.local import LocalStore
from data_prep.images.settings import ImagesSettings
from data_prep.images.stage import prepare_images
from data_prep.masks.settings import MasksSettings
from data_prep.masks.stage import prepare_masks
from data_prep.shards.shards import encode_table, write_file

SIZE = 32
LOG = (
    b'{"kind": "validation", "step": 0, "hole_psnr": 10.0, "mean_fill_psnr": 12.0}\n'
    b'{"kind": "train", "step": 25, "losses": {"hole": 0.2}, "images": 50, "seconds": 1.0}\n'
    b'{"kind": "validation", "step": 50, "hole_psnr": 13.0, "mean_fill_psnr": 12.0}\n'
)


def commit(
    store: LocalStore,
    stage: str,
    top: str,
    files: Mapping[str, bytes],
    *,
    settings: Mapping[str, Any] | None = None,
    inputs: Mapping[str, StageRef] | None = None,
    summary: Mapping[str, Any] | None = None,
) -> StageRef:
    """Commit a stage with the given files."""

    def build(work: Work) -> Produced:
        records = [write_file(work, path, data) for path, data in files.items()]
        return Produced(records, dict(summary or {}))

    request = Request(stage, "small", top, settings or {}, inputs or {})
    return run_stage(store, request, build)


def trained(store: LocalStore, *, seed: int = 0, images: StageRef, masks: StageRef) -> StageRef:
    """Commit a run with a real, untrained generator of the tiny preset."""
    import torch

    from dpnet.model import build_generator
    from dpnet.model_store.weights import save_generator

    def build(work: Work) -> Produced:
        torch.manual_seed(seed)
        generator = build_generator("tiny")
        torch.nn.init.normal_(generator.out.weight, std=0.01)
        files = save_generator(store, work.folder, generator, {"size": SIZE})
        return Produced([*files, write_file(work, "log.jsonl", LOG, content=False)], {"steps": 50})

    inputs = {"images": images, "masks": masks}
    request = Request("train", "small", "runs", {"seed": seed}, inputs, slug="small-")
    return run_stage(store, request, build)


def photographs(folder: Path, count: int = 12) -> Path:
    """Write smooth colourful photos."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for number in range(count):
        coarse = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        photo = Image.fromarray(coarse).resize((48, 40), Image.Resampling.BICUBIC)
        photo.save(folder / f"{number:02d}.png")
    return folder


def real_data(store: LocalStore, **masks: Any) -> tuple[StageRef, StageRef]:
    """Prepare images and masks of SIZE pixels, with two evaluation masks of each ratio bin."""
    source = photographs(store.folder / "photos")
    images = ImagesSettings(source=str(source), name="small", size=SIZE, val=0.1, test=0.4)
    config = MasksSettings(name="small", size=SIZE, train=4, **({"eval_per_bin": 2} | masks))
    return prepare_images(images, store), prepare_masks(config, store)


class NewDatabase(NamedTuple):
    """A new MLflow database: its bytes, and traces of its making."""

    data: bytes
    output: str  # printed while it was made
    files: list[str]  # the files in its folder


@functools.cache
def new_database() -> NewDatabase:
    """Make a new MLflow database in a new process, once; it takes seconds, so tests copy it."""
    with tempfile.TemporaryDirectory() as folder:
        code = (
            "from dpnet.tracking.mlflow_client import connect\n"
            f"with connect('sqlite:///{folder}/mlflow.db') as client: client.search_experiments()"
        )
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=True,
        )
        files = sorted(path.name for path in Path(folder).iterdir())
        return NewDatabase(Path(folder, "mlflow.db").read_bytes(), done.stdout, files)


def new_store(folder: Path) -> LocalStore:
    """Return a root that already has an MLflow database."""
    store = LocalStore(folder)
    store.write("mlflow.db", new_database().data)
    return store


BINS = ("0.01-0.10", "0.50-0.60")
MEAN_FILL = 8.0  # hole PSNR of the mean fill in a small evaluation


def table(psnr: float, *, ssim: float = 0.8, pairs: int = 3) -> bytes:
    """Return a metrics.parquet in which every pair of DPNet has the same figures."""
    rows = [
        {
            "image": f"i{number}", "mask": f"m{number}", "ratio_bin": name, "method": method,
            "hole_psnr": psnr if method == "dpnet" else MEAN_FILL, "ssim": ssim,
        }
        for name in BINS
        for number in range(pairs)
        for method in ("dpnet", "mean_fill")
    ]  # fmt: skip
    return encode_table(rows)


def run_and_evaluation(
    store: LocalStore, psnr: float, *, pairs: str = "p" * 64, ssim: float = 0.8
) -> tuple[StageRef, StageRef]:
    """Commit a run and its evaluation with only the figures that a registration reads."""
    run = commit(
        store,
        "train",
        "runs",
        {"model/generator.safetensors": f"{psnr}".encode(), "model/model.json": b"{}"},
        settings={"train": {"steps": 5}, "psnr": psnr, "pairs": pairs, "ssim": ssim},
    )
    return run, evaluation_of(store, run, psnr, pairs=pairs, ssim=ssim)


def evaluation_of(
    store: LocalStore, run: StageRef, psnr: float, *, pairs: str = "p" * 64, ssim: float = 0.8
) -> StageRef:
    """Commit an evaluation of a run with these figures."""
    figures = {"mean_over_bins": {"dpnet": {"hole_psnr": psnr, "ssim": None}}}
    summary = {"hole_psnr": psnr, "pairs_digest": pairs, "figures": figures}
    files = {"report.json": f"{psnr} {pairs}".encode(), "metrics.parquet": table(psnr, ssim=ssim)}
    return commit(
        store,
        "evaluate",
        "evaluations",
        files,
        settings={"pairs": pairs},
        inputs={"run": run},
        summary=summary,
    )


def champion(store: LocalStore) -> StageRef:
    """Register a run with a real, untrained generator as version 1 and champion of `dpnet`."""
    return _registered(store, 0, "always")


def another_version(store: LocalStore, seed: int) -> StageRef:
    """Register a run with another real, untrained generator as the next version, a challenger."""
    return _registered(store, seed, "never")


def two_versions(store: LocalStore) -> None:
    """Register version 1 as champion and version 2 as challenger of `dpnet`."""
    champion(store)
    another_version(store, 1)


def _registered(store: LocalStore, seed: int, promote: str) -> StageRef:
    from dpnet.registry.settings import RegisterSettings
    from dpnet.registry.stage import register

    nothing = commit(store, "images", "images/x", {"a": b"a"})
    run = trained(store, seed=seed, images=nothing, masks=nothing)
    summary = {"hole_psnr": 20.0 + seed, "pairs_digest": "p" * 64, "figures": {}}
    files = {"report.json": b"{}"}
    evaluation = commit(
        store, "evaluate", "evaluations", files, inputs={"run": run}, summary=summary
    )
    register(RegisterSettings.model_validate({"promote": promote}), run, evaluation, store)
    return run
