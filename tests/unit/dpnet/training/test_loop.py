"""The training loop without Ray: one process, real shards, a session for one rank."""

import io
import itertools
import json
import os
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lease_thief import steal, steal_and_wait
from PIL import Image
from torch._dynamo.utils import counters

from data_prep.core import lease as lease_module
from data_prep.core.errors import ConfigError, LeaseLostError, PipelineError
from data_prep.core.lease import Follower
from data_prep.core.stage import Work
from data_prep.core.storage.local import LocalStore
from data_prep.core.storage.open import open_store
from data_prep.images.settings import ImagesSettings
from data_prep.images.stage import prepare_images
from data_prep.masks.settings import MasksSettings
from data_prep.masks.stage import prepare_masks
from dpnet.loading.pairs import validation_pairs
from dpnet.loading.samples import Samples
from dpnet.model import losses as L
from dpnet.model_store.weights import load_generator, read_config, save_generator
from dpnet.tracking.run_log import encode_log, read_log
from dpnet.training import loop
from dpnet.training import stage as training
from dpnet.training.checkpoints import load, marks
from dpnet.training.extend import find_start, first_step
from dpnet.training.job import (
    TrainJob,
    TrainRequest,
    find_initial,
    requested,
    stage_request,
    vgg_command,
)
from dpnet.training.loop import choose_backend, resume, train_loop
from dpnet.training.ray import launch
from dpnet.training.reporting import Journal, Meter, status_line
from dpnet.training.result import collect
from dpnet.training.settings import LaunchSettings, LossSettings, ModelSettings, TrainSettings
from dpnet.training.step import Measured, Step
from dpnet.training.validation import hole_psnr


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Return store, images and masks: a dozen 32-pixel images and masks."""
    photos, root = tmp_path_factory.mktemp("photos"), tmp_path_factory.mktemp("root")
    random = np.random.default_rng(0)
    for i in range(12):
        small = random.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(small).resize((40, 40)).save(photos / f"{i}.png")
    store = open_store(str(root))
    images = prepare_images(
        ImagesSettings(source=str(photos), name="t", size=32, val=0.2, test=0.2, workers=1), store
    )
    masks = prepare_masks(
        MasksSettings(
            name="t", size=32, recipes={"box-random": 1.0}, train=10, eval_per_bin=2, workers=1
        ),
        store,
    )
    return store, images, masks


RUNS = itertools.count()


def make_job(prepared, losses=None, folder=None, **settings):
    store, images, masks = prepared
    defaults = {
        "steps": 6,
        "batch_size": 4,
        "learning_rate": 1e-3,
        "warmup_steps": 2,
        "checkpoint_every": 2,
        "validate_every": 3,
        "ema_decay": 0.9,
        "keep_checkpoints": 10,
        "finetune_share": 0.0,
    }
    model, losses = ModelSettings(preset="tiny"), losses or LossSettings(adversarial=0.01)
    settings = TrainSettings(**{**defaults, **settings})
    what = (images, masks, model, losses, settings)
    folder = folder or f"runs/t-{next(RUNS):012x}"
    return TrainJob(store.uri, folder, *what, requested(stage_request(TrainRequest("t", *what))))


def training_of(job, **changes):
    """The request that a job is made of."""
    what = (job.images, job.masks, job.model, job.losses, job.settings)
    return replace(TrainRequest("t", *what), **changes)


class Session:
    """A session of one rank. It warns of its end at the calls `notices`."""

    rank, world, local_world, device = 0, 1, 1, torch.device("cpu")
    node, attempt = "here", "first"

    def __init__(self, notices=()):
        self.notices, self.asked = set(notices), 0

    def notice(self):
        self.asked += 1
        return self.asked in self.notices


class Killed(BaseException):
    """Stands for the end of the process: no code of the loop catches it."""


def killed_after(job, step):
    """Train until `step` and stop there, as if the process was killed."""
    real = Step.__call__

    def dying(self, number, *rest):
        if number == step:
            raise Killed
        return real(self, number, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Step, "__call__", dying)
        with pytest.raises(Killed):
            train_loop(job, Session())


def saved(job, step):
    """Return the state and the log of the checkpoint at a step."""
    store = open_store(job.root)
    (mark,) = [mark for mark in marks(store, job.folder) if mark.step == step]
    found = load(store, mark)
    return found.state, found.log


def saved_steps(job):
    return [mark.step for mark in marks(open_store(job.root), job.folder)]


def without_times(log):
    times = ("seconds", "data_seconds", "other_seconds", "images_per_second")
    return [{k: v for k, v in record.items() if k not in times} for record in log]


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))
    return a == b


@pytest.mark.parametrize(("step", "last"), [(1, 0), (3, 3), (5, 4)])
def test_a_killed_run_that_resumes_ends_bit_identical(prepared, step, last):
    whole, broken = make_job(prepared), make_job(prepared)
    train_loop(whole, Session())
    killed_after(broken, step)
    assert max(saved_steps(broken), default=0) == last
    train_loop(broken, Session())
    (mine, my_log), (its, its_log) = saved(broken, 6), saved(whole, 6)
    assert equal(mine, its)
    # A killed run ends its records at other steps, but its measurements are the same.
    assert [r for r in my_log if r["kind"] == "validation"] == [
        r for r in its_log if r["kind"] == "validation"
    ]
    assert without_times(my_log) == without_times(its_log)


@pytest.mark.parametrize("lost", ["noticed", "unnoticed"])
def test_a_run_whose_lease_is_lost_makes_no_step_and_no_checkpoint(prepared, monkeypatch, lost):
    if lost == "noticed":  # by a heartbeat; else a checkpoint asks storage
        monkeypatch.setattr(lease_module, "HEARTBEAT_S", 0.05)
    store, job = prepared[0], make_job(prepared, steps=40, checkpoint_every=4)
    real, steps, key = Step.__call__, [], f"{job.folder}/lease.json"

    def losing(self, number, *rest):
        if number == 2:
            (steal_and_wait if lost == "noticed" else steal)(store, key)
        steps.append(number)
        return real(self, number, *rest)

    monkeypatch.setattr(Step, "__call__", losing)
    store.write(key, b'{"owner": "mine"}')
    with (
        pytest.raises(LeaseLostError, match="was taken over by another runner"),
        Follower(store, {"key": key, "owner": "mine", "interval": 60}),
    ):
        train_loop(job, Session())
    assert steps == [0, 1, 2] if lost == "noticed" else len(steps) < 40
    assert saved_steps(job) == []


def test_a_finished_run_is_not_trained_again(prepared, monkeypatch):
    job = make_job(prepared, steps=2)
    train_loop(job, Session())
    monkeypatch.setattr(Step, "__call__", None)
    train_loop(job, Session())
    assert saved_steps(job) == [2]


def test_a_warning_that_the_machine_goes_away_saves_a_checkpoint_at_once(prepared, monkeypatch):
    monkeypatch.setattr(loop, "NOTICE_EVERY", 1)
    job = make_job(prepared, checkpoint_every=100, validate_every=100, finetune_share=1)
    assert not train_loop(job, Session(notices={5}))
    assert saved_steps(job) == [5]
    assert train_loop(job, Session())  # elsewhere
    assert saved_steps(job) == [6, 5]


def test_the_last_the_best_and_the_fine_tuning_checkpoints_are_kept(prepared):
    job = make_job(
        prepared,
        steps=10,
        validate_every=2,
        keep_checkpoints=1,
        keep_best=1,
        finetune_share=0.5,
        checkpoint_every=1,
    )
    train_loop(job, Session())
    _, log = saved(job, 10)
    scores = {r["step"]: r["hole_psnr"] for r in log if r["kind"] == "validation" and r["step"]}
    assert set(saved_steps(job)) == {10, 5, max(scores, key=lambda step: (scores[step], step))}


def test_the_start_of_fine_tuning_is_saved_even_between_the_usual_checkpoints(prepared):
    job = make_job(prepared, steps=4, finetune_share=0.25, checkpoint_every=4, validate_every=4)
    assert job.settings.constant_until == 3
    train_loop(job, Session())
    assert saved_steps(job) == [4, 3]


def test_training_ends_early_when_validation_does_not_get_better(prepared, monkeypatch):
    scores = iter([10.0, 12.0, 11.0, 11.5, 13.0])
    monkeypatch.setattr(
        loop.Validation,
        "measure",
        lambda self, ema, step, rank, world: {
            "kind": "validation",
            "step": step,
            "hole_psnr": next(scores),
        },
    )
    job = make_job(prepared, steps=50, validate_every=1, patience=2, checkpoint_every=100)
    train_loop(job, Session())
    store = open_store(job.root)
    newest = marks(store, job.folder)[0]
    assert newest.step == 3
    assert newest.finished == "2 validations in a row without a better one"
    assert load(store, newest).state["best"]["step"] == 1
    train_loop(job, Session())  # it is finished: no further validation is asked for


@pytest.mark.parametrize(
    ("result", "scores", "step"),
    [
        ("last", [10.0, 11.0, 13.0, 12.0, 11.0], 4),
        ("best", [10.0, 11.0, 13.0, 12.0, 11.0], 2),
        ("best", [10.0, 13.0, 12.0, 13.0, 11.0], 1),  # the first of equal ones
        ("best", [20.0, 11.0, 12.0, 13.0, 14.0], 4),  # the start is no result
        ("best", [10.0, -3.0, -4.0, -5.0, -6.0], 1),
    ],
)
def test_the_result_has_the_weights_of_the_last_or_the_best_validation(
    prepared, monkeypatch, result, scores, step
):
    averages = {}

    def measure(self, ema, step, rank, world):
        averages[step] = {name: w.clone() for name, w in ema.state_dict().items()}
        figures = {"hole_psnr": scores[step], "mean_fill_psnr": 9.0, "parameters": 1}
        return {"kind": "validation", "step": step, **figures}

    monkeypatch.setattr(loop.Validation, "measure", measure)
    job = make_job(prepared, steps=4, validate_every=1, result=result, keep_checkpoints=1)
    train_loop(job, Session())
    store = open_store(job.root)
    assert store.exists(f"{job.folder}/log/000000.jsonl")
    work = Work(store, job.folder, stage_request(training_of(job)), lease=None)
    _, summary = collect(job, work)
    assert (summary["result_step"], summary["hole_psnr"]) == (step, scores[step])
    weights = dict(load_generator(store, job.folder).state_dict())
    assert [at for at in averages if equal(weights, averages[at])] == [step]
    # The parts of the log became one file, with the bytes of the last checkpoint's.
    assert store.read(f"{job.folder}/log.jsonl") == encode_log(saved(job, 4)[1])
    assert list(store.list(f"{job.folder}/log")) == []


TWO_RANKS = """
import json
import sys
from datetime import timedelta

