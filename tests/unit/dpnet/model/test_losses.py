"""Each loss against plain loops in float64, and VGG's features against a plain chain."""

import math
from pathlib import Path

import pytest
import torch
from exactly import MASKS, assert_exact, mask
from hypothesis import given
from hypothesis import strategies as st

from dpnet.model import losses as L

BINARY = [kind for kind in MASKS if kind not in ("soft", "faint")]
VGG_WEIGHTS = Path(__file__).parents[5] / "shared/weights/vgg19-features-0-16.safetensors"


def leaf(*shape):
    return torch.randn(*shape, dtype=torch.float64).requires_grad_()


def pixels(x):
    n, c, h, w = x.shape
    return [(b, k, i, j) for b in range(n) for k in range(c) for i in range(h) for j in range(w)]


def plain_l1(prediction, truth, valid):
    n, channels = prediction.shape[:2]
    terms = [torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)]
    for b in range(n):
        sums, counts = [0, 0], [0, 0]
        for i in range(valid.shape[2]):
            for j in range(valid.shape[3]):
                region = int(valid[b, 0, i, j])
                counts[region] += 1
                for k in range(channels):
                    sums[region] += (prediction[b, k, i, j] - truth[b, k, i, j]).abs() / channels
        for region in (0, 1):
            terms[region] = terms[region] + sums[region] / max(counts[region], 1) / n
    return tuple(terms)


def plain_total_variation(x, valid):
    n, channels, height, width = x.shape
    across, down = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for b, k, i, j in pixels(x):
        if j + 1 < width and not (valid[b, 0, i, j] and valid[b, 0, i, j + 1]):
            across = across + (x[b, k, i, j + 1] - x[b, k, i, j]).abs()
        if i + 1 < height and not (valid[b, 0, i, j] and valid[b, 0, i + 1, j]):
            down = down + (x[b, k, i + 1, j] - x[b, k, i, j]).abs()
    every = n * channels
    return across / (every * height * (width - 1)) + down / (every * (height - 1) * width)


def log_sigmoid(z):
    return -torch.log(1 + torch.exp(-z))


def plain_discriminator(real, fake, kind):
    total = 0
    for r in real.flatten():
        total = total + (-log_sigmoid(r) if kind == "nsgan" else max(1 - r, 0 * r)) / real.numel()
    for f in fake.flatten():
        total = total + (-log_sigmoid(-f) if kind == "nsgan" else max(1 + f, 0 * f)) / fake.numel()
    return total / 2


def plain_gram(x):
    n, c, h, w = x.shape
    rows = [
        sum(x[b, p, i, j] * x[b, q, i, j] for i in range(h) for j in range(w)) / (c * h * w)
        for b in range(n)
        for p in range(c)
        for q in range(c)
    ]
    return torch.stack(rows).view(n, c, c)


def plain_distance(a, b):
    a, b = a.flatten(), b.flatten()
    return sum((p - q).abs() for p, q in zip(a, b, strict=True)) / len(a)


@given(
    seed=st.integers(0, 2**16),
    n=st.integers(1, 3),
    size=st.tuples(st.integers(2, 5), st.integers(2, 5)),
    kind=st.sampled_from(BINARY),
)
def test_pixel_losses_equal_the_definition(seed, n, size, kind):
    torch.manual_seed(seed)
    prediction, truth, valid = leaf(n, 2, *size), leaf(n, 2, *size), mask(kind, n, *size)
    assert_exact(
        lambda: L.l1_terms(prediction, truth, valid),
        lambda: plain_l1(prediction, truth, valid),
        {"prediction": prediction, "truth": truth},
    )
    assert_exact(
        lambda: (L.total_variation(prediction, valid),),
        lambda: (plain_total_variation(prediction, valid),),
        {"composite": prediction},
    )


