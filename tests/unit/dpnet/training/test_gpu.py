"""The parts that differ on a GPU: half precision, compiled layers, forms of convolutions."""

import copy
from contextlib import nullcontext

import pytest
import torch
from test_step import SMALL, STEPS, batch, floats, losses, settings

from dpnet.model.attention import PyramidAttention, plain_attention
from dpnet.model.grouped_convolution import convolve_as
from dpnet.model.pyramid import MaskAwareConv, pyramid_levels
from dpnet.training.state import TrainState
from dpnet.training.step import Step

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]
GPU = torch.device("cuda")


def half(enabled=True):
    return torch.autocast(GPU.type, torch.bfloat16, enabled=enabled)


def far(ours, theirs):
    """The difference's norm as a share of what it should be."""
    ours, theirs = ours.double().cpu(), theirs.double().cpu()
    return float((ours - theirs).norm() / theirs.norm())


@pytest.mark.parametrize(("bf16", "limit"), [(False, 1e-3), (True, 1e-2)])  # fp32: TF32 in it
def test_attention_is_near_double_precision(bf16, limit):
    torch.manual_seed(0)
    layer = PyramidAttention(64, [64] * 3, 32)
    x = torch.randn(2, 64, 32, 32)
    layers = [torch.randn(2, 64, 32 // s, 32 // s) for s in (1, 2, 4)]
    valid = torch.ones(2, 1, 128, 128)
    valid[:, :, 32:96, 32:96] = 0

    def passed(layer, inputs, context):
        x, *layers = [each.detach().requires_grad_() for each in inputs]
        with context:
            out = layer(x, layers, valid.to(x))
        out.to(x.dtype).square().mean().backward()
        return [out.detach(), x.grad, *(each.grad for each in layers)]

    with plain_attention():
        doubles = [each.double() for each in (x, *layers)]
        true = passed(copy.deepcopy(layer).double(), doubles, nullcontext())
    given = [each.to(GPU) for each in (x, *layers)]
    for ours, theirs in zip(passed(layer.to(GPU), given, half(bf16)), true, strict=True):
        assert far(ours, theirs) < limit


@pytest.mark.parametrize("form", [None, "groups", 2, (1, 4), (1, 8), (2, 2), (4, 4)])
def test_a_pyramid_in_half_precision_is_near_full(form):
    torch.manual_seed(0)
    layer = MaskAwareConv(64, pyramid_levels(64, 128, pyramid=True), stride=2).to(GPU)
    x, m = torch.randn(2, 64, 32, 32, device=GPU), torch.ones(2, 1, 32, 32, device=GPU)
    m[:, :, 8:20, 8:20] = 0

    def passed(bf16):
        layer.zero_grad()
        forms = dict.fromkeys((5, 7, 9), form) if form and bf16 else {}
        with half(bf16), convolve_as(forms):
            y, _ = layer(x, m)
        y.float().square().mean().backward()
        return [y.detach(), *(p.grad.clone() for p in layer.parameters())]

    for ours, theirs in zip(passed(True), passed(False), strict=True):
        assert far(ours, theirs) < 2e-2


@pytest.mark.parametrize("backend", [None, "inductor"])
def test_steps_in_half_precision_are_near_full(backend):
    def trained(**options):
        torch.compiler.reset()
        state = TrainState(SMALL, settings(), GPU)
        step = Step(state, losses(), settings(), **options)
        return [
            floats(step(number, *(t.to(GPU) for t in batch(number))).losses)
            for number in range(STEPS)
        ]

    for ours, theirs in zip(trained(bf16=True, backend=backend), trained(), strict=True):
        assert ours == pytest.approx(theirs, rel=0.03)
