"""One step of GAN training: its results, its compiled graphs, its saved state."""

import copy
import io
import os
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

from data_prep.core.errors import PipelineError
from dpnet.model import ModelConfig
from dpnet.model import losses as L
from dpnet.training.compile_progress import compile_progress
from dpnet.training.schedule import adversarial_weight, rate
from dpnet.training.state import TrainState
from dpnet.training.step import Likeness, Step, compiler_problem
from dpnet.training.vgg import load_vgg

SMALL = ModelConfig((8, 16, 16), 1, 8, 7, (8, 8, 8, 8))
CPU = torch.device("cpu")
LAYERS = 9  # kinds of layers: stem, four on the way down, blocks, the middle, two on the way up
STEPS, SECOND, FINETUNE = 6, 2, 4  # steps; the adversarial term's first; fine-tuning's first


def settings(**changes):
    return SimpleNamespace(
        **{
            "steps": STEPS,
            "learning_rate": 1e-3,
            "discriminator_learning_rate": 1e-4,
            "beta1": 0.5,
            "warmup_steps": 2,
            "finetune_share": 1 / 3,
            "final_rate": 0.1,
            "adversarial_from": SECOND,
            "gradient_clip": 1.0,
            "ema_decay": 0.9,
            "seed": 0,
            "accumulate": 1,
            "max_skipped": 0,
            **changes,
        }
    )


def losses(**changes):
    return SimpleNamespace(
        **{
            "hole": 6.0,
            "valid": 1.0,
            "adversarial": 0.1,
            "gan": "nsgan",
            "perceptual": 0.1,
            "style": 120.0,
            "total_variation": 0.1,
            **changes,
        }
    )