@pytest.mark.parametrize("kind", ["nsgan", "hinge"])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 1, 3, 2)])
def test_adversarial_losses_equal_the_definition(shape, kind):
    torch.manual_seed(0)
    real, fake = leaf(*shape), leaf(*shape)
    assert_exact(
        lambda: (L.discriminator_loss(real, fake, kind),),
        lambda: (plain_discriminator(real, fake, kind),),
        {"real": real, "fake": fake},
    )

    def plain_generator():
        logits = fake.flatten()
        return sum(-log_sigmoid(f) if kind == "nsgan" else -f for f in logits) / len(logits)

    assert_exact(
        lambda: (L.generator_adversarial(fake, kind),), lambda: (plain_generator(),), {"fake": fake}
    )


@pytest.mark.parametrize("shapes", [[(1, 3, 2, 3)], [(2, 2, 3, 3), (2, 4, 1, 2)]], ids=str)
def test_feature_losses_equal_the_definition(shapes):
    torch.manual_seed(0)
    predicted, true = [leaf(*s) for s in shapes], [leaf(*s) for s in shapes]
    leaves = {f"{i}": x for i, x in enumerate(predicted + true)}
    assert_exact(
        lambda: (L.perceptual(predicted, true),),
        lambda: (sum(plain_distance(p, t) for p, t in zip(predicted, true, strict=True)),),
        leaves,
    )
    assert_exact(lambda: (L.gram(predicted[0]),), lambda: (plain_gram(predicted[0]),), leaves)
    assert_exact(
        lambda: (L.style(predicted, true),),
        lambda: (
            sum(
                plain_distance(plain_gram(p), plain_gram(t))
                for p, t in zip(predicted, true, strict=True)
            ),
        ),
        leaves,
    )


def test_large_logits_give_finite_losses_and_gradients():
    logits = torch.tensor([-1e4, 1e4]).requires_grad_()
    loss = L.discriminator_loss(logits, logits, "nsgan") + L.generator_adversarial(logits, "nsgan")
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(logits.grad).all()


def test_single_and_half_precision_are_near():
    torch.manual_seed(0)
    p, t, valid = torch.rand(2, 3, 16, 16), torch.rand(2, 3, 16, 16), mask("binary", 2, 16, 16)
    for values, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        a, b, v = p.to(values), t.to(values), valid.to(values)
        pairs = [
            *zip(L.l1_terms(a, b, v), L.l1_terms(p.double(), t.double(), valid), strict=True),
            (L.total_variation(a, v), L.total_variation(p.double(), valid)),
            (L.perceptual([a], [b]), L.perceptual([p.double()], [t.double()])),
            (L.style([a], [b]), L.style([p.double()], [t.double()])),
        ]
        for got, expected in pairs:
            assert got.dtype == torch.float32
            assert float(got.double()) == pytest.approx(float(expected), rel=tolerance)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_autocast_does_not_take_gram_matrices_in_half(half):
    torch.manual_seed(0)
    x = (300 * torch.rand(2, 8, 6, 6)).to(half)
    expected = L.gram(x.float())
    with torch.autocast("cpu", half):
        assert torch.equal(L.gram(x), expected)


def test_l1_is_divided_by_each_samples_own_share():
    truth = torch.zeros(2, 3, 4, 4)
    predicted = torch.zeros(2, 3, 4, 4)
    valid = torch.ones(2, 1, 4, 4)
    valid[0, 0, 0, 0] = 0  # one pixel
    valid[1, 0, :2] = 0  # eight pixels
    predicted[0, :, 0, 0] = 0.5
    predicted[1, :, 0, 0] = 0.8
    predicted[1, :, 3, 3] = 0.4
    hole, known = L.l1_terms(predicted, truth, valid)
    assert float(hole) == pytest.approx((0.5 + 0.8 / 8) / 2)
    assert float(known) == pytest.approx((0 + 0.4 / 8) / 2)


def test_a_batch_split_over_ranks_has_the_same_mean():
    torch.manual_seed(0)
    p, t, v = torch.rand(4, 3, 8, 8), torch.rand(4, 3, 8, 8), (torch.rand(4, 1, 8, 8) > 0.5).float()
    whole = L.l1_terms(p, t, v)[0]
    halves = [L.l1_terms(p[i::2], t[i::2], v[i::2])[0] for i in range(2)]
    torch.testing.assert_close(whole, (halves[0] + halves[1]) / 2)