import torch
from torch import distributed
from test_loop import Session
from dpnet.training.job import TrainJob
from dpnet.training.loop import train_loop

meet, rank, job = sys.argv[1:]
torch.set_num_threads(1)
distributed.init_process_group(
    "gloo", init_method=f"file://{meet}", rank=int(rank), world_size=2,
    timeout=timedelta(seconds=120),
)
session = Session()
session.rank, session.world, session.local_world = int(rank), 2, 2
train_loop(TrainJob.from_json(json.loads(job)), session)
distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_ranks_with_unequal_shares_of_a_batch_train_like_one(prepared, tmp_path):
    settings = {"batch_size": 3, "steps": 4, "validate_every": 2, "adversarial_from": 2}
    alone, shared = make_job(prepared, **settings), make_job(prepared, **settings)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path]),
    }
    processes = [
        subprocess.Popen(
            [
                sys.executable,
                "-c",
                TWO_RANKS,
                str(tmp_path / "meet"),
                rank,
                json.dumps(shared.to_json()),
            ],
            env=environment,
        )
        for rank in "01"
    ]
    train_loop(alone, Session())
    assert [process.wait(300) for process in processes] == [0, 0]
    (mine, my_log), (its, its_log) = saved(shared, 4), saved(alone, 4)
    for network in ("generator", "ema"):
        for name, weight in its[network].items():
            assert torch.allclose(mine[network][name], weight, atol=1e-5), name
    for record, other in zip(my_log, its_log, strict=True):
        assert record["step"] == other["step"]
        if record["kind"] == "train":
            assert record["losses"] == pytest.approx(other["losses"], rel=1e-3)
            assert record["gradients"] == pytest.approx(other["gradients"], rel=1e-3)


