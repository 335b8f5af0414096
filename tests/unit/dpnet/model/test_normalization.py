"""Dynamic normalization and its peers against plain loops in float64."""

import contextlib

import pytest
import torch
from exactly import MASKS, assert_exact, convolve, mask
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from dpnet.model.normalization import (
    DecoderNorm,
    EncoderNorm,
    RegionStatistics,
    region_moments,
    shared_statistics,
)

SHRINK, VARIANCE_EPSILON = 16.0, 1e-5  # not imported, so that a change is noticed
KINDS = ["instance", "batch", "region", "dynamic"]
WHOSE = ["own", "known", "whole"]
SIZES = st.tuples(st.integers(1, 7), st.integers(1, 7))


def plain(values, mean, variance):
    return (values - mean) / (variance + VARIANCE_EPSILON).sqrt()


def regions(values, weights, whose):
    """Of one channel: it as in the known region and as in the hole, by shrunk statistics."""
    mean_all = values.mean()
    var_all = ((values - mean_all) ** 2).mean()
    if whose == "whole":
        return [plain(values, mean_all, var_all)] * 2
    result = []
    for w in (weights, weights if whose == "known" else 1 - weights):
        n = w.sum()
        mean = (w * values).sum() / n if n > 0 else mean_all
        var = (w * (values - mean) ** 2).sum() / n if n > 0 else var_all
        share = n / (n + SHRINK)
        mu = share * mean + (1 - share) * mean_all
        result.append(plain(values, mu, share * var + (1 - share) * var_all))
    return result


def reference(x, m, gamma, beta, kind, whose="known"):
    """Sample by sample and channel by channel. gamma, beta: two regions' scale and offset."""
    whose = "own" if kind == "region" else whose
    maps = []
    for b in range(x.shape[0]):
        for c in range(x.shape[1]):
            values = x[b, c]
            if kind == "instance":
                mean = values.mean()
                y = plain(values, mean, ((values - mean) ** 2).mean()) * gamma[c] + beta[c]
            elif kind == "batch":
                mean = x[:, c].mean()
                y = plain(values, mean, ((x[:, c] - mean) ** 2).mean()) * gamma[c] + beta[c]
            else:
                weights = (m[b, 0] > 0.5).double() if kind == "region" else m[b, 0]
                known, hole = regions(values, weights, whose)
                known, hole = known * gamma[0, c] + beta[0, c], hole * gamma[1, c] + beta[1, c]
                y = weights * known + (1 - weights) * hole
            maps.append(y)
    return torch.stack(maps).view(x.shape)


def guided(norm, x, m, feature, whose):
    """The decoder's form: normalised, then scale and offset from mask and feature."""
    ones, zeros = torch.ones(2, x.shape[1]).double(), torch.zeros(2, x.shape[1]).double()
    normalised = reference(x, m, ones, zeros, "dynamic", whose)
    projected = convolve(feature, norm.project.weight, norm.project.bias, 1, 0)
    guide = torch.cat([projected, m], dim=1)
    maps = convolve(guide, norm.modulate.weight, norm.modulate.bias, 1, 1)
    channels = x.shape[1]
    return normalised * (1 + maps[:, :channels]) + maps[:, channels:]


def by_torch(norm, x, m, feature=None):
    """The layer's formulas in whole maps, with torch's own gradients."""

    def average(values, weights):
        n = weights.sum((2, 3), keepdim=True)
        return (values * weights).sum((2, 3), keepdim=True) / torch.where(n > 0, n, 1.0)

    mean, ones = x.mean((2, 3), keepdim=True), torch.ones_like(m)
    variance = (x - mean).square().mean((2, 3), keepdim=True)
    masks = {"own": (m, 1 - m), "known": (m, m), "whole": (ones, ones)}
    maps = []
    for weights in masks[norm.statistics.whose]:
        n = weights.sum((2, 3), keepdim=True)
        own = torch.where(n > 0, average(x, weights), mean)
        mu = torch.lerp(mean, own, n / (n + SHRINK))
        var = torch.lerp(variance, average((x - own).square(), weights), n / (n + SHRINK))
        maps.append((x - mu) * torch.rsqrt(var + VARIANCE_EPSILON))
    if feature is not None:
        guide = torch.cat([norm.project(feature), m], dim=1)
        gamma, beta = norm.modulate(guide).chunk(2, dim=1)
        return torch.lerp(maps[1], maps[0], m) * (1 + gamma) + beta
    gamma, beta = (each.view(2, 1, -1, 1, 1) for each in (norm.gamma, norm.beta))
    known, hole = (maps[i] * gamma[i] + beta[i] for i in (0, 1))
    return torch.lerp(hole, known, m)


