"""Mask-aware pyramidal convolution against a plain loop in float64."""

import pytest
import torch
from torch import nn

from dpnet.model.pyramid import EPSILON, RATIO_MAX, Level, MaskAwareConv, pyramid_levels


def reference(layer, levels, x, m, stride):
    """Window by window, level by level, as the definition reads."""
    n, _, height, width = x.shape
    rows, columns = -(-height // stride), -(-width // stride)
    total = sum(level.channels for level in levels)
    y = torch.zeros(n, total, rows, columns, dtype=torch.float64)
    new_mask = torch.zeros(n, 1, rows, columns, dtype=torch.float64)
    start = 0
    for level, conv in zip(levels, layer.convs, strict=True):
        k, r = level.kernel, level.kernel // 2
        for b in range(n):
            for i in range(rows):
                for j in range(columns):
                    top, left = i * stride - r, j * stride - r
                    known, inside = 0.0, 0
                    window = torch.zeros(x.shape[1], k, k, dtype=torch.float64)
                    for p in range(k):
                        for q in range(k):
                            a, c = top + p, left + q
                            if 0 <= a < height and 0 <= c < width:
                                inside += 1
                                known += float(m[b, 0, a, c])
                                window[:, p, q] = x[b, :, a, c].double() * m[b, 0, a, c].double()
                    new_mask[b, 0, i, j] += level.channels / total * known / inside
                    if known / k**2 < EPSILON:
                        continue
                    ratio = min(k**2 / known, RATIO_MAX)
                    group_in = x.shape[1] // level.groups
                    group_out = level.channels // level.groups
                    for o in range(level.channels):
                        g = o // group_out
                        part = window[g * group_in : (g + 1) * group_in]
                        value = (part * conv.weight[o].double()).sum() * ratio
                        y[b, start + o, i, j] = value + layer.bias[start + o].double()
        start += level.channels
    return y, new_mask


def make(stride=1, channels_in=4, channels_out=8, pyramid=True):
    torch.manual_seed(0)
    levels = pyramid_levels(channels_in, channels_out, pyramid=pyramid)
    layer = MaskAwareConv(channels_in, levels, stride=stride)
    nn.init.normal_(layer.bias)
    return layer, levels


MASKS = {
    "no hole": lambda m: m.fill_(1),
    "all hole": lambda m: m.fill_(0),
    "one known pixel": lambda m: m.fill_(0)[:, :, 3, 4].fill_(1),
    "soft": lambda m: m,
    "half": lambda m: m.fill_(1)[:, :, :, :3].fill_(0),
}


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("mask", MASKS)
def test_it_equals_the_definition(mask, stride):
    layer, levels = make(stride)
    x, m = torch.randn(1, 4, 7, 6), torch.rand(1, 1, 7, 6)
    MASKS[mask](m)
    y, new_mask = layer(x, m)
    expected, expected_mask = reference(layer, levels, x, m, stride)
    torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(new_mask.double(), expected_mask, rtol=1e-5, atol=1e-6)


def test_without_a_hole_the_mask_stays_one_and_the_inside_is_a_plain_convolution():
    layer, _ = make(pyramid=False)
    x, m = torch.randn(1, 4, 8, 8), torch.ones(1, 1, 8, 8)
    y, new_mask = layer(x, m)
    plain = nn.functional.conv2d(x, layer.convs[0].weight, layer.bias, padding=1)
    torch.testing.assert_close(y[:, :, 1:-1, 1:-1], plain[:, :, 1:-1, 1:-1])
    assert torch.equal(new_mask, torch.ones_like(new_mask))


def test_a_binary_mask_with_one_level_is_partial_convolution():
    layer, _ = make(pyramid=False)
    x, m = torch.randn(1, 4, 10, 10), (torch.rand(1, 1, 10, 10) > 0.4).float()
    y, _ = layer(x, m)
    known = nn.functional.conv2d(m, torch.ones(1, 1, 3, 3), padding=1)
    plain = nn.functional.conv2d(x * m, layer.convs[0].weight, padding=1)
    bias = layer.bias.view(1, -1, 1, 1)
    expected = torch.where(known > 0, plain * (9 / known.clamp(min=1)).clamp(max=8) + bias, 0.0)
    torch.testing.assert_close(y, expected)


def test_what_lies_under_the_hole_has_no_influence():
    layer, _ = make()
    x, m = torch.randn(1, 4, 8, 8), torch.ones(1, 1, 8, 8)
    m[:, :, 2:5, 3:6] = 0
    other = torch.where(m > 0, x, 1e6)
    assert torch.equal(layer(x, m)[0], layer(other, m)[0])


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