def test_a_longer_run_extends_a_shorter_one_and_ends_bit_identical(prepared, caplog):
    short = make_job(prepared, finetune_share=0.5, folder="runs/more-000000000001")
    train_loop(short, Session())
    settings = {"steps": 10, "finetune_share": 0.5}
    straight = make_job(prepared, **settings, folder="runs/straight-000000000002")
    longer = make_job(prepared, **settings, folder="runs/more-000000000003")
    start = find_start(open_store(longer.root), longer)
    assert start == "runs/more-000000000001/step-00000003"
    assert first_step(open_store(longer.root), longer) == 3
    assert "extends the run of 6 steps" in caplog.text
    longer = replace(longer, extends=start)
    train_loop(longer, Session())
    assert saved_steps(longer)[-1] > 3
    train_loop(straight, Session())
    assert equal(saved(longer, 10)[0], saved(straight, 10)[0])
    assert find_start(open_store(longer.root), longer) is None  # it has checkpoints of its own
    assert first_step(open_store(longer.root), longer) == 10


def test_a_run_that_cannot_be_extended_is_reported(prepared, caplog):
    train_loop(make_job(prepared, folder="runs/cosine-000000000001", finetune_share=1), Session())
    caplog.clear()
    longer = make_job(prepared, steps=8, folder="runs/cosine-000000000002", finetune_share=1)
    assert find_start(open_store(longer.root), longer) is None
    assert "it has no checkpoint from before step 1" in caplog.text
    caplog.clear()
    other = make_job(prepared, steps=8, seed=5, folder="runs/cosine-000000000003")
    assert find_start(open_store(other.root), other) is None
    assert caplog.text == ""