def vgg_state(convolutions):
    torch.manual_seed(0)
    shapes = {0: (64, 3), 2: (64, 64), 5: (128, 64), 7: (128, 128), 10: (256, 128)}
    return {
        f"features.{i}.{name}": torch.randn(*((out, into, 3, 3) if name == "weight" else (out,)))
        for i, (out, into) in list(shapes.items())[:convolutions]
        for name in ("weight", "bias")
    }


def plain_vgg(state, image):
    """relu1_1, relu2_1 and relu3_1 by patches and matrix products."""
    # Doubles of single-precision numbers, as a network has that was built in single precision.
    mean = torch.tensor([0.485, 0.456, 0.406]).double().view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).double().view(3, 1, 1)
    x, features = (image.double() - mean) / std, []
    for i in (0, 2, 5, 7, 10):
        if i in (5, 10):
            n, c, h, w = x.shape
            x = x.reshape(n, c, h // 2, 2, w // 2, 2).amax((3, 5))
        weight, bias = state[f"features.{i}.weight"], state[f"features.{i}.bias"]
        patches = torch.nn.functional.unfold(x, 3, padding=1)
        y = weight.double().flatten(1) @ patches + bias.double()[:, None]
        x = y.clamp(min=0).unflatten(2, x.shape[2:])
        if i in (0, 5, 10):
            features.append(x)
    return features


def test_vgg_gives_the_first_activation_of_each_stage_by_torchvisions_names():
    state = vgg_state(5)
    image = torch.rand(1, 3, 16, 24, dtype=torch.float64).requires_grad_()
    vgg = L.VGGFeatures(state, "vgg19").double()
    assert_exact(
        lambda: tuple(vgg(image)), lambda: tuple(plain_vgg(state, image)), {"image": image}, 1e-8
    )
    assert [tuple(f.shape[1:]) for f in vgg(image)] == [(64, 16, 24), (128, 8, 12), (256, 4, 6)]
    assert not any(p.requires_grad for p in vgg.parameters())


def test_too_few_vgg_weights_are_refused():
    with pytest.raises(ValueError, match=r"features\.0\.weight"):
        L.VGGFeatures(vgg_state(2), "vgg19")


@pytest.fixture(scope="module")
def real_state():
    if not VGG_WEIGHTS.exists():
        pytest.skip(f"no VGG weights at {VGG_WEIGHTS}")
    from safetensors.torch import load_file

    return load_file(VGG_WEIGHTS)


@pytest.fixture(scope="module")
def photo():
    from skimage.data import astronaut

    pixels = torch.from_numpy(astronaut()[100:228, 160:288].copy())
    return pixels.permute(2, 0, 1)[None].float() / 255


def test_real_vgg_weights_give_the_features_of_a_plain_chain(real_state, photo):
    features = L.VGGFeatures(real_state, "vgg19")(photo)
    for got, expected in zip(features, plain_vgg(real_state, photo), strict=True):
        mean = float(expected.mean())
        assert math.isfinite(mean)
        assert mean > 0
        torch.testing.assert_close(got.double(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_style_of_real_features_survives_half_precision(real_state, photo, half):
    """Also of features as large and as small as other weights make them."""
    vgg = L.VGGFeatures(real_state, "vgg19")
    a, b = vgg(photo), vgg(photo.flip(3) ** 2)
    for size in (1.0, 1e3, 1e-2):
        x, y = [size * f for f in a], [size * f for f in b]
        expected = L.style([f.double() for f in x], [f.double() for f in y])
        x, y = [f.to(half) for f in x], [f.to(half) for f in y]
        x[0].requires_grad_()
        with torch.autocast("cpu", half):
            got = L.style(x, y)
        got.backward()
        assert got.dtype == torch.float32
        assert float(got.detach()) == pytest.approx(float(expected), rel=0.02)
        assert torch.isfinite(x[0].grad).all()
        if half == torch.bfloat16:  # what training uses; float16 would need a scaled loss
            assert x[0].grad.any()