@pytest.mark.parametrize("decoder", [False, True])
@pytest.mark.parametrize("whose", WHOSE)
@pytest.mark.parametrize("mask_kind", MASKS)
def test_gradients_equal_those_of_torch(mask_kind, whose, decoder):
    torch.manual_seed(0)
    norm = DecoderNorm(3, 2, 4, "dynamic", whose) if decoder else EncoderNorm(3, "dynamic", whose)
    norm.double()
    for p in norm.parameters():
        nn.init.normal_(p)
    x = (torch.randn(2, 3, 11, 10).double() + 2).requires_grad_()
    rest = [torch.randn(2, 2, 11, 10).double().requires_grad_()] if decoder else []
    m = mask(mask_kind, 2, 11, 10)
    leaves = {"x": x, **dict(norm.named_parameters())}
    if decoder:
        leaves["feature"] = rest[0]
    if mask_kind in ("soft", "faint"):
        leaves["m"] = m.requires_grad_()
    assert_exact(
        lambda: (norm(x, m, *rest),), lambda: (by_torch(norm, x, m, *rest),), leaves, 1e-12
    )


def encoder_inputs(kind, n, size, mask_kind, whose="known"):
    norm = EncoderNorm(3, kind, whose).double()
    for p in norm.parameters():
        nn.init.normal_(p)
    gamma, beta = norm.parameters()
    x = (torch.randn(n, 3, *size).double() * 3 + 5).requires_grad_()
    m = mask(mask_kind, n, *size)
    leaves = {"x": x, "gamma": gamma, "beta": beta}
    # Where a region is empty, and where hard regions meet, there is no gradient to compare.
    if kind == "dynamic" and mask_kind in ("soft", "faint"):
        leaves["m"] = m.requires_grad_()
    return norm, x, m, leaves


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mask_kind", MASKS)
def test_the_encoders_values_and_gradients_equal_the_definition(mask_kind, kind):
    torch.manual_seed(0)
    norm, x, m, leaves = encoder_inputs(kind, 2, (11, 10), mask_kind)
    gamma, beta = leaves["gamma"], leaves["beta"]
    assert_exact(lambda: (norm(x, m),), lambda: (reference(x, m, gamma, beta, kind),), leaves, 1e-8)


@given(
    seed=st.integers(0, 2**16),
    n=st.integers(1, 2),
    size=SIZES,
    kind=st.sampled_from(["region", "dynamic"]),
    mask_kind=st.sampled_from(MASKS),
    whose=st.sampled_from(WHOSE),
)
def test_any_shape_and_mask_in_the_encoder_equals_the_definition(
    seed, n, size, kind, mask_kind, whose
):
    torch.manual_seed(seed)
    norm, x, m, leaves = encoder_inputs(kind, n, size, mask_kind, whose)
    gamma, beta = leaves["gamma"], leaves["beta"]
    expected = lambda: (reference(x, m, gamma, beta, kind, whose),)  # noqa: E731
    assert_exact(lambda: (norm(x, m),), expected, leaves, 1e-8)


@given(
    seed=st.integers(0, 2**16),
    n=st.integers(1, 2),
    size=SIZES,
    mask_kind=st.sampled_from(MASKS),
    whose=st.sampled_from(WHOSE),
)
def test_any_shape_and_mask_in_the_decoder_equals_the_definition(seed, n, size, mask_kind, whose):
    torch.manual_seed(seed)
    norm = DecoderNorm(3, 2, 4, "dynamic", whose).double()
    for p in norm.parameters():
        nn.init.normal_(p)
    x = (torch.randn(n, 3, *size).double() * 3 + 5).requires_grad_()
    feature = torch.randn(n, 2, *size).double().requires_grad_()
    m = mask(mask_kind, n, *size)
    leaves = {"x": x, "feature": feature, **dict(norm.named_parameters())}
    if mask_kind in ("soft", "faint"):
        leaves["m"] = m.requires_grad_()
    assert_exact(
        lambda: (norm(x, m, feature),), lambda: (guided(norm, x, m, feature, whose),), leaves, 1e-8
    )


