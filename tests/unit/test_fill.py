"""The smooth fill that the decoder is shown."""

import torch

from dpnet.model.fill import pull_push


def test_known_pixels_keep_their_values():
    torch.manual_seed(0)
    image, valid = torch.rand(2, 3, 37, 50), (torch.rand(2, 1, 37, 50) > 0.5).float()
    filled = pull_push(image * valid, valid, torch.zeros(2, 3, 1, 1))
    assert torch.equal(filled * valid, image * valid)


def test_one_colour_is_filled_with_that_colour():
    image, valid = torch.full((1, 3, 64, 64), 0.3), torch.ones(1, 1, 64, 64)
    valid[:, :, 10:50, 5:60] = 0
    filled = pull_push(image * valid, valid, torch.ones(1, 3, 1, 1))
    torch.testing.assert_close(filled, image)


def test_a_gradient_is_continued_through_the_hole():
    ramp = torch.linspace(0, 1, 64).expand(1, 1, 64, 64)
    valid = torch.ones(1, 1, 64, 64)
    valid[:, :, :, 28:36] = 0
    filled = pull_push(ramp * valid, valid, torch.zeros(1, 1, 1, 1))
    assert float((filled - ramp).abs().max()) < 0.03


def test_a_sample_without_known_pixels_is_filled_with_the_mean():
    filled = pull_push(
        torch.zeros(1, 3, 16, 16), torch.zeros(1, 1, 16, 16), torch.full((1, 3, 1, 1), 0.7)
    )
    torch.testing.assert_close(filled, torch.full((1, 3, 16, 16), 0.7))