def test_a_run_starts_from_another_runs_generator(prepared, tmp_path):
    from dpnet.model import build_generator

    torch.manual_seed(7)
    generator = build_generator("tiny")
    store = open_store(str(tmp_path))
    save_generator(store, "model", generator, {"step": 1})
    sha256 = read_config(store, "model")[0]["weights_sha256"]
    asked = {"sha256": {"init": sha256}}
    job = replace(make_job(prepared, steps=1), init=(store.uri, "model"), asked=asked)
    state = loop.initial_state(job, torch.device("cpu"))
    assert resume(job, Session(), open_store(job.root), state) == ([], "")
    for mine in (state.generator, state.ema):
        assert equal(dict(mine.state_dict()), dict(generator.state_dict()))
    other = replace(job, model=ModelSettings(preset="tiny", pyramid=False))
    state = loop.initial_state(other, torch.device("cpu"))
    with pytest.raises(PipelineError, match=r"train\.init_from names .*a network that differs"):
        resume(other, Session(), open_store(job.root), state)
    save_generator(store, "model", build_generator("tiny"), {"step": 1})
    with pytest.raises(PipelineError, match="are not those that this training was started with"):
        resume(job, Session(), open_store(job.root), loop.initial_state(job, torch.device("cpu")))


def test_a_run_starts_from_the_weights_of_the_package_wherever_it_is_installed(
    prepared, tmp_path, monkeypatch
):
    from dpnet.model import build_generator
    from dpnet.model_store import packaged
    from dpnet.model_store.layout import EXPORTED

    def installed(folder, seed=7):
        torch.manual_seed(seed)
        generator = build_generator("tiny")
        save_generator(LocalStore(tmp_path), folder, generator, {}, EXPORTED)
        monkeypatch.setattr(packaged, "_FOLDER", tmp_path / folder)
        return generator

    store = prepared[0]
    monkeypatch.setattr(packaged, "_FOLDER", tmp_path / "none")
    with pytest.raises(ConfigError, match="this installation has no packaged weights"):
        find_initial("pretrained", store)
    generator = installed("here/weights")
    init = find_initial("pretrained", store)
    assert init.store == "pretrained"
    job = replace(
        make_job(prepared, steps=1), init=(init.store, init.folder),
        asked={"sha256": {"init": init.sha256}},
    )  # fmt: skip
    installed("another/machine/weights")
    state = loop.initial_state(job, torch.device("cpu"))
    resume(job, Session(), open_store(job.root), state)
    assert equal(dict(state.ema.state_dict()), dict(generator.state_dict()))
    installed("another/release/weights", seed=8)
    with pytest.raises(PipelineError, match="install the same version of dpnet"):
        resume(job, Session(), open_store(job.root), state)


