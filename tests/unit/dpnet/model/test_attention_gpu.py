"""The Triton kernels of attention on a GPU. `test_attention_triton.py` runs them without one."""

import warnings

import pytest
import torch

from dpnet.model import attention as A
from dpnet.model import attention_blocks
from dpnet.model import attention_check as check

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]
GPU = torch.device("cuda")
FAR = {torch.bfloat16: 2e-2, torch.float32: 5e-3, torch.float64: 1e-9}  # fp32: TF32 in it


def kernels():
    found = check.checked_kernels(GPU, torch.bfloat16)
    assert found is not None, "the kernels did not pass their check"
    return found


def example(query, grids, kind, samples=2, dim=32, values=16):
    """Return the arguments of `attention_blocks.backward`, as `attend` makes them."""
    torch.manual_seed(0)
    maps = [torch.randn(samples, dim, *g, device=GPU).to(kind) for g in (query, *grids)]
    v = torch.randn(samples, sum(h * w for h, w in grids), values, device=GPU).to(kind)
    shares = [torch.rand(samples, 1, *g, device=GPU) - 0.1 for g in grids]  # some are excluded
    column, bias, _ = A.key_terms(maps[1:], shares)
    row = A.inverse_norms(maps[0])[:, 0]
    q, k = maps[0].permute(0, 2, 3, 1), A._flat(maps[1:])
    gradient = torch.randn(samples, *query, values, device=GPU).to(kind)
    return [gradient, q, k, v, row, column, bias, [side for g in grids for side in g]]


def results(form, gradient, *inputs):
    return [form.forward(*inputs), *form.backward(gradient, *inputs)]


def in_double(inputs):
    return [x.double() if isinstance(x, torch.Tensor) else x for x in inputs]


@pytest.mark.parametrize("kind", check.LIMITS)
def test_the_kernels_pass_their_check_without_a_warning(kind):
    check.checked_kernels.cache_clear()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "attention runs without Triton")
        assert check.checked_kernels(GPU, kind) is not None


@pytest.mark.parametrize("kind", FAR)
@pytest.mark.parametrize("workspace", [1 << 20, 1 << 28])
@pytest.mark.parametrize(
    ("query", "grids"),
    [
        ((64, 64), ((64, 64), (32, 32), (16, 16))),
        ((33, 50), ((33, 50), (17, 25), (9, 13))),
        ((1, 70), ((3, 5),)),
        ((5, 1), ((40, 1), (1, 1))),
    ],
)
def test_output_and_gradients_are_those_of_float64(kind, workspace, query, grids, monkeypatch):
    monkeypatch.setattr(kernels(), "WORKSPACE", workspace)
    inputs = example(query, grids, kind)
    true = results(attention_blocks, *in_double(inputs))
    for ours, theirs in zip(results(kernels(), *inputs), true, strict=True):
        assert float((ours.double() - theirs).norm() / theirs.norm()) < FAR[kind]


def test_half_precision_is_as_near_to_float64_as_torch_is():
    inputs = example((64, 64), ((64, 64), (32, 32), (16, 16)), torch.bfloat16, dim=128, values=128)
    true = results(attention_blocks, *in_double(inputs))
    ours, theirs = results(kernels(), *inputs), results(attention_blocks, *inputs)
    for a, b, exact in zip(ours, theirs, true, strict=True):
        assert (a.double() - exact).norm() < 1.5 * (b.double() - exact).norm()


def test_the_same_inputs_give_the_same_bits():
    inputs = example((64, 64), ((64, 64), (32, 32)), torch.bfloat16, samples=3)
    first = results(kernels(), *inputs)
    for _ in range(3):
        for a, b in zip(first, results(kernels(), *inputs), strict=True):
            assert torch.equal(a, b)


def test_blocks_of_a_large_map_stay_in_their_workspace():
    inputs = example((128, 128), ((128, 128), (64, 64), (32, 32)), torch.bfloat16, 1, 128, 128)
    results(kernels(), *inputs)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = results(kernels(), *inputs)
    peak = torch.cuda.max_memory_allocated() - before
    # Results, and copies of the maps and sums in fp32, are linear in the maps' sizes.
    linear = 8 * sum(x.numel() for x in (*inputs[:4], *out)) * 2
    assert peak < kernels().WORKSPACE_LARGE + linear


def test_a_layer_uses_the_kernels_and_a_context_turns_them_off(monkeypatch):
    layer = A.PyramidAttention(8, [8], 8).to(GPU)
    x, valid = torch.randn(1, 8, 8, 8, device=GPU), torch.ones(1, 1, 32, 32, device=GPU)
    used = []
    forward = kernels().forward
    monkeypatch.setattr(kernels(), "forward", lambda *x: used.append(1) or forward(*x))
    with torch.no_grad():
        ours = layer(x, [x], valid)
        assert used == [1]
        with A.attention_by_blocks():
            theirs = layer(x, [x], valid)
    assert used == [1]
    torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-3)