def batch(number, samples=2, size=32):
    """Return a batch like the loop's, with the image in channels_last."""
    random = torch.Generator().manual_seed(number)
    image = torch.rand(samples, size, size, 3, generator=random).permute(0, 3, 1, 2)
    valid = (torch.rand(samples, 1, size // 8, size // 8, generator=random) > 0.4).float()
    return image, torch.nn.functional.interpolate(valid, scale_factor=8)


def vgg_weights(kind="vgg19"):
    shapes = {0: (64, 3), 2: (64, 64), 5: (128, 64), 7: (128, 128), 10: (256, 128)}
    random = torch.Generator().manual_seed(0)
    weights = {}
    for i, (out, into) in shapes.items():
        weights[f"features.{i}.weight"] = torch.randn(out, into, 3, 3, generator=random) / 30
        weights[f"features.{i}.bias"] = torch.zeros(out)
    return weights


def floats(record):
    return {name: float(value) for name, value in record.items()}


def trained(steps=range(STEPS), batch=batch, config=SMALL, **options):
    """Return the state after some steps, and the measurements of each."""
    state = TrainState(config, settings(), CPU)
    step = Step(state, losses(), settings(), **options)
    measured = []
    for number in steps:
        done = step(number, *batch(number))
        measured.append(
            {**floats(done.losses), **{f"g {n}": float(v) for n, v in done.gradients.items()}}
        )
    return state, measured


@pytest.fixture
def fresh_compiler():
    torch.compiler.reset()
    counters.clear()
    with torch._dynamo.config.patch(recompile_limit=8):  # a step raises it
        yield
    torch.compiler.reset()


def assert_near(ours, theirs, relative):
    assert [record.keys() for record in ours] == [record.keys() for record in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        assert mine == pytest.approx(other, rel=relative, abs=1e-6)


def checkpointed(backend=None):
    """Return the state after some steps that compute the blocks again in the backward pass."""
    state = TrainState(SMALL, settings(), CPU)
    state.generator.checkpointing = True
    step = Step(state, losses(), settings(), backend=backend)
    for number in range(STEPS):
        step(number, *batch(number))
    return state


def test_activation_checkpointing_changes_no_bit():
    assert equal(checkpointed().to_dict(), trained()[0].to_dict())


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
def test_activation_checkpointing_works_with_compiled_layers():
    compiled = checkpointed("aot_eager")
    for mine, other in zip(compiled.ema.parameters(), trained()[0].ema.parameters(), strict=True):
        assert torch.allclose(mine, other, atol=1e-4)


@pytest.mark.slow
@pytest.mark.rotated(4)
@pytest.mark.usefixtures("fresh_compiler")
def test_each_kind_of_layer_is_compiled_once_and_computes_the_same():
    config = replace(SMALL, blocks=3)
    state, compiled = trained(config=config, backend="aot_eager")
    assert counters["stats"]["unique_graphs"] == LAYERS + 3
    assert not counters["graph_break"]
    assert [set(record) - set(compiled[0]) for record in compiled] == [
        *[set()] * SECOND,
        *[{"discriminator", "adversarial", "g discriminator"}] * (STEPS - SECOND),
    ]
    eager_state, eager = trained(config=config)
    assert_near(compiled, eager, 1e-4)
    for mine, other in zip(state.ema.parameters(), eager_state.ema.parameters(), strict=True):
        assert torch.allclose(mine, other, atol=1e-4)


@pytest.mark.slow
@pytest.mark.rotated(4)
@pytest.mark.usefixtures("fresh_compiler")
def test_generated_code_computes_the_same():
    if problem := compiler_problem(CPU):
        pytest.skip(f"torch.compile does not work here: {problem}")
    counters.clear()
    # Of code for the pyramids the C++ compiler would have for minutes.
    steps, part = range(SECOND - 1, SECOND + 2), replace(SMALL, pyramid=False, blocks=0)
    with torch._inductor.config.patch({"aot_inductor.debug_compile": True}):
        _, compiled = trained(steps, config=part, backend="inductor")
    assert counters["stats"]["unique_graphs"] == LAYERS - 1 + 3
    assert_near(compiled, trained(steps, config=part)[1], 1e-3)


RANKS = """
import sys
from datetime import timedelta

import torch
from torch import distributed
from test_step import CPU, SMALL, batch, losses, settings
from dpnet.training.state import TrainState
from dpnet.training.step import Step

meet, rank, world, samples, backend, begin, end, start, result = sys.argv[1:]
rank, world, samples, begin, end = map(int, (rank, world, samples, begin, end))
torch.set_num_threads(1)
distributed.init_process_group(
    "gloo", init_method=f"file://{meet}", rank=rank, world_size=world,
    timeout=timedelta(seconds=120),
)
state = TrainState(SMALL, settings(), CPU)
if start != "-":
    state.from_dict(torch.load(start, weights_only=True), start)
step = Step(state, losses(), settings(), world=world, backend=backend or None)
own = len(range(rank, samples, world))
step.warm_up(own, 32, CPU)
norms = []
for number in range(begin, end):
    image, valid = (t[rank::world] for t in batch(number, samples))
    done = step(number, image, valid, len(image) * world / samples)
    norms.append({name: float(norm) for name, norm in done.gradients.items()})
if rank == 0:
    torch.save((norms, state.to_dict()), result)
distributed.destroy_process_group()
"""


def ranks(folder, world, samples, steps=range(4), start="-", backend=""):
    """Return gradient norms and the state after `steps`, trained by several processes."""
    environment = {**os.environ, "PYTHONPATH": f"{Path(__file__).parent}:{Path.cwd()}"}
    folder.mkdir()
    result, meet = str(folder / "result"), str(folder / "meet")
    rest = [str(v) for v in (world, samples, backend, steps.start, steps.stop, start, result)]
    commands = [[sys.executable, "-c", RANKS, meet, str(rank), *rest] for rank in range(world)]
    processes = [subprocess.Popen(command, env=environment) for command in commands]
    assert [process.wait(300) for process in processes] == [0] * world
    return torch.load(result, weights_only=True)


@pytest.mark.slow
@pytest.mark.rotated(4)
@pytest.mark.parametrize(("samples", "backend"), [(2, ""), (2, "aot_eager"), (3, "")])
def test_two_ranks_train_like_one_rank_even_with_unequal_shares(samples, backend, tmp_path):
    norms, saved = ranks(tmp_path / "two", 2, samples, backend=backend)
    state = TrainState(SMALL, settings(), CPU)
    alone = run(state, range(4), batch=lambda number: batch(number, samples))
    # Gradients are those of the whole batch, after the average over ranks.
    assert_near(norms, [floats(m.gradients) for m in alone], 1e-3)
    for name, weight in state.generator.state_dict().items():
        assert torch.allclose(saved["generator"][name], weight, atol=1e-4), name


@pytest.mark.slow
@pytest.mark.rotated(4)
@pytest.mark.parametrize("world", [2, 3])
def test_several_ranks_that_resume_end_bit_identical(world, tmp_path):
    _, whole = ranks(tmp_path / "whole", world, 6, range(STEPS))
    _, first = ranks(tmp_path / "first", world, 6, range(3))
    torch.save(first, tmp_path / "start")
    _, second = ranks(tmp_path / "second", world, 6, range(3, STEPS), tmp_path / "start")
    assert equal(second, whole)


class NothingRead(TorchDispatchMode):
    """Fails if a value is read from a tensor, because then the host waits for the device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten._local_scalar_dense.default, "a value was read"
        return func(*args, **(kwargs or {}))


def test_a_step_reads_nothing_back_from_the_device():
    state = TrainState(SMALL, settings(), CPU)
    step = Step(state, losses(), settings(), vgg=L.VGGFeatures(vgg_weights(), "vgg19"))
    with NothingRead():
        for number in range(3):
            step(number, *batch(number))
    with pytest.raises(AssertionError, match="a value was read"), NothingRead():
        float(torch.ones(()))


def test_the_discriminator_sees_real_and_composite_in_one_forward():
    state = TrainState(SMALL, settings(adversarial_from=0), CPU)
    step = Step(state, losses(), settings(adversarial_from=0))
    seen = []
    state.discriminator.register_forward_hook(lambda module, given, out: seen.append(given))
    image, valid = batch(0)
    step(0, image, valid)
    (both, masks), (composite, _) = seen
    assert torch.equal(both, torch.cat([image, composite]))
    assert torch.equal(masks, torch.cat([valid, valid]))
    assert torch.equal(composite * valid, image * valid)


def test_the_adversarial_loss_changes_the_generator_and_not_the_discriminator():
    def gradients(weight):
        state = TrainState(SMALL, settings(), CPU)
        Step(state, losses(adversarial=weight), settings())(SECOND, *batch(0))
        of = (state.generator, state.discriminator)
        return [torch.cat([p.grad.flatten() for p in m.parameters()]) for m in of]

    light, heavy = gradients(1e-3), gradients(1e3)
    assert not torch.allclose(light[0], heavy[0])
    assert torch.equal(light[1], heavy[1])
    assert light[1].any()


def test_gradients_are_clipped_and_their_norm_is_measured_before():
    def norm(clip):
        state = TrainState(SMALL, settings(), CPU)
        measured = Step(state, losses(), settings(gradient_clip=clip))(0, *batch(0))
        left = torch.stack([p.grad.norm() for p in state.generator.parameters()]).norm()
        return float(measured.gradients["generator"]), float(left)

    free, cut = norm(1e6), norm(0.25)
    assert free == pytest.approx((free[0], free[0]), rel=1e-5)
    assert cut == pytest.approx((free[0], 0.25), rel=1e-5)


def test_bf16_gives_similar_losses_and_fp32_weights():
    state, half = trained(range(3), bf16=True)
    assert_near(half, trained(range(3))[1], 0.05)
    assert half != trained(range(3))[1]
    assert all(p.dtype == torch.float32 for p in state.generator.parameters())


def test_weights_are_stored_in_channels_last():
    state = TrainState(SMALL, settings(), CPU)
    weight = state.generator.up1.conv.weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert not weight.is_contiguous()


def test_the_learning_rate_rises_stays_constant_and_falls():
    s = settings(steps=100, warmup_steps=10, finetune_share=0.2)
    rates = [rate(step, s) for step in range(100)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert rates[10:80] == [1.0] * 70
    assert rates[80] == pytest.approx(0.5)
    assert rates[90] == pytest.approx(0.3)
    assert rates[99] == pytest.approx(0.1, abs=0.01)
    assert sorted(rates[80:], reverse=True) == rates[80:]
    assert rate(99, settings(steps=100, finetune_share=0)) == 1


def test_the_adversarial_term_rises_to_its_weight():
    s = settings(adversarial_from=10, warmup_steps=4)
    weights = [adversarial_weight(step, losses(adversarial=0.2), s) for step in range(8, 16)]
    assert weights == pytest.approx([0, 0, 0.05, 0.1, 0.15, 0.2, 0.2, 0.2])
    at_once = settings(adversarial_from=0, warmup_steps=0)
    assert adversarial_weight(0, losses(adversarial=0.2), at_once) == 0.2


def test_the_loss_is_the_sum_of_its_terms_with_their_weights(monkeypatch):
    weights = losses(hole=5.0, valid=3.0, perceptual=0.7, style=11.0, total_variation=2.0)
    s = settings(adversarial_from=0, warmup_steps=0)
    vgg = L.VGGFeatures(vgg_weights(), "vgg19")
    totals, real = [], Step._backward

    def backward(self, loss, share):
        totals.append(float(loss.detach()))
        real(self, loss, share)

    monkeypatch.setattr(Step, "_backward", backward)
    measured = floats(Step(TrainState(SMALL, s, CPU), weights, s, vgg=vgg)(0, *batch(0)).losses)
    names = ("hole", "valid", "perceptual", "style", "total_variation", "adversarial")
    assert all(measured[name] > 0 for name in names)
    expected = sum(getattr(weights, name) * measured[name] for name in names)
    assert totals == pytest.approx([measured["discriminator"], expected], rel=1e-5)


def test_the_perceptual_loss_sees_the_raw_image_and_the_composite():
    image, valid = batch(0)
    raw = batch(1)[0]
    composite = torch.where(valid > 0, image, raw)
    vgg = L.VGGFeatures(vgg_weights(), "vgg19")
    _, terms = Likeness(losses(), vgg, False)(raw, composite, image, valid)
    of_both = [L.perceptual(vgg(each), vgg(image)) for each in (raw, composite)]
    torch.testing.assert_close(terms["perceptual"], sum(of_both))
    torch.testing.assert_close(terms["style"], L.style(vgg(composite), vgg(image)))


def test_the_learning_rate_of_a_step_reaches_both_optimisers():
    state = TrainState(SMALL, settings(), CPU)
    Step(state, losses(), settings())(FINETUNE, *batch(0))
    assert state.generator_optimizer.param_groups[0]["lr"] == pytest.approx(0.5e-3)
    assert state.discriminator_optimizer.param_groups[0]["lr"] == pytest.approx(0.5e-4)


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))
    return a == b


def run(state, steps, changes=None, batch=batch, **options):
    step = Step(state, losses(), settings(**(changes or {})), **options)
    return [step(number, *batch(number)) for number in steps]


def test_a_restored_state_trains_bit_identically():
    whole, first, second = (TrainState(SMALL, settings(), CPU) for _ in range(3))
    run(whole, range(STEPS))
    run(first, range(3))
    first.keep_best(20.0)
    file = io.BytesIO()
    torch.save(first.to_dict(), file)
    file.seek(0)
    second.from_dict(torch.load(file, weights_only=True), "there")
    assert second.step == 3
    assert equal(second.to_dict(), first.to_dict())
    run(second, range(3, STEPS))
    mine, its = second.to_dict(), whole.to_dict()
    assert mine.pop("best")["score"] == 20
    del its["best"]
    assert equal(mine, its)


def test_a_saved_state_shares_no_memory_with_training():
    state = TrainState(SMALL, settings(), CPU)
    run(state, range(SECOND + 1))
    saved = state.to_dict()
    before = copy.deepcopy(saved)
    run(state, range(SECOND + 1, STEPS))
    assert equal(saved, before)
    assert not equal(state.to_dict()["generator"], before["generator"])


def test_the_state_of_the_random_generator_is_saved():
    state = TrainState(SMALL, settings(), CPU)
    saved = state.to_dict()
    first = torch.rand(3)
    state.from_dict(saved, "there")
    assert torch.equal(torch.rand(3), first)


def test_only_a_better_validation_replaces_the_best():
    state = TrainState(SMALL, settings(), CPU)
    assert state.keep_best(20.0)
    best = state.best
    run(state, range(2))
    assert not state.keep_best(20.0)
    assert state.best is best
    assert state.keep_best(20.5)
    assert (state.best["step"], best["step"]) == (2, 0)
    assert equal(state.best["ema"], dict(state.ema.state_dict()))
    assert not equal(state.best["ema"], best["ema"])


def test_a_checkpoint_of_another_network_is_refused_by_the_option_that_differs():
    saved = TrainState(SMALL, settings(), CPU).to_dict()
    other = TrainState(ModelConfig((8, 16, 16), 2, 8, 7, (8, 8, 8, 8)), settings(), CPU)
    with pytest.raises(PipelineError, match=r"another network \(blocks 1, not 2\)"):
        other.from_dict(saved, "there")


def test_a_checkpoint_from_before_the_statistics_were_an_option_has_those_of_each_region():
    own = replace(SMALL, statistics="own")
    saved = TrainState(own, settings(), CPU).to_dict()
    del saved["model"]["statistics"]
    TrainState(own, settings(), CPU).from_dict(saved, "there")
    with pytest.raises(PipelineError, match=r"another network \(statistics own, not known\)"):
        TrainState(SMALL, settings(), CPU).from_dict(saved, "there")


def test_a_checkpoint_of_another_version_is_refused():
    state = TrainState(SMALL, settings(), CPU)
    saved = state.to_dict()
    with pytest.raises(PipelineError, match="does not fit this version of the network"):
        state.from_dict({**saved, "generator": {"renamed": torch.ones(1)}}, "there")
    for other in ({name: saved[name] for name in saved if name != "model"}, [1]):
        with pytest.raises(PipelineError, match="was not made by this version"):
            state.from_dict(other, "there")


@pytest.mark.parametrize("parts", [2, 3])
def test_a_batch_in_parts_trains_like_a_whole_one(parts):
    def whole(number):
        return batch(number, samples=4)

    of_parts, at_once = (TrainState(SMALL, settings(), CPU) for _ in range(2))
    # Without the discriminator's steps: each of its passes updates the spectral norms.
    steps, quiet = range(3), {"discriminator_learning_rate": 1e-12}
    split = run(of_parts, steps, {"accumulate": parts, **quiet}, whole)
    one = run(at_once, steps, quiet, whole)
    for mine, its in zip(split, one, strict=True):
        for name in ("hole", "valid", "total_variation"):
            assert float(mine.losses[name]) == pytest.approx(float(its.losses[name]), rel=1e-4)
    first = [floats(m[0].gradients)["generator"] for m in (split, one)]
    assert first[0] == pytest.approx(first[1], rel=1e-4)
    for a, b in zip(of_parts.ema.parameters(), at_once.ema.parameters(), strict=True):
        assert torch.allclose(a, b, atol=2e-3)


def spoiled(at):
    """Batches of which those of the steps `at` hold a value whose square is infinite."""

    def make(number):
        image, valid = batch(number)
        if number in at:
            image = image.clone()
            image[0, 0] = 3e38
        return image, valid

    return make


def weights_of(state):
    return {name: state.to_dict()[name] for name in ("generator", "discriminator")}


@pytest.mark.parametrize("bad", [1, SECOND + 1])
def test_a_step_that_is_not_finite_and_those_after_it_change_no_weight(bad):
    state, before = (TrainState(SMALL, settings(), CPU) for _ in range(2))
    run(before, range(bad))
    measured = run(state, range(STEPS), batch=spoiled({bad}))
    assert not torch.isfinite(measured[bad].gradients["generator"])
    assert torch.isfinite(measured[bad + 1].gradients["generator"])
    mine, its = weights_of(state), weights_of(before)
    for name in mine:  # the spectral norms' vectors are no weights
        parameters = dict(getattr(state, name).named_parameters())
        assert all(torch.equal(mine[name][k], its[name][k]) for k in parameters)
    assert float(state.skipped) == 1


class SpoiledGradient(torch.autograd.Function):
    """A loss with a finite value and a gradient that is not."""

    @staticmethod
    def forward(context, loss):
        return loss.clone()

    @staticmethod
    def backward(context, gradient):
        return gradient * float("nan")


SPOILS = {
    "nan": lambda loss: loss * float("nan"),
    "inf": lambda loss: loss + float("inf"),
    "gradient": SpoiledGradient.apply,
}


@contextmanager
def spoiled_loss(name, how, part=1):
    """Spoil one loss of one part of the batch: of all calls, only number `part` is bad."""
    real, calls = getattr(L, name), []

    def bad(*given):
        calls.append(1)
        result = real(*given)
        if len(calls) != part:
            return result
        spoil = SPOILS[how]
        if isinstance(result, tuple):
            return spoil(result[0]), *result[1:]
        return spoil(result)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(L, name, bad)
        yield
    assert len(calls) >= part


def changeable(state):
    """Return all that a bad step must not change: weights, buffers, average, optimisers' states."""
    saved = state.to_dict()
    parts = ("generator", "discriminator", "ema")
    optimizers = ("generator_optimizer", "discriminator_optimizer")
    kept = {name: saved[name] for name in parts}
    return kept | {name: saved[name]["state"] for name in optimizers}


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("how", SPOILS)
@pytest.mark.parametrize(
    ("number", "name"),
    [
        (1, "l1_terms"),  # without the discriminator
        (SECOND + 1, "l1_terms"),
        (SECOND + 1, "generator_adversarial"),
        (SECOND + 1, "discriminator_loss"),
    ],
)
def test_a_bad_step_changes_no_bit_of_weights_average_and_optimisers(number, name, how, parts):
    def whole(number):
        return batch(number, samples=2)

    options = settings(max_skipped=9, accumulate=parts)
    state = TrainState(SMALL, options, CPU)
    step = Step(state, losses(), options)
    for good in range(number):
        step(good, *whole(good))
    before = changeable(state)
    with spoiled_loss(name, how, part=parts):  # the last part only
        step(number, *whole(number))
    assert equal(changeable(state), before)
    assert (float(state.skipped), state.step) == (1, number + 1)
    step(number + 1, *whole(number + 1))
    assert not equal(changeable(state)["ema"], before["ema"])
    assert float(state.skipped) == 1


def test_a_bad_first_step_of_the_discriminator_leaves_no_trace():
    options = settings(max_skipped=9)
    with_bad, without = (TrainState(SMALL, options, CPU) for _ in range(2))
    for state in (with_bad, without):
        step = Step(state, losses(), options)
        for number in range(SECOND):
            step(number, *batch(number))
        if state is with_bad:  # its optimiser has no state yet
            with spoiled_loss("l1_terms", "nan"):
                step(SECOND, *batch(SECOND))
        state.step = SECOND + 1
        step(SECOND + 1, *batch(SECOND + 1))
    assert equal(changeable(with_bad), changeable(without))


def test_after_too_many_bad_steps_a_good_one_changes_nothing_either():
    options = settings(max_skipped=0)
    state = TrainState(SMALL, options, CPU)
    step = Step(state, losses(), options)
    for number in range(SECOND + 1):
        step(number, *batch(number))
    before = changeable(state)
    with spoiled_loss("total_variation", "inf"):
        step(SECOND + 1, *batch(SECOND + 1))
    step(SECOND + 2, *batch(SECOND + 2))
    assert equal(changeable(state), before)
    assert float(state.skipped) == 1


BAD_RANKS = """
import sys
from datetime import timedelta

import torch
from torch import distributed
from test_step import (
    CPU, SECOND, SMALL, batch, changeable, equal, losses, settings, spoiled_loss
)
from dpnet.training.state import TrainState
from dpnet.training.step import Step

meet, rank, result = sys.argv[1:]
rank = int(rank)
torch.set_num_threads(1)
distributed.init_process_group(
    "gloo", init_method=f"file://{meet}", rank=rank, world_size=2, timeout=timedelta(seconds=120)
)
states = []
for parts in (1, 2):
    for number, name, how in [
        (1, "l1_terms", "nan"),
        (SECOND + 1, "l1_terms", "nan"),
        (SECOND + 1, "generator_adversarial", "gradient"),
        (SECOND + 1, "discriminator_loss", "inf"),
    ]:
        options = settings(max_skipped=9, accumulate=parts)
        state = TrainState(SMALL, options, CPU)
        step = Step(state, losses(), options, world=2)
        for at in range(number + 2):
            mine = [t[rank::2] for t in batch(at, 4)]
            before = changeable(state)
            if at == number and rank == 1:
                with spoiled_loss(name, how, part=parts):
                    step(at, *mine)
            else:
                step(at, *mine)
            same = equal(changeable(state), before)
            assert same == (at == number), (parts, number, name, at)
            assert float(state.skipped) == (at >= number), (parts, number, name, at)
        states.append(changeable(state))
torch.save(states, f"{result}-{rank}")
distributed.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.rotated(4)
def test_a_bad_loss_on_one_of_two_ranks_changes_nothing_on_either(tmp_path):
    environment = {**os.environ, "PYTHONPATH": f"{Path(__file__).parent}:{Path.cwd()}"}
    given = [str(tmp_path / "meet"), str(tmp_path / "result")]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", BAD_RANKS, given[0], str(rank), given[1]], env=environment
        )
        for rank in range(2)
    ]
    assert [process.wait(300) for process in processes] == [0, 0]
    first, second = (torch.load(f"{given[1]}-{rank}", weights_only=True) for rank in range(2))
    assert equal(first, second)


def test_the_average_is_that_of_its_definition_in_double_precision():
    options = settings(ema_decay=0.4)  # reached in step 6
    state = TrainState(SMALL, options, CPU)
    step = Step(state, losses(), options)
    expected = {n: w.double() for n, w in state.generator.state_dict().items()}
    for number in range(12):
        step(number, *batch(number))
        decay = min(0.4, (1 + number) / (10 + number))
        for name, weight in state.generator.state_dict().items():
            expected[name] = decay * expected[name] + (1 - decay) * weight.double()
    for name, weight in state.ema.state_dict().items():
        assert torch.allclose(weight.double(), expected[name], rtol=0, atol=1e-6), name


def test_the_first_weights_leave_the_average_soon():
    state = TrainState(SMALL, settings(), CPU)
    torch._foreach_zero_(list(state.ema.parameters()))
    with torch.no_grad():
        for weight in state.generator.parameters():
            weight.fill_(1)
    for number in range(30):
        state.step = number
        state.update_ema(0.999, torch.zeros(()))
    # The product of (1 + t) / (10 + t) is below 1e-7. Of 0.999 it would be 0.97.
    assert all(torch.allclose(p, torch.ones_like(p), atol=1e-5) for p in state.ema.parameters())


def test_the_average_has_the_buffers_of_the_generator():
    state = TrainState(SMALL, settings(), CPU)
    for network, value in ((state.generator, 3.0), (state.ema, 1.0)):
        network.register_buffer("seen", torch.tensor(value))
    state.update_ema(0.9, torch.ones(()))
    assert float(state.ema.seen) == 1
    state.update_ema(0.9, torch.zeros(()))
    assert float(state.ema.seen) == 3


def test_training_skips_up_to_the_allowed_number_of_bad_steps():
    state = TrainState(SMALL, settings(), CPU)
    step = Step(state, losses(), settings(max_skipped=2))
    seen = []
    for number in range(STEPS):
        before = torch.cat([p.detach().flatten() for p in state.generator.parameters()])
        step(number, *spoiled({0, 2, 4})(number))
        after = torch.cat([p.detach().flatten() for p in state.generator.parameters()])
        seen.append(torch.equal(before, after))
    assert seen == [True, False, True, False, True, True]
    assert float(state.skipped) == 3


def test_warming_up_changes_nothing():
    state = TrainState(SMALL, settings(), CPU)
    before = state.to_dict()
    Step(state, losses(), settings()).warm_up(2, 32, CPU)
    assert equal(state.to_dict(), before)
    assert all(p.grad is None for p in state.generator.parameters())


@pytest.mark.slow
def test_warming_up_compiles_everything_and_tells_each_part():
    told = []
    state = TrainState(SMALL, settings(), CPU)
    step = Step(state, losses(), settings(adversarial_from=2), backend="aot_eager")
    with compile_progress(told.append) as progress:
        step.warm_up(2, 32, CPU, progress.begin)
        graphs = progress.graphs
        for number in range(4):  # the GAN sets in
            step(number, *batch(number, 2))
        assert progress.graphs == graphs
    parts = [line.partition(":")[0] for line in told]
    assert list(dict.fromkeys(parts)) == [
        "compiling the generator", "compiling the discriminator", "compiling the losses",
        "compiling the backward pass",
    ]  # fmt: skip
    assert told[0].startswith("compiling the generator: 0 graphs, 0.0 s")
    assert told[-1].startswith(f"compiling the backward pass: {graphs} graphs, ")


def test_vgg_weights_are_read_from_both_kinds_of_files(tmp_path):
    from safetensors.torch import save_file

    save_file(vgg_weights(), tmp_path / "a.safetensors")
    torch.save(vgg_weights(), tmp_path / "a.pth")
    image = torch.rand(1, 3, 16, 16)
    features = [
        load_vgg(tmp_path / name, "vgg19", CPU)(image) for name in ("a.safetensors", "a.pth")
    ]
    assert [f.shape[1] for f in features[0]] == [64, 128, 256]
    assert all(torch.equal(a, b) for a, b in zip(*features, strict=True))


def edited(**changes):
    return {name: w for name, w in {**vgg_weights(), **changes}.items() if w is not None}


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, "cannot be read"),
        (b"", "cannot be read"),
        (b"not weights", "cannot be read"),
        (torch.ones(3), "holds no named weights"),
        ({"epoch": 3}, "holds no named weights"),
        ({"conv.weight": torch.ones(3)}, "hold 0 stages of vgg19"),
        (edited(**{"features.5.weight": torch.ones(2, 2)}), "size mismatch for weight"),
        (edited(**{"features.5.bias": None}), r"features\.5\.bias"),
        (edited(**{"features.17.weight": torch.ones(1)}), "set losses.vgg to vgg16"),
    ],
)
def test_a_file_that_holds_no_vgg_weights_is_refused_in_one_sentence(content, told, tmp_path):
    file = tmp_path / "weights.pth"
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content is not None:
        torch.save(content, file)
    with pytest.raises(PipelineError, match=told) as refused:
        load_vgg(file, "vgg19", CPU)
    assert "losses.vgg_weights" in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["vgg.pth", "vgg.safetensors"])
def test_a_truncated_file_of_vgg_weights_is_refused(name, tmp_path):
    from safetensors.torch import save_file

    file = tmp_path / name
    (torch.save if name == "vgg.pth" else save_file)(vgg_weights(), file)
    os.truncate(file, file.stat().st_size // 2)
    with pytest.raises(PipelineError, match=r"cannot be read .* cut short"):
        load_vgg(file, "vgg19", CPU)