@pytest.mark.parametrize("kind", ["instance", "batch", "region"])
def test_the_decoder_without_a_guide_is_the_encoders_form(kind):
    torch.manual_seed(0)
    norm = DecoderNorm(3, 2, 4, kind).double()
    gamma, beta = norm.parameters()
    x, m = torch.randn(2, 3, 5, 6).double().requires_grad_(), mask("soft", 2, 5, 6)
    feature = torch.randn(2, 2, 5, 6).double()
    assert_exact(
        lambda: (norm(x, m, feature),),
        lambda: (reference(x, m, gamma, beta, kind),),
        {"x": x, "gamma": gamma, "beta": beta},
    )


def test_batch_statistics_are_remembered_for_use_in_eval_mode():
    torch.manual_seed(0)
    norm = EncoderNorm(2, "batch").double()
    x, m = torch.randn(3, 2, 4, 4).double() * 2 + 1, torch.ones(3, 1, 4, 4).double()
    for _ in range(200):
        norm(x, m)
    y = norm.eval()(x[:1], m[:1])
    values = x.transpose(0, 1).flatten(1)
    expected = plain(
        x[:1], values.mean(1).view(1, 2, 1, 1), values.var(1, unbiased=True).view(1, 2, 1, 1)
    )
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-6)


def test_gradients_equal_finite_differences():
    torch.manual_seed(0)
    norm = EncoderNorm(2, "dynamic").double()
    x, m = torch.randn(1, 2, 4, 3).double().requires_grad_(), mask("soft", 1, 4, 3)
    assert torch.autograd.gradcheck(norm, (x, m.requires_grad_()))


def test_single_precision_is_near_far_from_zero_too():
    torch.manual_seed(0)
    norm = EncoderNorm(3, "dynamic")
    x, m = torch.randn(2, 3, 31, 17) + 100, mask("soft", 2, 31, 17).float()
    expected = norm.double()(x.double(), m.double())
    torch.testing.assert_close(norm.float()(x, m).double(), expected, rtol=1e-4, atol=1e-4)


def test_statistics_of_half_precision_features_are_in_full():
    torch.manual_seed(0)
    x, m = (torch.randn(2, 3, 9, 9) + 30).bfloat16(), mask("soft", 2, 9, 9).float()
    statistics = RegionStatistics("known")
    with torch.autocast("cpu", torch.bfloat16):
        scale, shift = statistics(x, m)
    assert scale.dtype == shift.dtype == torch.float32
    expected = statistics(x.float(), m)
    assert torch.equal(scale, expected[0])
    assert torch.equal(shift, expected[1])
    assert EncoderNorm(3, "dynamic")(x, m).dtype == torch.bfloat16


def test_each_region_has_its_own_scale_and_offset():
    norm = EncoderNorm(2, "dynamic")
    with torch.no_grad():
        norm.gamma[1] = 0
        norm.beta[1] = 7
    x, m = torch.randn(1, 2, 6, 6), torch.ones(1, 1, 6, 6)
    m[:, :, :3] = 0
    y = norm(x, m)
    assert torch.allclose(y[:, :, :3], torch.full((1, 2, 3, 6), 7.0))
    assert not torch.allclose(y[:, :, 3:], torch.full((1, 2, 3, 6), 7.0))


def test_the_decoder_starts_as_plain_normalization_and_learns_a_guide():
    torch.manual_seed(0)
    norm = DecoderNorm(3, 4, 7, "dynamic").double()
    x, m, feature = torch.randn(1, 3, 8, 8), torch.rand(1, 1, 8, 8), torch.randn(1, 4, 8, 8)
    x, m, feature = x.double(), m.double(), feature.double()
    ones, zeros = torch.ones(2, 3).double(), torch.zeros(2, 3).double()
    torch.testing.assert_close(norm(x, m, feature), reference(x, m, ones, zeros, "dynamic"))
    nn.init.normal_(norm.modulate.weight)
    assert not torch.equal(norm(x, m, feature), norm(x, m, feature + 1))
    assert not torch.equal(norm(x, m, feature), norm(x, 1 - m, feature))


@pytest.mark.parametrize("kind", KINDS)
def test_a_constant_map_stays_finite_in_every_kind(kind):
    x, m = torch.full((2, 3, 4, 4), 2.0).requires_grad_(), torch.zeros(2, 1, 4, 4)
    y = EncoderNorm(3, kind)(x, m)
    y.sum().backward()
    assert torch.isfinite(y).all()
    assert torch.isfinite(x.grad).all()


