"""Every form of a convolution in groups gives the same values and gradients."""

import copy

import pytest
import torch
from exactly import assert_exact, mask
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from dpnet.model.grouped_convolution import (
    DENSE,
    choose_form,
    convolve_all,
    convolve_as,
    join_groups,
    move_in,
    move_out,
    toeplitz,
)
from dpnet.model.pyramid import MaskAwareConv, pyramid_levels

BLOCKS = {5: (2, 2), 7: (1, 4), 9: (4, 4)}
FORMS = [DENSE, 2, (1, 2), (1, 4), (1, 8), (2, 2), (4, 4), (8, 1), (3, 1)]


def convolution(kernel, stride, groups=4, channels=(8, 12)):
    options = {"stride": stride, "padding": kernel // 2, "groups": groups, "bias": False}
    return nn.Conv2d(*channels, kernel, **options).double()


def check(forms, convs, x):
    """Compare convolutions of the same input with those in groups."""

    def ours():
        with convolve_as(forms):
            return tuple(convolve_all(x, convs))

    leaves = {"x": x, **{str(conv.kernel_size): conv.weight for conv in convs}}
    assert_exact(ours, lambda: tuple(conv(x) for conv in convs), leaves, 1e-12)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("form", FORMS)
def test_values_and_gradients_equal_those_in_groups(form, stride):
    torch.manual_seed(0)
    convs = [convolution(kernel, stride) for kernel in (5, 7, 9)]
    x = torch.randn(2, 8, 11, 19, dtype=torch.float64).requires_grad_()
    check(dict.fromkeys((5, 7, 9), form), convs, x)


@given(
    seed=st.integers(0, 2**16),
    n=st.integers(1, 3),
    size=st.tuples(st.integers(1, 13), st.integers(1, 13)),
    kernel=st.sampled_from([3, 5, 7, 9]),
    stride=st.integers(1, 3),
    groups=st.sampled_from([2, 3, 6]),
    form=st.one_of(st.integers(1, 6), st.tuples(st.integers(1, 5), st.integers(1, 5))),
)
def test_any_shape_in_any_form_equals_the_one_in_groups(
    seed, n, size, kernel, stride, groups, form
):
    torch.manual_seed(seed)
    conv = convolution(kernel, stride, groups, (6, 12))
    x = torch.randn(n, 6, *size, dtype=torch.float64).requires_grad_()
    check({kernel: form}, [conv], x)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(
    "compiled",
    [False, pytest.param(True, marks=[pytest.mark.slow, pytest.mark.rotated(4)])],
)
def test_a_layer_in_blocks_equals_one_in_groups(compiled, stride):
    torch.manual_seed(0)
    layer = MaskAwareConv(16, pyramid_levels(16, 16, pyramid=True), stride=stride).double()
    x = torch.randn(1, 16, 9, 11, dtype=torch.float64).requires_grad_()
    m = mask("soft", 1, 9, 11)
    in_blocks = copy.copy(layer)  # the same weights
    if compiled:
        torch.compiler.reset()
        in_blocks.compile(fullgraph=True, dynamic=False, backend="aot_eager")

    def ours():
        with convolve_as(BLOCKS):
            return in_blocks(x, m)

    assert_exact(ours, lambda: layer(x, m), {"x": x, **dict(layer.named_parameters())}, 1e-12)


def test_a_layer_in_blocks_can_be_exported():
    torch.manual_seed(0)
    layer = MaskAwareConv(16, pyramid_levels(16, 16, pyramid=True))
    x, m = torch.randn(1, 16, 9, 11), mask("soft", 1, 9, 11).float()
    with torch.no_grad(), convolve_as(BLOCKS):
        exported = torch.export.export(layer, (x, m)).module()
    for ours, theirs in zip(exported(x, m), layer(x, m), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_layer_in_blocks_in_half_precision_is_near_full():
    torch.manual_seed(0)
    layer = MaskAwareConv(16, pyramid_levels(16, 16, pyramid=True))
    x, m = torch.randn(1, 16, 9, 11), mask("soft", 1, 9, 11).float()

    def passed(forms, bf16):
        layer.zero_grad()
        with convolve_as(forms), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            y, _ = layer(x, m)
        y.float().square().mean().backward()
        return y.detach(), [conv.weight.grad.clone() for conv in layer.convs]

    y, gradients = passed(BLOCKS, True)
    assert y.dtype == torch.bfloat16
    expected, of_groups = passed({}, False)
    for ours, theirs in zip([y, *gradients], [expected, *of_groups], strict=True):
        assert (ours - theirs).norm() < 1e-2 * theirs.norm()


def test_the_weight_of_blocks_has_only_the_weights_of_the_kernel_and_zeros():
    weight = torch.arange(1.0, 6).view(1, 1, 1, 5).expand(1, 1, 5, 5)
    columns = toeplitz(weight, 1, (1, 2))
    assert columns.shape == (2, 2, 5, 3)
    # The output at column 0 of a block sees the columns -2 to 2, the one at column 1 sees -1 to 3.
    assert columns[0, :, 0].T.flatten().tolist() == [1, 2, 3, 4, 5, 0]
    assert columns[1, :, 0].T.flatten().tolist() == [0, 1, 2, 3, 4, 5]


def test_joined_groups_have_zeros_between_them():
    weight = torch.ones(6, 2, 1, 1)
    assert join_groups(weight, 6, 6) is weight
    joined = join_groups(weight, 6, 2)[:, :, 0, 0]
    assert joined.tolist() == torch.block_diag(*torch.ones(3, 1, 2)).repeat(2, 1).tolist()


def test_blocks_move_into_channels_and_out_in_channels_last():
    x = torch.randn(2, 3, 5, 7).to(memory_format=torch.channels_last)
    moved = move_in(x, (2, 4))
    assert moved.shape == (2, 24, 3, 2)
    assert moved[1, 2 * 8 + 1 * 4 + 3, 1, 0] == x[1, 2, 3, 3]
    back = move_out(moved, (2, 4))
    assert torch.equal(back[:, :, :5, :7], x)
    assert not back[:, :, 5:].any()
    assert not back[..., 7:].any()
    for each in (moved, back):
        assert each.is_contiguous(memory_format=torch.channels_last)


def test_a_cpu_computes_in_groups_unless_another_form_is_asked_for():
    conv, x = convolution(5, 1), torch.zeros(1, 8, 4, 4)
    assert choose_form(x, conv) == "groups"
    with convolve_as({5: (1, 4), 3: DENSE}):
        assert choose_form(x, conv) == (1, 4)
        assert choose_form(x, convolution(7, 1)) == "groups"
        assert choose_form(x, convolution(5, 1, groups=1)) == "groups"
    with torch.autocast("cpu", torch.bfloat16):
        assert choose_form(x, conv) == "groups"
