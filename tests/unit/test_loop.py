"""The training loop without Ray: one process, real shards, a session that keeps folders."""

import json
import os
import re
import shutil
import subprocess
import sys
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from PIL import Image

from data_prep.errors import ConfigError, PipelineError
from data_prep.images import ImagesConfig, prepare_images
from data_prep.masks import MasksConfig, prepare_masks
from data_prep.storage import open_store
from dpnet import loop
from dpnet import train as training
from dpnet.data import Samples, TrainingBatches, validation_pairs
from dpnet.loop import LOG, Meter, choose_backend, train_loop
from dpnet.model import losses as L
from dpnet.step import STATE, Measured
from dpnet.train import (
    LossSettings,
    ModelSettings,
    TrainJob,
    TrainSettings,
    train_request,
    vgg_command,
)
from dpnet.validation import hole_psnr
from dpnet.weights import load_generator, save_generator


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """(store, images, masks): a dozen 32-pixel pictures and as many masks."""
    photos, root = tmp_path_factory.mktemp("photos"), tmp_path_factory.mktemp("root")
    random = np.random.default_rng(0)
    for i in range(12):
        small = random.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(small).resize((40, 40)).save(photos / f"{i}.png")
    store = open_store(str(root))
    images = prepare_images(
        ImagesConfig(source=str(photos), name="t", size=32, val=0.2, test=0.2, workers=1), store
    )
    masks = prepare_masks(
        MasksConfig(
            name="t", size=32, recipes={"box-random": 1.0}, train=10, eval_per_bin=2, workers=1
        ),
        store,
    )
    return store, images, masks


def make_job(prepared, losses=None, **settings):
    store, images, masks = prepared
    defaults = {
        "steps": 6,
        "batch_size": 4,
        "learning_rate": 1e-3,
        "warmup_steps": 2,
        "checkpoint_every": 2,
        "validate_every": 3,
        "ema_decay": 0.9,
    }
    return TrainJob(
        store.uri,
        images,
        masks,
        ModelSettings(preset="tiny"),
        losses or LossSettings(adversarial=0.01),
        TrainSettings(**{**defaults, **settings}),
    )


class Session:
    """Keeps checkpoints in a folder; raises after the one at `stop_at`, as a killed run would."""

    rank, world, device = 0, 1, torch.device("cpu")

    def __init__(self, folder, stop_at=None):
        self.folder, self.stop_at, self.steps, self.notes = folder, stop_at, [], []

    @contextmanager
    def latest(self):
        found = sorted(self.folder.glob("step-*"))
        yield found[-1] if found else None

    def save(self, step, folder):
        shutil.copytree(folder, self.folder / f"step-{step:08d}")
        if step == self.stop_at:
            raise InterruptedError

    def progress(self, step, note):
        self.steps.append(step)
        self.notes.append(note)


def final(folder):
    return torch.load(folder / "step-00000006" / STATE, weights_only=True)


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))
    return a == b


def test_a_run_cut_off_and_resumed_ends_bit_identical(prepared, tmp_path):
    job = make_job(prepared)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir()
    broken.mkdir()
    train_loop(job, Session(whole))
    with pytest.raises(InterruptedError):
        train_loop(job, Session(broken, stop_at=4))
    resumed = Session(broken)
    train_loop(job, resumed)
    assert resumed.steps == [5, 6]
    assert equal(final(whole), final(broken))
    logs = [(f / "step-00000006" / "log.jsonl").read_text().splitlines() for f in (whole, broken)]
    metrics = [[line for line in log if '"validation"' in line] for log in logs]
    assert len(metrics[0]) == 3
    assert metrics[0] == metrics[1]


def test_training_changes_every_part_and_the_discriminator_waits_for_its_turn(prepared, tmp_path):
    late = make_job(prepared, adversarial_from=5)
    train_loop(late, Session(tmp_path))
    first = torch.load(tmp_path / "step-00000002" / STATE, weights_only=True)
    last = final(tmp_path)
    assert not equal(first["generator"], last["generator"])
    assert not equal(first["ema"], last["ema"])
    assert not equal(last["generator"], last["ema"])
    assert first["discriminator_optimizer"]["state"] == {}
    assert last["discriminator_optimizer"]["state"] != {}


def test_with_vgg_weights_the_perceptual_and_style_terms_take_part(prepared, tmp_path):
    shapes = {0: (64, 3), 2: (64, 64), 5: (128, 64), 7: (128, 128), 10: (256, 128)}
    weights = {}
    for i, (out, into) in shapes.items():
        weights[f"features.{i}.weight"] = torch.randn(out, into, 3, 3) / (9 * into) ** 0.5
        weights[f"features.{i}.bias"] = torch.zeros(out)
    file = tmp_path / "vgg19.pth"
    torch.save(weights, file)
    losses = LossSettings(adversarial=0, total_variation=0.1, vgg_weights=str(file))
    job = make_job(prepared, losses, steps=2)
    train_loop(job, Session(tmp_path))
    records = [json.loads(r) for r in (tmp_path / "step-00000002" / LOG).read_text().splitlines()]
    (record,) = [r for r in records if r["kind"] == "train"]
    assert set(record["losses"]) == {"hole", "valid", "perceptual", "style", "total_variation"}
    assert all(value > 0 for value in record["losses"].values())
    assert (
        "vgg" in train_request(job.model, losses, job.settings, "t", job.images, job.masks).sources
    )


