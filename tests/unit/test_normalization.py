"""Dynamic normalization against a plain loop in float64."""

import pytest
import torch

from dpnet.model.normalization import SHRINK, VARIANCE_EPSILON, DecoderNorm, EncoderNorm


def reference(x, m):
    """x_hat of the definition: both regions' shrunk statistics, mixed by the mask."""
    x, m = x.double(), m.double()
    result = torch.zeros_like(x)
    for b in range(x.shape[0]):
        for c in range(x.shape[1]):
            values = x[b, c].flatten()
            mean_all = values.mean()
            var_all = ((values - mean_all) ** 2).mean()
            normalised = []
            for weights in (m[b, 0].flatten(), 1 - m[b, 0].flatten()):
                n = weights.sum()
                mean = (weights * values).sum() / n if n > 0 else mean_all
                var = (weights * (values - mean) ** 2).sum() / n if n > 0 else var_all
                share = n / (n + SHRINK)
                mu = share * mean + (1 - share) * mean_all
                var = share * var + (1 - share) * var_all
                normalised.append((values - mu) / (var + VARIANCE_EPSILON).sqrt())
            weights = m[b, 0].flatten()
            mixed = weights * normalised[0] + (1 - weights) * normalised[1]
            result[b, c] = mixed.view(x.shape[2:])
    return result


@pytest.mark.parametrize("mask", ["soft", "known", "hole", "one pixel"])
def test_it_equals_the_definition(mask):
    torch.manual_seed(0)
    x, m = torch.randn(2, 3, 7, 9) * 3 + 5, torch.rand(2, 1, 7, 9)
    if mask == "known":
        m.fill_(1)
    if mask == "hole":
        m.fill_(0)
    if mask == "one pixel":
        m.fill_(1)
        m[:, :, 2, 2] = 0
    norm = EncoderNorm(3, "dynamic")
    torch.testing.assert_close(norm(x, m).double(), reference(x, m), rtol=1e-4, atol=1e-4)


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
    norm = DecoderNorm(3, 4, 7, "dynamic")
    x, m, feature = torch.randn(1, 3, 8, 8), torch.rand(1, 1, 8, 8), torch.randn(1, 4, 8, 8)
    torch.testing.assert_close(norm(x, m, feature).double(), reference(x, m), rtol=1e-4, atol=1e-4)
    torch.nn.init.normal_(norm.modulate.weight)
    assert not torch.equal(norm(x, m, feature), norm(x, m, feature + 1))
    assert not torch.equal(norm(x, m, feature), norm(x, 1 - m, feature))


@pytest.mark.parametrize("kind", ["instance", "batch", "region", "dynamic"])
def test_a_constant_map_stays_finite_in_every_kind(kind):
    x, m = torch.full((2, 3, 4, 4), 2.0), torch.zeros(2, 1, 4, 4)
    assert torch.isfinite(EncoderNorm(3, kind)(x, m)).all()


def test_gradients_are_right():
    torch.manual_seed(0)
    from dpnet.model.normalization import region_scale_shift

    x = torch.randn(1, 2, 4, 4, requires_grad=True)
    m = torch.rand(1, 1, 4, 4)

    def total(values):
        scale, shift, _, _ = region_scale_shift(values, m)
        return (values * scale + shift).pow(3).sum()

    total(x).backward()
    step = 1e-2
    for at in [(0, 0, 1, 1), (0, 1, 3, 2)]:
        up, down = x.detach().clone(), x.detach().clone()
        up[at] += step
        down[at] -= step
        numeric = (total(up) - total(down)) / (2 * step)
        assert float(x.grad[at]) == pytest.approx(float(numeric), rel=0.02, abs=0.02)
