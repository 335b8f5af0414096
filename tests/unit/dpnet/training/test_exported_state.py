"""The training state that `dpnet export --training-state` writes, and a run that starts from it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import small_root
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from data_prep.core.digest import sha256_file
from data_prep.core.errors import PipelineError
from data_prep.core.storage.local import LocalStore
from dpnet.cli.main import main
from dpnet.export.export import export_model
from dpnet.model import ModelConfig
from dpnet.model.config import preset
from dpnet.model_store.weights import save_generator
from dpnet.training.checkpoints import Writer
from dpnet.training.job import TrainRequest, plan_training
from dpnet.training.loop import initial_state, resume
from dpnet.training.settings import LossSettings, ModelSettings, TrainSettings
from dpnet.training.state import TrainState

CPU = torch.device("cpu")
FILE = "training_state.safetensors"


class Trained(NamedTuple):
    """A run with a checkpoint, its state, and the folder that it was exported to."""

    store: LocalStore
    run: str
    state: TrainState
    out: Path


def stepped(state: TrainState, *, seed: int) -> None:
    """Change every weight, with random gradients in place of a loss's."""
    random = torch.Generator().manual_seed(seed)
    for module, optimizer in (
        (state.generator, state.generator_optimizer),
        (state.discriminator, state.discriminator_optimizer),
    ):
        for weight in module.parameters():
            like = torch.empty_like(weight)
            weight.grad = like.copy_(torch.randn(weight.shape, generator=random))
        optimizer.step()


def tensors_of(state: TrainState) -> dict[str, Tensor]:
    """Return every tensor of the networks and optimisers by its name."""
    found = {}
    for part in ("generator", "ema", "discriminator"):
        found |= {f"{part}.{k}": v for k, v in getattr(state, part).state_dict().items()}
    for part in ("generator", "discriminator"):
        optimizer = getattr(state, f"{part}_optimizer")
        for name, weight in getattr(state, part).named_parameters():
            kept = optimizer.state[weight]
            found |= {f"{part} {key} {name}": value for key, value in kept.items()}
    return found


def same(one: TrainState, other: TrainState) -> bool:
    mine, others = tensors_of(one), tensors_of(other)
    return mine.keys() == others.keys() and all(torch.equal(mine[k], others[k]) for k in mine)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Return a run of three steps whose average differs from its generator."""
    top = tmp_path_factory.mktemp("run")
    store, run = LocalStore(top / "root"), "runs/t-000000000001"
    state = TrainState(preset("tiny"), TrainSettings(steps=3, batch_size=1), CPU)
    stepped(state, seed=1)
    state.ema.load_state_dict(state.generator.state_dict())
    for seed in (2, 3):
        stepped(state, seed=seed)
    state.step = 3
    writer = Writer(store, run, {}, last=1, best=0)
    writer.save(3, state.to_dict(), [])
    writer.wait()
    writer.close()
    save_generator(store, run, state.ema, {"step": 3})
    export_model(run, top / "out", [], root=store.uri, with_state=True)
    return Trained(store, run, state, top / "out")


@pytest.fixture
def out(trained: Trained, tmp_path: Path) -> Path:
    """Return a copy of the exported folder."""
    return Path(shutil.copytree(trained.out, tmp_path / "out"))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Any]:
    store = LocalStore(tmp_path_factory.mktemp("new") / "root")
    return store, *small_root.real_data(store)


@pytest.fixture
def start(prepared: tuple[Any, Any, Any]) -> Callable[..., tuple[Any, TrainState]]:
    """Return a function that plans a run from a folder and returns its request and first state."""

    def started(folder: Path, **model: Any) -> tuple[Any, TrainState]:
        store, images, masks = prepared
        training = TrainRequest(
            "t",
            images,
            masks,
            ModelSettings(preset="tiny", **model),
            LossSettings(),
            TrainSettings(steps=2, batch_size=1, init_from=str(folder)),
        )
        request, job = plan_training(training, store)
        state = initial_state(job, CPU)
        only: Any = SimpleNamespace(rank=0, world=1)
        resume(job, only, store, state)
        return request, state

    return started


def test_it_is_all_that_a_checkpoint_has_of_networks_and_optimisers(trained: Trained) -> None:
    found = load_file(trained.out / FILE)
    state = tensors_of(trained.state)
    assert len(found) == len(state)
    config = json.loads((trained.out / "config.json").read_text())
    assert config["training_state"] == {"step": 3, "sha256": sha256_file(trained.out / FILE)}
    assert "## training_state.safetensors" in (trained.out / "README.md").read_text()


def test_two_exports_have_the_same_bytes(trained: Trained, tmp_path: Path) -> None:
    export_model(trained.run, tmp_path / "again", [], root=trained.store.uri, with_state=True)
    assert (tmp_path / "again" / FILE).read_bytes() == (trained.out / FILE).read_bytes()


def test_a_run_that_starts_from_it_continues_exactly(
    trained: Trained, start: Callable[..., tuple[Any, TrainState]]
) -> None:
    _, state = start(trained.out)
    assert state.step == 0  # its own schedule
    assert same(state, trained.state)
    # Adam's fused form needs moments with the strides of their weights.
    kept = state.generator_optimizer.state
    assert all(w.stride() == kept[w]["exp_avg"].stride() for w in state.generator.parameters())
    original = TrainState(trained.state.config, TrainSettings(steps=3, batch_size=1), CPU)
    original.from_dict(trained.state.to_dict(), "here")
    for each in (state, original):
        each.generator_optimizer.param_groups[0]["lr"] = 1e-3
        stepped(each, seed=4)
    assert same(state, original)


def test_without_the_file_the_discriminator_is_new_and_the_request_another(
    out: Path, start: Callable[..., tuple[Any, TrainState]], trained: Trained
) -> None:
    with_state, _ = start(out)
    (out / FILE).unlink()
    without, state = start(out)
    assert with_state.digest != without.digest
    assert with_state.sources["init_state"] == sha256_file(trained.out / FILE)
    assert with_state.sources["init"] == without.sources["init"]
    assert not state.generator_optimizer.state
    ema = trained.state.ema.state_dict()
    assert all(torch.equal(v, ema[k]) for k, v in state.generator.state_dict().items())


def altered(out: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Change the tensors of an exported state, and write the hash of the new file."""
    tensors = load_file(out / FILE)
    change(tensors)
    save_file(tensors, out / FILE)
    config = json.loads((out / "config.json").read_text())
    config["training_state"]["sha256"] = sha256_file(out / FILE)
    (out / "config.json").write_text(json.dumps(config))