def test_a_vgg_file_that_is_missing_is_told_with_the_command_that_makes_it(prepared, tmp_path):
    losses = LossSettings(vgg_weights=str(tmp_path / "vgg.pth"))
    job = make_job(prepared, losses)
    with pytest.raises(ConfigError, match=r"no file: make it with `python -c .*vgg\.pth`"):
        train_request(job.model, losses, job.settings, "t", job.images, job.masks)


def test_workers_are_given_the_whole_path_of_the_vgg_file(prepared, tmp_path, monkeypatch):
    (tmp_path / "vgg.pth").write_bytes(b"weights")
    monkeypatch.chdir(tmp_path)
    jobs = []
    monkeypatch.setattr(training, "run_stage", lambda store, request, build, say: build(None))
    monkeypatch.setattr(training, "_build", lambda job, work: jobs.append(job))
    job = make_job(prepared)
    training.train(
        job.model,
        LossSettings(vgg_weights="vgg.pth"),
        *(job.settings, "t", job.images, job.masks),
        open_store(job.root),
    )
    assert jobs[0].losses.vgg_weights == str(tmp_path / "vgg.pth")


def test_the_command_that_makes_a_vgg_file_saves_torchvisions_weights(tmp_path):
    fake = "from types import SimpleNamespace as N\n"
    fake += "vgg16 = lambda weights: N(state_dict=lambda: {'features.0.weight': weights})\n"
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision/__init__.py").touch()
    (tmp_path / "torchvision/models.py").write_text(fake)
    file = tmp_path / "a file.pth"
    command = vgg_command("vgg16", str(file)).replace("python", sys.executable, 1)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    subprocess.run(["sh", "-c", command], env=environment, check=True)
    assert torch.load(file) == {"features.0.weight": "DEFAULT"}


@pytest.mark.parametrize(("due", "every"), [("checkpoint", 3), ("validate", 3), ("log", 2)])
def test_a_loss_that_is_not_finite_stops_before_anything_is_kept_and_names_its_first_step(
    prepared, tmp_path, monkeypatch, due, every
):
    real, steps = L.l1_terms, []

    def broken(prediction, truth, valid):
        hole, known = real(prediction, truth, valid)
        steps.append(1)
        return hole * float("nan" if len(steps) >= 2 else 1), known

    monkeypatch.setattr(L, "l1_terms", broken)
    validated = []
    measure = loop.Validation.measure
    monkeypatch.setattr(
        loop.Validation, "measure", lambda *a: validated.append(a[2]) or measure(*a)
    )
    rare = {"checkpoint_every": 100, "validate_every": 100}
    if due == "log":
        monkeypatch.setattr(loop, "LOG_EVERY", every)
    else:
        rare[f"{due}_every"] = every
    with pytest.raises(PipelineError, match=r"step 2: .* \(hole\)"):
        train_loop(make_job(prepared, **rare), Session(tmp_path))
    assert len(steps) == every
    assert validated == [0]
    assert list(tmp_path.iterdir()) == []


def test_a_gradient_that_is_not_finite_stops_even_where_the_losses_are():
    meter = Meter()
    for gradient in (1.0, float("inf"), float("nan")):
        losses = {"hole": torch.tensor(0.5)}
        meter.add(Measured(losses, {"generator": torch.tensor(gradient)}), 4)
    with pytest.raises(PipelineError, match=r"step 9: .* \(the gradient\)"):
        meter.record(10)


def test_a_record_holds_the_mean_of_each_term_over_the_steps_that_have_it():
    meter = Meter()
    for number in range(4):
        terms = {"hole": torch.tensor(float(number))}
        if number >= 2:
            terms["adversarial"] = torch.tensor(float(number))
        meter.add(Measured(terms, {"generator": torch.tensor(2.0)}), 8)
    record = meter.record(4)
    assert record["losses"] == {"hole": 1.5, "adversarial": 2.5}
    assert record["gradients"] == {"generator": 2}
    assert record["images"] == 32
    assert record["seconds"] >= 0


def test_the_step_is_compiled_on_a_gpu_where_that_works_and_elsewhere_on_demand(monkeypatch):
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setattr(loop, "compiler_problem", lambda device: None)
    assert choose_backend(None, cpu) == (None, None)
    assert choose_backend(None, gpu) == ("inductor", None)
    assert choose_backend(True, cpu) == ("inductor", None)
    assert choose_backend(False, gpu) == (None, None)
    monkeypatch.setattr(loop, "compiler_problem", lambda device: "no compiler")
    assert choose_backend(None, gpu) == (None, "no compiler")
    with pytest.raises(PipelineError, match=r"train\.compile is true, but .*no compiler"):
        choose_backend(True, cpu)