def tiles(x, heights=(3, 1, 8), widths=(5, 6)):
    return [part for rows in x.split(heights, dim=2) for part in rows.split(widths, dim=3)]


@pytest.mark.parametrize("kind", ["region", "dynamic"])
@pytest.mark.parametrize("mask_kind", MASKS)
def test_tiles_that_share_statistics_are_the_whole_maps_normalization(mask_kind, kind):
    torch.manual_seed(0)
    ramp = torch.linspace(-5, 5, 12).double().view(12, 1)  # so that tiles differ
    x, m = torch.randn(2, 3, 12, 11).double() + ramp, mask(mask_kind, 2, 12, 11)
    feature = torch.randn(2, 2, 12, 11).double()
    encoder, decoder = EncoderNorm(3, kind).double(), DecoderNorm(3, 2, 4, kind).double()
    for p in encoder.parameters():
        nn.init.normal_(p)

    def run(x, m, feature):
        return encoder(x, m), decoder(x, m, feature)

    parts = list(zip(tiles(x), tiles(m), tiles(feature), strict=True))
    with torch.no_grad():
        whole = tiles(run(x, m, feature)[0]), tiles(run(x, m, feature)[1])
        alone = [run(*part) for part in parts]
        with shared_statistics(nn.ModuleList([encoder, decoder])) as shared:
            for part, own in zip(parts, alone, strict=True):
                assert torch.equal(run(*part)[0], own[0])  # while gathering: their own
            shared.use()
            used = [run(*part) for part in parts]
    for i, (of_encoder, of_decoder) in enumerate(used):
        torch.testing.assert_close(of_encoder, whole[0][i], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(of_decoder, whole[1][i], rtol=1e-9, atol=1e-9)
    assert not torch.allclose(alone[0][0], whole[0][0])


def test_after_sharing_a_layer_uses_its_own_statistics_again():
    torch.manual_seed(0)
    norm = EncoderNorm(2, "dynamic")
    x, m = torch.randn(1, 2, 6, 6), mask("soft", 1, 6, 6).float()
    expected = norm(x, m)
    with contextlib.suppress(KeyError), shared_statistics(norm) as shared:
        norm(10 * x + 3, m)
        shared.use()
        assert not torch.equal(norm(x, m), expected)
        raise KeyError("an error on the way")
    assert torch.equal(norm(x, m), expected)


def test_statistics_cannot_be_used_before_they_are_gathered():
    norm = EncoderNorm(2, "dynamic")
    with shared_statistics(norm) as shared:
        shared.use()
        with pytest.raises(ValueError, match="run the network before"):
            norm(torch.randn(1, 2, 4, 4), torch.ones(1, 1, 4, 4))


@pytest.mark.parametrize("kind", ["instance", "batch"])
def test_other_kinds_of_normalization_share_nothing(kind):
    torch.manual_seed(0)
    norm = EncoderNorm(2, kind).eval()
    x, m = torch.randn(1, 2, 4, 4), torch.ones(1, 1, 4, 4)
    expected = norm(x, m)
    with shared_statistics(norm) as shared:
        norm(3 * x + 1, m)
        shared.use()
        assert torch.equal(norm(x, m), expected)


def test_an_empty_regions_moments_are_the_whole_maps_mean_and_no_variance():
    x = torch.randn(1, 2, 5, 5)
    known, hole = region_moments(x, torch.ones(1, 1, 5, 5))
    torch.testing.assert_close(hole.mean, x.mean((2, 3), keepdim=True))
    assert float(hole.n) == 0
    assert not hole.variance.any()
    torch.testing.assert_close(known.variance, x.var((2, 3), unbiased=False, keepdim=True))


def test_the_hole_keeps_its_difference_unless_it_has_its_own_statistics():
    torch.manual_seed(0)
    x, m = torch.randn(1, 1, 40, 40), torch.ones(1, 1, 40, 40)
    x[..., :20], m[..., :20] = x[..., :20] + 10, 0  # the hole is brighter than the rest
    differences = {}
    for whose in WHOSE:
        y = EncoderNorm(1, "dynamic", whose)(x, m)
        differences[whose] = float(y.detach()[..., :20].mean() - y.detach()[..., 20:].mean())
    assert differences["own"] < 0.5
    assert differences["known"] > 5
    assert differences["whole"] > 1.5
