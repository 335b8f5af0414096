"""Validation during training: the pairs are checked, and its figure is that of the evaluation."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import small_root
import torch
from small_shards import flip_byte

from data_prep.core.errors import PipelineError
from data_prep.core.manifest import StageRef
from data_prep.core.storage.local import LocalStore
from data_prep.shards.shards import read_index, split_shards
from dpnet.evaluation import metrics
from dpnet.evaluation.baselines import smooth_fill
from dpnet.loading.batch import Batch, to_device
from dpnet.model import Generator, build_generator
from dpnet.training import validation
from dpnet.training.job import TrainJob
from dpnet.training.settings import LossSettings, ModelSettings, TrainSettings
from dpnet.training.validation import Validation, hole_psnr

Data = tuple[LocalStore, StageRef, StageRef]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    store = LocalStore(tmp_path_factory.mktemp("data") / "root")
    return store, *small_root.real_data(store)


@pytest.fixture
def own(data: Data, tmp_path: Path) -> Data:
    """Copy the data to a folder that the test may damage."""
    store = LocalStore(tmp_path / "root")
    shutil.copytree(data[0].folder, store.folder)
    return store, *data[1:]


def validation_of(data: Data) -> Validation:
    store, images, masks = data
    settings = TrainSettings(validation_pairs=100)
    job = TrainJob(
        store.uri, "runs/small", images, masks, ModelSettings(), LossSettings(), settings, {}
    )
    return Validation(store, job)


def tiny() -> Generator:
    return build_generator("tiny").eval()


def shard_of(data: Data, kind: str) -> str:
    """Return the key of the first shard that validation reads for images or masks."""
    store, images, masks = data
    ref, split = (images, "val") if kind == "image" else (masks, "eval")
    return split_shards(store, ref.folder, split)[0]


def test_whole_shards_are_measured(data: Data) -> None:
    record = validation_of(data).measure(tiny(), 0, 0, 1)
    assert record["pairs"] == 12
    assert 0 < record["mean_fill_psnr"] < metrics.PSNR_CAP


def test_the_smooth_fill_is_that_of_the_evaluation(data: Data) -> None:
    measured = validation_of(data)
    values = []
    for image, mask in measured.pairs:
        truth, valid = measured.images.image(image), measured.masks.valid(mask)
        values.append(metrics.hole_psnr(smooth_fill(truth, valid), truth, valid))
    found = measured.measure(tiny(), 0, 0, 1)["smooth_fill_psnr"]
    assert found == pytest.approx(np.mean(values), abs=1e-3)


def test_each_rank_measures_its_share_of_the_pairs(
    data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    sums: list[torch.Tensor] = []
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda own: sums.append(own.clone()))
    measured = validation_of(data)
    for rank in range(3):
        measured.measure(tiny(), 0, rank, 3)
    assert [int(of_rank[2]) for of_rank in sums] == [4, 4, 4]
    alone = measured.measure(tiny(), 0, 0, 1)
    assert float(sum(sums)[1]) / 12 == pytest.approx(alone["mean_fill_psnr"], abs=1e-4)


@pytest.mark.parametrize("kind", ["image", "mask"])
def test_a_flipped_byte_is_refused_with_shard_and_sample(own: Data, kind: str) -> None:
    store, tar = own[0], shard_of(own, kind)
    row = read_index(store, tar)[0]
    flip_byte(store.path(tar), row["offset"] + row["size"] // 2)
    with pytest.raises(PipelineError) as raised:
        validation_of(own).measure(tiny(), 0, 0, 1)
    assert f"sample {row['key']} of {store.label}/{tar} cannot be used (its bytes" in str(
        raised.value
    )
    assert "run `dpnet verify` on the root" in str(raised.value)


@pytest.mark.parametrize("kind", ["image", "mask"])
def test_a_damaged_index_is_refused_before_training_begins(own: Data, kind: str) -> None:
    index = shard_of(own, kind).replace(".tar", ".parquet")
    flip_byte(own[0].path(index), 20)
    with pytest.raises(PipelineError, match=f"{index} was altered or cut short: run `dpnet verify"):
        validation_of(own)


def test_hole_psnr_on_tensors_is_that_of_the_evaluation() -> None:
    random = np.random.default_rng(0)
    truth = random.integers(0, 256, (6, 24, 20, 3), dtype=np.uint8)
    composite = random.integers(0, 256, truth.shape, dtype=np.uint8)
    composite[3] = truth[3]  # perfect
    composite[4] = np.clip(truth[4].astype(int) + 1, 0, 255)  # nearly perfect
    valid = random.integers(0, 2, truth.shape[:3], dtype=np.uint8)
    device = torch.device("cpu")
    image, known = to_device(Batch(torch.from_numpy(truth), torch.from_numpy(valid)), device)
    predicted, _ = to_device(Batch(torch.from_numpy(composite), torch.from_numpy(valid)), device)
    wanted = [metrics.hole_psnr(*each) for each in zip(composite, truth, valid, strict=True)]
    assert hole_psnr(predicted, image, known).tolist() == pytest.approx(wanted, abs=1e-4)
    assert wanted[3] == metrics.PSNR_CAP
    assert validation.PSNR_CAP == metrics.PSNR_CAP