def test_the_initial_generator_is_part_of_the_request_and_its_run_an_input(prepared, tmp_path):
    from small_root import trained

    store, images, masks = prepared
    job = make_job(prepared)

    def request(reference):
        return stage_request(training_of(job), find_initial(reference, store))

    assert find_initial(None, store) is None
    run = trained(store, images=images, masks=masks)
    of_run = request(run.folder)
    assert of_run.inputs["init"].content_digest == run.content_digest
    assert of_run.digest != request(None).digest
    assert requested(of_run)["content digest"]["init"] == run.content_digest
    # In another root, only the hash of its weights identifies it.
    (tmp_path / "elsewhere").symlink_to(store.folder / run.folder)
    elsewhere = request(str(tmp_path / "elsewhere"))
    assert elsewhere.sources["init"] == of_run.sources["init"]
    assert "init" not in elsewhere.inputs
    with pytest.raises(PipelineError, match=r"has no champion yet|no such model"):
        request("models:/t@champion")


def test_a_checkpoint_made_with_other_settings_is_refused_by_their_names(prepared):
    job = make_job(prepared, steps=2)
    train_loop(job, Session())
    other = make_job(prepared, steps=2, batch_size=2, seed=3, folder=job.folder)
    with pytest.raises(PipelineError, match=r"train\.batch_size 4, not 2, train\.seed 0, not 3"):
        train_loop(other, Session())


def test_a_damaged_newest_checkpoint_is_skipped(prepared, caplog):
    job = make_job(prepared)
    killed_after(job, 5)
    store = open_store(job.root)
    whole = store.read(f"{job.folder}/step-00000004/state.pt")
    store.write(f"{job.folder}/step-00000004/state.pt", whole[:-1] + b"x")
    train_loop(job, Session())
    assert "step-00000004 is skipped: state.pt was altered" in caplog.text
    # The same step was saved again, to another folder.
    assert store.read(f"{job.folder}/step-00000004/state.pt") == whole[:-1] + b"x"
    again = next(m for m in marks(store, job.folder) if m.folder.endswith("/step-00000004.2"))
    assert equal(load(store, again).state, torch.load(io.BytesIO(whole), weights_only=True))
    undisturbed = make_job(prepared)
    train_loop(undisturbed, Session())
    assert equal(saved(job, 6)[0], saved(undisturbed, 6)[0])


