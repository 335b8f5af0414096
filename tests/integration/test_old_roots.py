"""A root that version 0.1.0 made is read, verified, resumed and extended by this version.

The root is in `tests/data` (see README.md there). Training runs in this process, without Ray. The
weights of a resumed run depend on the processor, so results are compared to the figures of 0.1.0
with a tolerance, and everything that has no rounding is compared exactly.
"""

from __future__ import annotations

import hashlib
import shutil
import tarfile
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from PIL import Image

from data_prep.core.manifest import StageRef, load_reference, read_manifest
from data_prep.core.storage.local import LocalStore
from data_prep.images.settings import ImagesSettings
from data_prep.images.stage import prepare_images
from data_prep.inspection.inspect import log_images
from data_prep.masks.settings import MasksSettings
from data_prep.masks.stage import prepare_masks
from dpnet.evaluation.settings import EvaluateSettings
from dpnet.evaluation.stage import evaluate
from dpnet.inpainting.api import inpaint, load_model
from dpnet.model import config as model_config
from dpnet.pipeline.verify import verify_uri
from dpnet.registry.settings import RegisterSettings
from dpnet.registry.stage import register
from dpnet.training.job import TrainJob, TrainRequest
from dpnet.training.loop import train_loop
from dpnet.training.settings import LaunchSettings, LossSettings, ModelSettings, TrainSettings
from dpnet.training.stage import train

pytestmark = pytest.mark.integration
ARCHIVE = Path(__file__).parents[1] / "data" / "root-0.1.0.tar.xz"
OLD_EVALUATION = "evaluations/a64091f24cd5"
SMALL = model_config.ModelConfig(
    widths=(4, 8, 8), blocks=1, attention_dim=4, guide=3, discriminator_widths=(4, 8, 8, 8)
)
TRAINING = {
    "steps": 6,
    "batch_size": 4,
    "learning_rate": 1e-3,
    "warmup_steps": 2,
    "checkpoint_every": 2,
    "validate_every": 3,
    "validation_pairs": 4,
    "ema_decay": 0.9,
    "keep_checkpoints": 1,
    "keep_best": 0,
    "finetune_share": 0.5,
    "lanes": 2,
}


class Session:
    """One worker in this process."""

    rank, world, local_world, device = 0, 1, 1, torch.device("cpu")
    node, attempt = "here", "first"

    def notice(self) -> bool:
        return False


class Old(NamedTuple):
    """The root of 0.1.0, and what this version makes of each request that 0.1.0 answered."""

    store: LocalStore
    photos: Path

    def images(self) -> StageRef:
        settings = ImagesSettings(
            source=str(self.photos),
            name="old",
            size=32,
            val=0.2,
            test=0.2,
            workers=1,
            max_failure_ratio=0.5,
            shard_samples=4,
        )
        return prepare_images(settings, self.store)

    def masks(self) -> StageRef:
        recipes = {"box-random": 1.0}
        few = MasksSettings(
            name="old", size=32, recipes=recipes, train=10, eval_per_bin=2, workers=1
        )
        return prepare_masks(few, self.store)

    def trained(self, **changes: Any) -> StageRef:
        request = TrainRequest(
            name="old",
            images=self.images(),
            masks=self.masks(),
            model=ModelSettings(preset="tiny", statistics="own"),  # those of 0.1.0
            losses=LossSettings(adversarial=0.01),
            settings=TrainSettings(**{**TRAINING, **changes}),
        )
        return train(request, LaunchSettings(), None, self.store)

    def evaluated(self) -> StageRef:
        settings = EvaluateSettings(max_pairs=6, pictures=1, threads=1)
        return evaluate(settings, self.images(), self.masks(), self.trained(), self.store)


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("old")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    return folder


