"""The discriminator against plain convolutions and a plain power iteration, in float64."""

import pytest
import torch
from exactly import assert_exact, convolve, mask
from torch.overrides import TorchFunctionMode

from dpnet.model import build_discriminator
from dpnet.model.config import preset

SIZES = [(32, 32), (64, 32), (47, 33), (34, 63)]


def make(sees_mask=True):
    torch.manual_seed(0)
    config = preset("tiny", discriminator_widths=(2, 3, 2, 4), discriminator_sees_mask=sees_mask)
    return build_discriminator(config).double()


def inputs(n, size):
    image = torch.rand(n, 3, *size, dtype=torch.float64).requires_grad_()
    return image, mask("binary", n, *size)


def parts(conv):
    """A layer's own weight, and the vectors of its spectral norm."""
    norm = conv.parametrizations.weight
    return norm.original, norm[0]._u, norm[0]._v


def sigma(weight, u, v):
    """u^T W v, W being the weight as a matrix with a row for each output channel."""
    rows = [sum(a * b for a, b in zip(row.flatten(), v, strict=True)) for row in weight]
    return sum(a * b for a, b in zip(u, rows, strict=True))


def reference(model, vectors, image, valid):
    x = 2 * image - 1
    if model.sees_mask:
        x = torch.cat([x, valid], dim=1)
    for i, (conv, (u, v)) in enumerate(zip(model.convs, vectors, strict=True)):
        weight = parts(conv)[0]
        x = convolve(x, weight / sigma(weight, u, v), conv.bias, 2, 1)
        if i < 4:
            x = torch.where(x > 0, x, 0.2 * x)
    return x


@pytest.mark.parametrize("sees_mask", [True, False])
@pytest.mark.parametrize(
    ("n", "size"), [(1, SIZES[0]), (2, SIZES[0]), *((1, s) for s in SIZES[1:])]
)
def test_values_and_gradients_equal_the_definition(n, size, sees_mask):
    model = make(sees_mask).eval()
    image, valid = inputs(n, size)
    vectors = [parts(conv)[1:] for conv in model.convs]
    assert_exact(
        lambda: (model(image, valid),),
        lambda: (reference(model, vectors, image, valid),),
        {"image": image, **dict(model.named_parameters())},
    )


def test_in_training_each_pass_is_one_power_iteration():
    model = make().train()
    image, valid = inputs(1, (32, 32))
    vectors = []
    for conv in model.convs:
        weight, _, v = (t.detach().clone() for t in parts(conv))
        u = torch.stack([(row.flatten() * v).sum() for row in weight])
        u = u / u.square().sum().sqrt()
        v = sum(a * row.flatten() for a, row in zip(u, weight, strict=True))
        vectors.append((u, v / v.square().sum().sqrt()))
    assert_exact(
        lambda: (model(image, valid),),
        lambda: (reference(model, vectors, image, valid),),
        {"image": image, **dict(model.named_parameters())},
    )
    for conv, (u, v) in zip(model.convs, vectors, strict=True):
        torch.testing.assert_close(parts(conv)[1], u)
        torch.testing.assert_close(parts(conv)[2], v)


def test_every_layer_comes_to_have_norm_one():
    model = make().train()
    image, valid = inputs(1, (32, 32))
    with torch.no_grad():
        for _ in range(100):
            model(image, valid)
    for conv in model.eval().convs:
        largest = torch.linalg.svdvals(conv.weight.detach().flatten(1))[0]
        assert float(largest) == pytest.approx(1, abs=1e-3)


def test_single_precision_is_near():
    model = make().eval()
    image, valid = inputs(2, (64, 64))
    expected = model(image, valid)
    got = model.float()(image.float(), valid.float())
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-5)


class ProductsUnderAutocast(TorchFunctionMode):
    """Notes whether autocast was on at each product of a matrix and a vector."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.mv:
            self.seen.append(torch.is_autocast_enabled("cpu"))
        return func(*args, **(kwargs or {}))


def test_the_spectral_norm_is_never_computed_in_half():
    model = make().float().train()
    image, valid = (t.float() for t in inputs(1, (32, 32)))
    with ProductsUnderAutocast() as products, torch.autocast("cpu", torch.bfloat16):
        assert model(image, valid).dtype == torch.bfloat16
    assert len(products.seen) == 5 * 3
    assert not any(products.seen)