def test_a_running_training_publishes_status_log_and_images(prepared):
    began = time.time() - 0.001  # it is told in milliseconds
    job = make_job(prepared, validate_every=2)
    train_loop(job, Session())
    store = open_store(job.root)
    status = json.loads(store.read(f"{job.folder}/status.json"))
    assert (status["step"], status["steps"], status["resumed_from"]) == (6, 6, 0)
    assert (status["size"], status["gpus"]) == (32, False)
    assert began <= status["time"] <= time.time()
    assert status["workers"] == [
        {"rank": 0, "node": "here", "host": socket.gethostname(), "pid": os.getpid()}
    ]
    records = read_log(store, job.folder)
    assert records == saved(job, 6)[1]
    assert status["records"] == len(records)
    train = [record for record in records if record["kind"] == "train"]
    assert [record["step"] for record in train] == [2, 4, 6]
    assert status["train"] == train[-1]
    assert status["validation"]["step"] == 6
    for record in train:
        assert record["workers"] == 1
        assert record["images_per_second"] > 0
        assert 0 <= record["data_seconds"] <= record["seconds"]
        assert record["skipped_samples"] == record["skipped_steps"] == 0
    picture = Image.open(io.BytesIO(store.read(f"{job.folder}/pictures/step-00000006.png")))
    assert picture.size[0] == 3 * 32 + 2 * 2


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"workers": 5, "batch_size": 4}, r"train\.workers is 5 and train\.batch_size is 4"),
        (
            {"workers": 9, "batch_size": 16, "lanes": 8},
            r"train\.workers is 9 and train\.lanes is 8",
        ),
        ({"workers": 2, "min_workers": 3, "batch_size": 4}, r"train\.min_workers is 3"),
    ],
)
def test_contradictory_numbers_are_refused(settings, told):
    with pytest.raises(ConfigError, match=told):
        training.check_settings(TrainSettings(**settings))


def test_fewer_samples_than_a_batch_are_refused_before_workers_start_and_by_them(
    prepared, monkeypatch
):
    monkeypatch.setattr(launch, "run_training", lambda *given: pytest.fail("it is started"))
    job = make_job(prepared, batch_size=11)
    few = "samples to train on, fewer than a batch of 11"
    with pytest.raises(PipelineError, match=few):
        training.train(training_of(job), LaunchSettings(), None, open_store(job.root))
    with pytest.raises(PipelineError, match=few):
        train_loop(job, Session())


def test_training_changes_every_part_and_the_discriminator_waits_for_its_turn(prepared):
    job = make_job(prepared, adversarial_from=5)
    train_loop(job, Session())
    first, last = saved(job, 2)[0], saved(job, 6)[0]
    assert not equal(first["generator"], last["generator"])
    assert not equal(first["ema"], last["ema"])
    assert not equal(last["generator"], last["ema"])
    assert first["discriminator_optimizer"]["state"] == {}
    assert last["discriminator_optimizer"]["state"] != {}


def test_vgg_weights_add_the_perceptual_and_style_losses(prepared, tmp_path):
    shapes = {0: (64, 3), 2: (64, 64), 5: (128, 64), 7: (128, 128), 10: (256, 128)}
    weights = {}
    for i, (out, into) in shapes.items():
        weights[f"features.{i}.weight"] = torch.randn(out, into, 3, 3) / (9 * into) ** 0.5
        weights[f"features.{i}.bias"] = torch.zeros(out)
    file = tmp_path / "vgg19.pth"
    torch.save(weights, file)
    losses = LossSettings(adversarial=0, total_variation=0.1, vgg_weights=str(file))
    job = make_job(prepared, losses, steps=2)
    train_loop(job, Session())
    _, records = saved(job, 2)
    (record,) = [r for r in records if r["kind"] == "train"]
    assert set(record["losses"]) == {"hole", "valid", "perceptual", "style", "total_variation"}
    assert all(value > 0 for value in record["losses"].values())
    assert "vgg" in stage_request(training_of(job)).sources


def test_the_error_for_a_missing_vgg_file_has_the_command_that_makes_it(prepared, tmp_path):
    losses = LossSettings(vgg_weights=str(tmp_path / "vgg.pth"))
    with pytest.raises(
        ConfigError, match=r"does not exist: make the file with `python -c .*vgg\.pth`"
    ):
        make_job(prepared, losses)


