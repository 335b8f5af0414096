"""Mask-aware pyramidal convolution against a plain loop in float64."""

import pytest
import torch
from exactly import MASKS, assert_exact, mask
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from dpnet.model.pyramid import EPSILON, RATIO_MAX, Level, MaskAwareConv, pyramid_levels


def reference(layer, levels, x, m, stride):
    """Window by window, level by level, as the definition reads."""
    n, channels_in, height, width = x.shape
    total = sum(level.channels for level in levels)
    maps, masks = [], []
    for b in range(n):
        for i in range(0, height, stride):
            for j in range(0, width, stride):
                pixel, confidence, start = [], 0, 0
                for level, conv in zip(levels, layer.convs, strict=True):
                    k, r = level.kernel, level.kernel // 2
                    top, bottom = max(i - r, 0), min(i + r + 1, height)
                    left, right = max(j - r, 0), min(j + r + 1, width)
                    window = m[b, 0, top:bottom, left:right]
                    known = window.sum()
                    confidence = confidence + level.channels / total * known / window.numel()
                    part_in, part_out = channels_in // level.groups, level.channels // level.groups
                    for o in range(level.channels):
                        if known / k**2 < EPSILON:
                            pixel.append(torch.zeros((), dtype=x.dtype))
                            continue
                        first = o // part_out * part_in
                        values = x[b, first : first + part_in, top:bottom, left:right] * window
                        weight = conv.weight[o][
                            :, top - i + r : bottom - i + r, left - j + r : right - j + r
                        ]
                        ratio = k**2 / known if k**2 / known < RATIO_MAX else RATIO_MAX
                        pixel.append((values * weight).sum() * ratio + layer.bias[start + o])
                    start += level.channels
                maps.append(torch.stack(pixel))
                masks.append(confidence)
    size = (n, -(-height // stride), -(-width // stride))
    return torch.stack(maps).view(*size, total).permute(0, 3, 1, 2), torch.stack(masks).view(
        size[0], 1, *size[1:]
    )


def check(levels, channels_in, n, height, width, stride, kind):
    layer = MaskAwareConv(channels_in, levels, stride=stride).double()
    nn.init.normal_(layer.bias)
    x = torch.randn(n, channels_in, height, width, dtype=torch.float64).requires_grad_()
    m = mask(kind, n, height, width).requires_grad_()
    assert_exact(
        lambda: layer(x, m),
        lambda: reference(layer, levels, x, m, stride),
        {"x": x, "m": m, **dict(layer.named_parameters())},
    )


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kind", MASKS)
def test_values_and_gradients_equal_the_definition(kind, stride):
    torch.manual_seed(0)
    check(pyramid_levels(4, 4, pyramid=True), 4, 1, 11, 10, stride, kind)


@given(
    seed=st.integers(0, 2**16),
    n=st.integers(1, 2),
    size=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    stride=st.sampled_from([1, 2]),
    kind=st.sampled_from(MASKS),
    channels=st.sampled_from([(4, 4), (4, 8), (8, 4)]),
    pyramid=st.booleans(),
)
def test_any_shape_and_mask_equals_the_definition(seed, n, size, stride, kind, channels, pyramid):
    torch.manual_seed(seed)
    levels = pyramid_levels(*channels, pyramid=pyramid)
    check(levels, channels[0], n, *size, stride, kind)


def test_levels_of_unequal_width_weigh_the_mask_by_their_channels():
    torch.manual_seed(0)
    check([Level(3, 1, 1), Level(5, 2, 4)], 2, 1, 5, 6, 1, "soft")


def test_gradients_equal_finite_differences():
    torch.manual_seed(0)
    layer = MaskAwareConv(2, [Level(3, 1, 2), Level(5, 2, 2)], stride=2).double()
    x = torch.randn(1, 2, 5, 4, dtype=torch.float64).requires_grad_()
    m = mask("soft", 1, 5, 4).requires_grad_()
    assert torch.autograd.gradcheck(layer, (x, m))


def test_single_precision_is_near():
    torch.manual_seed(0)
    layer = MaskAwareConv(16, pyramid_levels(16, 16, pyramid=True))
    x, m = torch.randn(2, 16, 19, 23), mask("soft", 2, 19, 23).float()
    y, new_mask = layer(x, m)
    expected, expected_mask = layer.double()(x.double(), m.double())
    torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(new_mask.double(), expected_mask, rtol=1e-6, atol=1e-6)


def partial_convolution(x, m, weight, bias, stride):
    """Liu et al. (ECCV 2018), equations 1 and 2, with our cap on the ratio."""
    k = weight.shape[2]
    count = nn.functional.conv2d(m, torch.ones(1, 1, k, k, dtype=m.dtype), None, stride, k // 2)
    any_valid = (count > 0).to(m.dtype)
    ratio = (k * k / count.clamp(min=1)).clamp(max=RATIO_MAX) * any_valid
    raw = nn.functional.conv2d(x * m, weight, None, stride, k // 2)
    return raw * ratio + bias.view(1, -1, 1, 1) * any_valid, any_valid


@given(
    seed=st.integers(0, 2**16),
    size=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    kernel=st.sampled_from([3, 5, 7, 9]),
    stride=st.sampled_from([1, 2]),
    kind=st.sampled_from(["binary", "no hole", "all hole", "one known pixel", "one hole pixel"]),
)
def test_a_binary_mask_with_one_level_is_partial_convolution(seed, size, kernel, stride, kind):
    torch.manual_seed(seed)
    layer = MaskAwareConv(3, [Level(kernel, 1, 2)], stride=stride, mask="binary").double()
    nn.init.normal_(layer.bias)
    x = torch.randn(2, 3, *size, dtype=torch.float64).requires_grad_()
    m = mask(kind, 2, *size)
    assert_exact(
        lambda: layer(x, m),
        lambda: partial_convolution(x, m, layer.convs[0].weight, layer.bias, stride),
        {"x": x, **dict(layer.named_parameters())},
    )


def test_without_a_hole_the_inside_is_a_plain_convolution():
    torch.manual_seed(0)
    layer = MaskAwareConv(4, [Level(3, 1, 8)])
    nn.init.normal_(layer.bias)
    x, m = torch.randn(1, 4, 8, 8), torch.ones(1, 1, 8, 8)
    plain = nn.functional.conv2d(x, layer.convs[0].weight, layer.bias, padding=1)
    torch.testing.assert_close(layer(x, m)[0][:, :, 1:-1, 1:-1], plain[:, :, 1:-1, 1:-1])


def test_values_in_the_hole_have_no_influence():
    torch.manual_seed(0)
    layer = MaskAwareConv(4, pyramid_levels(4, 8, pyramid=True))
    x, m = torch.randn(1, 4, 8, 8), torch.ones(1, 1, 8, 8)
    m[:, :, 2:5, 3:6] = 0
    other = torch.where(m > 0, x, 1e6)
    assert torch.equal(layer(x, m)[0], layer(other, m)[0])


def test_half_precision_features_leave_the_mask_in_full():
    torch.manual_seed(0)
    layer = MaskAwareConv(4, pyramid_levels(4, 8, pyramid=True))
    x, m = torch.randn(1, 4, 12, 12), mask("soft", 1, 12, 12).float()
    expected, expected_mask = layer(x, m)
    with torch.autocast("cpu", torch.bfloat16):
        y, new_mask = layer(x, m)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), expected, rtol=0.05, atol=0.05)
    assert new_mask.dtype == torch.float32
    assert torch.equal(new_mask, expected_mask)
    half_mask = m.bfloat16()
    _, of_half = layer.bfloat16()(x.bfloat16(), half_mask)
    assert torch.equal(of_half, layer.float()(x, half_mask.float())[1])


def test_the_binary_rule_marks_every_window_with_a_known_pixel():
    layer = MaskAwareConv(2, [Level(3, 1, 4)], mask="binary")
    m = torch.zeros(1, 1, 7, 7)
    m[0, 0, 3, 3] = 1
    _, new_mask = layer(torch.randn(1, 2, 7, 7), m)
    expected = torch.zeros(1, 1, 7, 7)
    expected[0, 0, 2:5, 2:5] = 1
    assert torch.equal(new_mask, expected)


def test_levels_have_the_kernels_and_groups_of_the_design():
    levels = pyramid_levels(256, 256, pyramid=True)
    assert [(p.kernel, p.groups, p.channels) for p in levels] == [
        (3, 1, 64),
        (5, 4, 64),
        (7, 8, 64),
        (9, 16, 64),
    ]
    weights = sum(p.kernel**2 * 256 // p.groups * p.channels for p in levels)
    assert weights / 256**2 == pytest.approx(6.6, abs=0.02)
