"""The smooth fill that the decoder is shown, against plain loops in float64 among others."""

import pytest
import torch
from exactly import MASKS, assert_exact, mask
from torch.nn import functional as F

from dpnet.model.fill import pull_push


def reference(image, valid, mean):
    """Pull-push pixel by pixel, one channel of one sample at a time."""
    n, channels, _, _ = image.shape
    planes = [
        push(pull(image[b, c], valid[b, 0]), mean[b, c, 0, 0])
        for b in range(n)
        for c in range(channels)
    ]
    return torch.stack(planes).view(image.shape)


def pull(colour, weight):
    """The image and seven halvings of it, each with its weights."""
    binomial = (1, 3, 3, 1)
    levels = [(colour, weight)]
    for _ in range(7):
        height, width = colour.shape
        colours, weights = [], []
        for i in range(0, height, 2):
            for j in range(0, width, 2):
                inside = [
                    (binomial[p] * binomial[q] / 64, i + p - 1, j + q - 1)
                    for p in range(4)
                    for q in range(4)
                    if 0 <= i + p - 1 < height and 0 <= j + q - 1 < width
                ]
                share = sum(b * weight[p, q] for b, p, q in inside)
                total = sum(b * colour[p, q] for b, p, q in inside)
                weights.append(torch.clamp(4 * share, max=1))
                colours.append(total / torch.clamp(share, min=1e-8) * weights[-1])
        size = (-(-height // 2), -(-width // 2))
        colour, weight = torch.stack(colours).view(size), torch.stack(weights).view(size)
        levels.append((colour, weight))
    return levels


def push(levels, mean):
    colour, weight = levels[-1]
    filled = colour + (1 - weight) * mean
    for colour, weight in reversed(levels[:-1]):
        height, width = colour.shape
        above = [
            bilinear(filled, (i + 0.5) / 2, (j + 0.5) / 2)
            for i in range(height)
            for j in range(width)
        ]
        filled = colour + (1 - weight) * torch.stack(above).view(height, width)
        for _ in range(2):
            around = [neighbours(filled, i, j) for i in range(height) for j in range(width)]
            filled = colour + (1 - weight) * torch.stack(around).view(height, width)
    return filled


def bilinear(x, row, column):
    """The value at a place, where pixel (i, j) lies at (i + 0.5, j + 0.5)."""
    total = 0
    row, column = max(row - 0.5, 0), max(column - 0.5, 0)
    for i in (int(row), int(row) + 1):
        for j in (int(column), int(column) + 1):
            share = (1 - abs(row - i)) * (1 - abs(column - j))
            total = total + share * x[min(i, x.shape[0] - 1), min(j, x.shape[1] - 1)]
    return total


def neighbours(x, i, j):
    height, width = x.shape
    return (
        sum(
            x[min(max(i + p, 0), height - 1), min(max(j + q, 0), width - 1)]
            for p in (-1, 0, 1)
            for q in (-1, 0, 1)
            if (p, q) != (0, 0)
        )
        / 8
    )


@pytest.mark.parametrize(
    ("kind", "n", "size"),
    [
        *((kind, 1, (11, 10)) for kind in MASKS if kind not in ("soft", "faint")),
        ("binary", 2, (1, 5)),
    ],
)
def test_values_and_gradients_equal_the_definition(kind, n, size):
    torch.manual_seed(0)
    valid = mask(kind, n, *size)
    image = (torch.rand(n, 2, *size, dtype=torch.float64) * valid).requires_grad_()
    mean = torch.rand(n, 2, 1, 1, dtype=torch.float64).requires_grad_()
    assert_exact(
        lambda: (pull_push(image, valid, mean),),
        lambda: (reference(image, valid, mean),),
        {"image": image, "mean": mean},
    )


def test_half_precision_does_not_touch_the_colours():
    torch.manual_seed(0)
    valid = mask("binary", 1, 40, 33).float()
    image, mean = torch.rand(1, 3, 40, 33) * valid, torch.rand(1, 3, 1, 1)
    expected = pull_push(image, valid, mean)
    with torch.autocast("cpu", torch.bfloat16):
        filled = pull_push(image, valid, mean)
    assert filled.dtype == torch.float32
    assert torch.equal(filled, expected)


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


def test_an_odd_side_gives_what_padding_with_unknown_pixels_gives():
    torch.manual_seed(0)
    image, mean = torch.rand(1, 3, 37, 65, dtype=torch.float64), torch.full((1, 3, 1, 1), 0.5)
    valid = torch.ones(1, 1, 37, 65, dtype=torch.float64)
    valid[..., 8:29, 20:45] = 0
    odd = pull_push(image * valid, valid, mean)
    padded = [F.pad(x, (0, 63, 0, 91)) for x in (image * valid, valid)]
    assert float((pull_push(*padded, mean)[..., :37, :65] - odd).abs().max()) < 0.01