def test_workers_get_the_absolute_path_of_the_vgg_file(prepared, tmp_path, monkeypatch):
    (tmp_path / "vgg.pth").write_bytes(b"\x80\x02weights")
    monkeypatch.chdir(tmp_path)
    jobs = []
    monkeypatch.setattr(training, "run_stage", lambda store, request, build, **_: build(None))
    monkeypatch.setattr(training, "_build", lambda job, *rest: jobs.append(job))
    job = make_job(prepared)
    request = training_of(job, losses=LossSettings(vgg_weights="vgg.pth"))
    training.train(request, LaunchSettings(), None, open_store(job.root))
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
def test_a_loss_that_is_not_finite_stops_before_a_save_and_names_its_first_step(
    prepared, monkeypatch, due, every
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
    rare = {"checkpoint_every": 100, "validate_every": 100, "finetune_share": 1}
    if due == "log":
        monkeypatch.setattr(loop, "LOG_EVERY", every)
    else:
        rare[f"{due}_every"] = every
    job = make_job(prepared, **rare)
    with pytest.raises(PipelineError, match=r"step 2: .* \(hole\)\. Neither that step"):
        train_loop(job, Session())
    assert len(steps) == every
    assert validated == [0]
    assert saved_steps(job) == []


def meter(max_skipped=0):
    loader = SimpleNamespace(world=1, waited=0.0, skipped=0)
    state = SimpleNamespace(skipped=torch.zeros(()), step=0)
    settings = TrainSettings(batch_size=8, max_skipped=max_skipped)
    return Meter(loader, state, settings), state, loader


def test_a_gradient_that_is_not_finite_stops_training_even_with_finite_losses():
    made, state, _ = meter()
    for gradient in (1.0, float("inf"), float("nan")):
        losses = {"hole": torch.tensor(0.5)}
        made.add(Measured(losses, {"generator": torch.tensor(gradient)}))
    state.step = 10
    with pytest.raises(PipelineError, match=r"step 9: .* \(the gradient\)"):
        made.record()


def test_skipped_steps_are_counted_but_not_averaged():
    made, state, _ = meter(max_skipped=2)
    for value in (1.0, float("nan"), 3.0, float("inf")):
        losses = {"hole": torch.tensor(value)}
        made.add(Measured(losses, {"generator": torch.tensor(1.0)}))
    state.step = 4
    record = made.record()
    assert record["losses"] == {"hole": 2}
    assert record["skipped_steps"] == 2
    made.add(Measured({"hole": torch.tensor(float("nan"))}, {"generator": torch.tensor(1.0)}))
    state.step = 5
    with pytest.raises(PipelineError, match=r"step 5: .*after 2 such steps that were skipped"):
        made.record()


def test_a_record_holds_the_mean_of_each_term_over_the_steps_that_have_it():
    made, state, loader = meter()
    for number in range(4):
        terms = {"hole": torch.tensor(float(number))}
        if number >= 2:
            terms["adversarial"] = torch.tensor(float(number))
        made.add(Measured(terms, {"generator": torch.tensor(2.0)}))
    state.step, loader.skipped, loader.waited = 4, 3, 0.25
    with made.aside():
        time.sleep(0.05)
    record = made.record()
    assert record["losses"] == {"hole": 1.5, "adversarial": 2.5}
    assert record["gradients"] == {"generator": 2}
    assert record["images"] == 32
    assert record["seconds"] >= 0
    assert record["other_seconds"] >= 0.05
    assert record["data_seconds"] == 0.25
    assert record["skipped_samples"] == 3


def test_the_step_is_compiled_on_a_gpu_if_possible_and_on_a_cpu_on_request(monkeypatch):
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


@pytest.mark.slow
def test_layers_are_compiled_before_the_first_step_and_the_status_says_so(prepared, monkeypatch):
    monkeypatch.setattr(loop, "choose_backend", lambda wanted, device: ("eager", None))
    told, graphs = [], []
    real = Step.__call__

    def stepping(self, *given):
        before = counters["stats"]["unique_graphs"]
        done = real(self, *given)
        graphs.append(counters["stats"]["unique_graphs"] - before)
        return done

    monkeypatch.setattr(Journal, "status", lambda self, record: told.append(record))
    monkeypatch.setattr(Step, "__call__", stepping)
    torch.compiler.reset()
    train_loop(make_job(prepared, steps=2, validate_every=2), Session())
    torch.compiler.reset()
    compiling = ["compiling" in each["note"] for each in told]
    first = compiling.index(False)
    assert first > 5  # the parts, and each graph
    assert not any(compiling[first:])
    assert {each["step"] for each in told[:first]} == {0}
    assert "compiling the generator: 0 graphs" in told[0]["note"]
    assert "compiling the backward pass: " in told[first - 1]["note"]
    assert graphs == [0, 0]  # no step compiles anything


def test_the_status_line_has_the_newest_figures_and_why_nothing_is_compiled():
    log = [{"kind": "validation", "step": 0, "hole_psnr": 20.0}]
    assert status_line(log, None) == "validation 20.00 dB at step 0"
    times = {"seconds": 2.0, "data_seconds": 0.5, "images_per_second": 12.34}
    log.append({"kind": "train", "step": 5, "losses": {"hole": 0.1234}, **times})
    told = "L1 in the hole 0.123, 12.3 images/s, 25% waiting for data"
    told += ", validation 20.00 dB at step 0"
    assert status_line(log, "no compiler") == f"{told}, not compiled (no compiler)"


@pytest.mark.slow
def test_a_machine_without_a_compiler_is_detected(tmp_path):
    code = """
import torch
from torch._inductor import config
from dpnet.training.step import compiler_problem
config.cpp.cxx = ("no-such-compiler",)
problem = compiler_problem(torch.device("cpu"))
assert problem and "\\n" not in problem, problem
"""
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)


