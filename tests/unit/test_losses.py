import pytest
import torch

from dpnet.model import losses as L


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


def test_a_sample_without_a_hole_adds_nothing_to_the_hole_term():
    p, t = torch.rand(1, 3, 4, 4), torch.rand(1, 3, 4, 4)
    assert float(L.l1_terms(p, t, torch.ones(1, 1, 4, 4))[0]) == 0


def test_adversarial_losses_are_the_textbooks():
    real, fake = torch.tensor([2.0, -1.0]), torch.tensor([0.5, -3.0])
    bce = torch.nn.functional.binary_cross_entropy_with_logits
    expected = (bce(real, torch.ones(2)) + bce(fake, torch.zeros(2))) / 2
    torch.testing.assert_close(L.discriminator_loss(real, fake, "nsgan"), expected)
    torch.testing.assert_close(L.generator_adversarial(fake, "nsgan"), bce(fake, torch.ones(2)))
    assert float(L.discriminator_loss(real, fake, "hinge")) == pytest.approx((1.0 + 0.75) / 2)
    assert float(L.generator_adversarial(fake, "hinge")) == pytest.approx(1.25)


def test_total_variation_looks_only_at_the_hole():
    x, valid = torch.zeros(1, 3, 6, 6), torch.ones(1, 1, 6, 6)
    x[:, :, 0, 0] = 1
    assert float(L.total_variation(x, valid)) == 0
    valid[:, :, 0, 0] = 0
    assert float(L.total_variation(x, valid)) > 0


def vgg_state(convolutions):
    torch.manual_seed(0)
    shapes = {0: (64, 3), 2: (64, 64), 5: (128, 64), 7: (128, 128), 10: (256, 128)}
    return {
        f"features.{i}.{name}": torch.randn(*((out, into, 3, 3) if name == "weight" else (out,)))
        for i, (out, into) in list(shapes.items())[:convolutions]
        for name in ("weight", "bias")
    }


def test_vgg_gives_the_first_activation_of_each_stage_by_torchvisions_names():
    state = vgg_state(5)
    features = L.VGGFeatures(state, "vgg19")(torch.rand(1, 3, 32, 32))
    assert [tuple(f.shape[1:]) for f in features] == [(64, 32, 32), (128, 16, 16), (256, 8, 8)]
    x = (torch.full((1, 3, 8, 8), 0.5) - torch.tensor(L.IMAGENET_MEAN).view(1, 3, 1, 1)) / (
        torch.tensor(L.IMAGENET_STD).view(1, 3, 1, 1)
    )
    conv = torch.nn.functional.conv2d
    first = conv(x, state["features.0.weight"], state["features.0.bias"], padding=1).relu()
    ours = L.VGGFeatures(state, "vgg19")(torch.full((1, 3, 8, 8), 0.5))
    torch.testing.assert_close(ours[0], first)


def test_too_few_vgg_weights_are_refused():
    with pytest.raises(ValueError, match=r"features\.0\.weight"):
        L.VGGFeatures(vgg_state(2), "vgg19")


def test_perceptual_and_style_are_zero_only_for_equal_features():
    a, b = [torch.rand(1, 4, 6, 6)], [torch.rand(1, 4, 6, 6)]
    assert float(L.perceptual(a, a)) == float(L.style(a, a)) == 0
    assert float(L.perceptual(a, b)) == pytest.approx(float((a[0] - b[0]).abs().mean()))
    gram = torch.einsum("nchw,ndhw->ncd", a[0], a[0]) / (4 * 6 * 6)
    torch.testing.assert_close(L.gram(a[0]), gram)