@pytest.fixture
def old(unpacked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Old:
    def launched(job: TrainJob, *rest: Any) -> int:
        train_loop(job, Session())
        return 0

    monkeypatch.setitem(model_config.PRESETS, "tiny", SMALL)
    monkeypatch.setattr("dpnet.training.ray.launch.run_training", launched)
    shutil.copytree(unpacked, tmp_path / "old")
    return Old(LocalStore(tmp_path / "old" / "root"), tmp_path / "old" / "photos")


def bytes_of(store: LocalStore) -> dict[str, str]:
    """The hash of every file of a root."""
    return {e.key: hashlib.sha256(store.read(e.key)).hexdigest() for e in store.list()}


def test_everything_in_it_verifies(old: Old) -> None:
    found = verify_uri(str(old.store.folder))
    assert found.problems == []
    assert (found.stages, found.records, found.shards) == (6, 2, 7)


def test_a_flipped_byte_in_it_is_found(old: Old) -> None:
    (tar,) = (old.store.folder / "images" / "old" / "417e49792a85").glob("*.tar")
    data = bytearray(tar.read_bytes())
    data[600] ^= 1
    tar.write_bytes(data)
    (problem, *_) = verify_uri(str(old.store.folder)).problems
    assert tar.name in problem.where


def test_every_committed_stage_is_skipped_and_nothing_is_written(old: Old) -> None:
    before = bytes_of(old.store)
    refs = [old.images(), old.masks(), old.trained()]
    assert [ref.skipped for ref in refs] == [True] * 3
    assert [ref.folder.rpartition("/")[2] for ref in refs] == [
        "417e49792a85",
        "331eeb36b530",
        "old-d12e83117a70",
    ]
    assert bytes_of(old.store) == before


def test_a_model_is_evaluated_again_because_the_protocol_is_newer(old: Old) -> None:
    before = bytes_of(old.store)
    ref = old.evaluated()
    assert not ref.skipped
    assert ref.folder != OLD_EVALUATION
    old_figures = read_manifest(old.store, OLD_EVALUATION).summary
    assert ref.summary["pairs_digest"] == old_figures["pairs_digest"]
    assert ref.summary["hole_psnr"] == pytest.approx(old_figures["hole_psnr"], abs=0.02)
    after = bytes_of(old.store)
    assert {key: after[key] for key in before} == before


def test_a_broken_off_run_is_resumed_from_its_checkpoint(
    old: Old,
) -> None:
    ref = old.trained(seed=1)
    assert (ref.folder, ref.skipped) == ("runs/old-951f5879d948", False)
    assert ref.summary["steps"] == 6
    assert ref.summary["hole_psnr_at_start"] == 13.3818  # measured by 0.1.0, kept in its log
    assert ref.summary["hole_psnr"] == pytest.approx(14.5882, abs=0.02)


def test_a_finished_run_is_extended_from_its_checkpoint(
    old: Old, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    ref = old.trained(steps=8)
    assert (ref.folder, ref.skipped) == ("runs/old-b7d61447f966", False)
    assert "from step 3" in caplog.text + capsys.readouterr().err
    assert ref.summary["hole_psnr"] == pytest.approx(14.3985, abs=0.02)


def test_a_new_photo_makes_a_version_that_refers_to_the_old_shards(old: Old) -> None:
    Image.new("RGB", (40, 40), (200, 30, 90)).save(old.photos / "new.png")
    before = bytes_of(old.store)
    ref = old.images()
    assert (ref.skipped, ref.summary["version"], ref.summary["added"]) == (False, 3, 1)
    after = bytes_of(old.store)
    assert {key: after[key] for key in before} == before
    versions = log_images(old.store, "old")
    assert [version["version"] for version in versions] == [1, 2, 3]
    assert verify_uri(str(old.store.folder)).ok


def test_its_champion_fills_a_hole(old: Old) -> None:
    model = load_model("models:/old@champion", str(old.store.folder))
    photo, mask = Image.open(old.photos / "00.png"), Image.new("L", (40, 40))
    mask.paste(255, (10, 10, 20, 20))
    filled = inpaint(photo, mask, model)
    assert filled.size == photo.size
    assert filled.getpixel((0, 0)) == photo.getpixel((0, 0))


def test_a_model_is_registered_next_to_its_old_version(old: Old, tmp_path: Path) -> None:
    settings = RegisterSettings(model="old", tracking_uri=f"sqlite:///{tmp_path}/mlflow.db")
    kept = bytes_of(old.store)
    first = load_reference(old.store, OLD_EVALUATION)
    again = register(settings, old.trained(), first, old.store)
    assert (again.skipped, again.summary["version"]) == (True, 1)
    other = evaluate(
        EvaluateSettings(max_pairs=6, pictures=1, threads=1, seed=1),
        old.images(),
        old.masks(),
        old.trained(),
        old.store,
    )
    second = register(settings, old.trained(), other, old.store)
    assert (second.skipped, second.summary["version"]) == (False, 2)
    after = bytes_of(old.store)
    assert after["registry/old/v1.json"] == kept["registry/old/v1.json"]
    assert "registry/old/v2.json" in after.keys() - kept.keys()
