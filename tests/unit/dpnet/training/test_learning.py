"""Training makes the network better: it learns a pattern that no smooth fill has."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from data_prep.core.storage.open import open_store
from data_prep.images.settings import ImagesSettings
from data_prep.images.stage import prepare_images
from data_prep.masks.settings import MasksSettings
from data_prep.masks.stage import prepare_masks
from dpnet.training.checkpoints import newest
from dpnet.training.job import TrainJob, TrainRequest, requested, stage_request
from dpnet.training.loop import train_loop
from dpnet.training.settings import LossSettings, ModelSettings, TrainSettings

STEPS, SIZE = 40, 32
GAIN_DB = 4.0  # 60 steps gain 13 dB; without learning the gain is 0


class Session:
    """A session of one rank."""

    rank, world, local_world, device = 0, 1, 1, torch.device("cpu")
    node, attempt = "here", "first"

    def notice(self) -> bool:
        return False


def striped_photos(folder: Path) -> Path:
    """Write photos of the same stripes, four pixels wide, each in its own two colours."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    stripes = (np.arange(SIZE) // 4 % 2)[None, :, None].repeat(SIZE, 0)
    for number in range(24):
        dark, bright = rng.integers(0, 80, 3), rng.integers(175, 256, 3)
        photo = np.where(stripes, bright, dark).astype(np.uint8)
        Image.fromarray(photo).save(folder / f"{number}.png")
    return folder


def test_training_fills_holes_better_than_before(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "root"))
    source = str(striped_photos(tmp_path / "photos"))
    images = prepare_images(
        ImagesSettings(source=source, name="t", size=SIZE, val=0.2, test=0.1, workers=1), store
    )
    masks = prepare_masks(
        MasksSettings(
            name="t", size=SIZE, recipes={"box-random": 1.0}, train=40, eval_per_bin=4, workers=1
        ),
        store,
    )
    settings = TrainSettings(
        steps=STEPS, batch_size=8, learning_rate=3e-3, warmup_steps=5, ema_decay=0.9,
        checkpoint_every=STEPS, validate_every=STEPS,
    )  # fmt: skip
    what = (images, masks, ModelSettings(preset="tiny"), LossSettings(adversarial=0), settings)
    asked = requested(stage_request(TrainRequest("t", *what)))
    assert train_loop(TrainJob(store.uri, "runs/t-0", *what, asked), Session())
    found = newest(store, "runs/t-0")
    assert found is not None
    before, after = [each for each in found.log if each["kind"] == "validation"]
    assert (before["step"], after["step"]) == (0, STEPS)
    assert after["hole_psnr"] > before["hole_psnr"] + GAIN_DB
    assert after["hole_psnr"] > after["mean_fill_psnr"] + GAIN_DB