def one(tensors: dict[str, Tensor], part: str) -> str:
    """Return the name of a tensor of a part."""
    return min(name for name in tensors if name.startswith(part))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(one(t, "discriminator_optimizer.step.")), r"it lacks discriminator_op"),
        (lambda t: t.pop(one(t, "ema.")), r"it lacks ema\."),
        (lambda t: t.update(more=torch.zeros(1)), r"it has more, which is unknown"),
        (lambda t: t.update({one(t, "ema."): torch.zeros(3, 1)}), r"has the shape \(3, 1\), not"),
        (lambda t: t.update({k: v.int() for k, v in t.items()}), r"floating-point"),
    ],
    ids=["moment", "weight", "more", "shape", "type"],
)
def test_a_state_that_does_not_fit_is_refused(
    out: Path,
    start: Callable[..., Any],
    change: Callable[[dict[str, Tensor]], object],
    message: str,
) -> None:
    altered(out, change)
    with pytest.raises(PipelineError, match=message):
        start(out)


def test_an_altered_file_is_refused(out: Path, start: Callable[..., Any]) -> None:
    data = (out / FILE).read_bytes()
    (out / FILE).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(PipelineError, match="was altered or cut short"):
        start(out)


def test_a_file_without_its_hash_is_refused(out: Path, start: Callable[..., Any]) -> None:
    config = json.loads((out / "config.json").read_text())
    del config["training_state"]
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(PipelineError, match=r"config\.json has no hash of it"):
        start(out)


def test_another_network_is_refused(trained: Trained, start: Callable[..., Any]) -> None:
    with pytest.raises(PipelineError, match="a network that differs"):
        start(trained.out, discriminator_sees_mask=False)


def test_a_run_without_checkpoints_is_told(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = LocalStore(tmp_path / "root")
    save_generator(store, "runs/x", trained.state.ema, {"step": 3})
    arguments = ["runs/x", "-o", str(tmp_path / "out"), "--root", store.uri]
    assert main(["export", *arguments, "--training-state"]) == 1
    assert "has no checkpoint, so there is no training state" in capsys.readouterr().err
    with pytest.raises(PipelineError, match="is an exported model"):
        export_model(str(trained.out), tmp_path / "out", [], root=store.uri, with_state=True)
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_of_another_version_is_told(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "root")
    writer = Writer(store, "runs/x", {}, last=1, best=0)
    writer.save(1, {"model": ModelConfig((8,), 1, 8, 7, (8,)).to_json()}, [])
    writer.wait()
    writer.close()
    save_generator(store, "runs/x", TrainState(preset("tiny"), TrainSettings(), CPU).ema, {})
    with pytest.raises(PipelineError, match="was not made by this version of dpnet"):
        export_model("runs/x", tmp_path / "out", [], root=store.uri, with_state=True)


def test_a_state_older_than_the_model_is_told(
    trained: Trained, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = LocalStore(shutil.copytree(trained.store.folder, tmp_path / "root"))
    save_generator(store, trained.run, trained.state.ema, {"step": 5})
    export_model(trained.run, tmp_path / "out", [], root=store.uri, with_state=True)
    assert "the model is that of step 5, and the newest checkpoint that is left of step 3" in (
        caplog.text
    )
