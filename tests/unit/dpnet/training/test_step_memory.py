"""The memory of a step: the estimate is what torch keeps, and the advice fits."""

from dataclasses import replace

import pytest
import torch
from test_step import CPU, SMALL, losses, settings, vgg_weights

from data_prep.core.errors import PipelineError
from dpnet.model import losses as L
from dpnet.model.config import preset
from dpnet.training.state import TrainState
from dpnet.training.step import Step
from dpnet.training.step_memory import (
    StepMemory,
    advice,
    explained_out_of_memory,
    room,
    step_memory,
)


def kept_bytes(vgg, samples):
    """Return the bytes that a real generator step keeps for its backward pass."""
    state = TrainState(SMALL, settings(), CPU)
    step = Step(state, losses(), settings(), vgg=vgg)
    weights = {
        p.untyped_storage()._cdata
        for each in (state.generator, state.discriminator, *([vgg] if vgg else []))
        for p in each.parameters()
    }
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage
        return tensor

    image, valid = torch.rand(samples, 3, 32, 32), torch.ones(samples, 1, 32, 32)
    valid[:, :, 8:20, 8:20] = 0
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        raw, composite = step._inpaint(image, valid)
        total = step._likeness(raw, composite, image, valid)[0]
        total = total + step._persuade(composite, valid)
    found = sum(storage.nbytes() for storage in kept.values())
    del total
    return found


@pytest.mark.parametrize("with_vgg", [False, True])
def test_the_estimate_for_an_image_is_what_a_real_step_keeps_for_one_more(with_vgg):
    vgg = L.VGGFeatures(vgg_weights(), "vgg19") if with_vgg else None
    estimate = step_memory(SMALL, losses(), 32, vgg=vgg)
    real = kept_bytes(vgg, 3) - kept_bytes(vgg, 2)
    assert estimate.image == pytest.approx(real, rel=0.1)


def test_checkpointing_keeps_less():
    many = replace(preset("tiny"), blocks=8)
    usual, less = (step_memory(many, losses(), 32, checkpointing=c) for c in (False, True))
    assert less.fixed == usual.fixed
    assert 0 < less.image < 0.8 * usual.image


def test_the_estimate_grows_with_the_area_and_halves_in_half_precision():
    small, large = (step_memory(SMALL, losses(), size) for size in (32, 64))
    assert large.image == pytest.approx(4 * small.image, rel=0.1)
    assert large.fixed == small.fixed
    half = step_memory(SMALL, losses(), 64, bf16=True)
    assert half.image < 0.9 * large.image  # masks and normalization stay in fp32


@pytest.mark.slow
def test_base_at_512_fits_eight_times_into_40_gb():
    assert step_memory(preset("base"), losses(), 512, bf16=True).fits(40 * 10**9) >= 8


@pytest.mark.parametrize(("own", "accumulate"), [(16, 1), (17, 2), (64, 4), (3, 1)])
def test_the_advice_fits(own, accumulate):
    needs = StepMemory(fixed=10**9, image=7 * 10**9)
    total = 24 * 10**9  # 2 images
    said = advice(needs, total, own, accumulate)
    parts = int(said.split("train.accumulate to ")[1].split(":")[0])
    assert needs.fixed + -(-own // parts) * needs.image <= total
    assert parts > accumulate
    assert "it computes 2 images at once" in said


def test_a_model_that_does_not_fit_at_all_is_to_be_smaller():
    needs = StepMemory(fixed=10**9, image=7 * 10**9)
    assert advice(needs, 4 * 10**9, 16, 16) == (
        "the GPU's memory of 4 GB is too small: a part of 1 needs about 8.0 GB. Choose a smaller"
        " model (model.preset) or smaller images (images.size)."
    )


def test_the_end_of_the_gpus_memory_becomes_the_advice():
    with (
        pytest.raises(PipelineError, match="of 24 GB is too small"),
        explained_out_of_memory(lambda total: f"memory of {total} GB is too small", lambda: 24),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def test_the_room_is_counted_from_what_a_pass_has_taken():
    gb = 10**9
    assert room(before=gb, peak=9 * gb, part=16, total=20 * gb) == (
        "a part of 16 needs 9.0 GB of the GPU's 20 GB: up to 34 images would fit"
    )