def test_the_option_switches_activation_checkpointing_on(prepared):
    for wanted in (False, True):
        job = make_job(prepared, steps=1, activation_checkpointing=wanted)
        state = loop.initial_state(job, torch.device("cpu"))
        loop._build_step(job, Session(), state, None)
        assert (state.generator.checkpointing, state.ema.checkpointing) == (wanted, False)


def test_validation_pairs_are_spread_over_the_masks(prepared):
    store, images, masks = prepared
    val, evaluation = Samples(store, images, "val"), Samples(store, masks, "eval")
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


def test_a_run_from_before_the_statistics_were_an_option_is_found_again(prepared):
    job = make_job(prepared, steps=2)
    own = ModelSettings(**{**job.model.model_dump(), "statistics": "own"})
    asked = [stage_request(training_of(job, model=m)).settings["model"] for m in (own, job.model)]
    assert asked[0] == {name: value for name, value in asked[1].items() if name != "statistics"}
    assert asked[1]["statistics"] == "known"


def test_the_request_ignores_what_does_not_change_the_weights(prepared):
    def digest(**settings):
        job = make_job(prepared, **settings)
        return stage_request(training_of(job)).digest

    how = {"workers": 2, "min_workers": 1, "compile": True, "accumulate": 2, "max_failures": 9}
    how |= {"activation_checkpointing": True}
    kept = {"checkpoint_every": 5, "keep_checkpoints": 9, "keep_best": 3}
    read = {"loader_threads": 3, "cache": "/tmp", "cache_gb": 1, "on_bad_sample": "skip"}
    assert digest() == digest(**how, **kept, **read)
    assert digest() != digest(lanes=8)
    assert digest() != digest(steps=7)
    assert digest() != digest(finetune_share=0.3)


def test_stored_weights_are_read_back_and_altered_ones_refused(tmp_path):
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