def test_progress_tells_the_newest_figures_and_why_nothing_is_compiled(
    prepared, tmp_path, monkeypatch
):
    monkeypatch.setattr(loop, "choose_backend", lambda wanted, device: (None, "no compiler"))
    session = Session(tmp_path)
    train_loop(make_job(prepared, validate_every=100, checkpoint_every=3), session)
    assert re.fullmatch(r"validation \d+\.\d\d dB, not compiled \(no compiler\)", session.notes[0])
    assert session.notes[0] == session.notes[1]
    assert session.notes[2].startswith("L1 in the hole 0.")


@pytest.mark.slow
def test_a_machine_without_a_compiler_is_found_out(tmp_path):
    code = """
import torch
from torch._inductor import config
from dpnet.step import compiler_problem
config.cpp.cxx = ("no-such-compiler",)
problem = compiler_problem(torch.device("cpu"))
assert problem and "\\n" not in problem, problem
"""
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)


def test_two_ranks_share_the_batch_that_one_would_have(prepared):
    store, images, masks = prepared
    both = (Samples(store, images.folder, "train"), Samples(store, masks.folder, "train"))
    digests = (images.content_digest, masks.content_digest)

    def batch(rank, world):
        return TrainingBatches(*both, digests, seed=0, batch=4, rank=rank, world=world).at(3)

    whole, parts = batch(0, 1), [batch(rank, 2) for rank in range(2)]
    for rank, part in enumerate(parts):
        assert np.array_equal(whole.image[rank::2], part.image)
        assert np.array_equal(whole.valid[rank::2], part.valid)
    assert whole.image.shape == (4, 32, 32, 3)
    assert set(np.unique(whole.valid)) == {0, 1}


def test_reading_ahead_gives_the_same_batches_and_hands_errors_on(prepared, monkeypatch):
    store, images, masks = prepared
    batches = TrainingBatches(
        Samples(store, images.folder, "train"),
        Samples(store, masks.folder, "train"),
        ("a", "b"),
        seed=0,
        batch=2,
        rank=0,
        world=1,
    )
    ahead = list(batches.ahead(3, 8))
    assert [step for step, _ in ahead] == [3, 4, 5, 6, 7]
    assert np.array_equal(ahead[2][1].image, batches.at(5).image)
    monkeypatch.setattr(Samples, "payload", lambda self, position: b"no picture")
    with pytest.raises(PipelineError, match="cannot be decoded"):
        list(batches.ahead(0, 2))


def test_validation_pairs_are_spread_over_the_masks(prepared):
    store, images, masks = prepared
    val, evaluation = Samples(store, images.folder, "val"), Samples(store, masks.folder, "eval")
    pairs = validation_pairs(val, evaluation, ("a", "b"), seed=0, count=3)
    assert len(pairs) == 3
    assert [m for _, m in pairs] == [i * len(evaluation) // 3 for i in range(3)]


def test_hole_psnr_is_over_the_hole_and_capped():
    truth = torch.zeros(2, 3, 4, 4)
    predicted, valid = truth.clone(), torch.ones(2, 1, 4, 4)
    valid[:, :, :2] = 0
    predicted[0, :, :2] = 10 / 255
    predicted[1, :, 2:] = 1  # known pixels do not count
    psnr = hole_psnr(predicted, truth, valid)
    assert float(psnr[0]) == pytest.approx(20 * np.log10(25.5), abs=1e-3)
    assert float(psnr[1]) == 100


def test_the_request_ignores_what_does_not_change_the_weights(prepared):
    def digest(**settings):
        job = make_job(prepared, **settings)
        return train_request(job.model, job.losses, job.settings, "t", job.images, job.masks).digest

    assert digest() == digest(workers=2, checkpoint_every=5, keep_checkpoints=9, compile=True)
    assert digest() != digest(steps=7)
    assert digest() != digest(finetune_share=0.3)


def test_weights_survive_storage_and_alterations_are_found(tmp_path):
    from dpnet.model import build_generator

    torch.manual_seed(0)
    store, generator = open_store(str(tmp_path)), build_generator("tiny")
    save_generator(store, "run", generator, {"step": 1})
    loaded = load_generator(store, "run")
    assert equal(dict(loaded.state_dict()), dict(generator.state_dict()))
    weights = store.read("run/model/generator.safetensors")
    store.write("run/model/generator.safetensors", weights[:-4] + b"1234")
    with pytest.raises(PipelineError, match="altered or cut short"):
        load_generator(store, "run")
    with pytest.raises(PipelineError, match="holds no model"):
        load_generator(store, "nowhere")
