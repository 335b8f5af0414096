"""Requests that are filled together: only small ones of one size, and only with the same bytes."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from dpnet.inpainting.api import Hole, find_hole
from dpnet.inpainting.tiles import fill
from dpnet.model import build_generator
from dpnet.serving.batches import MOST, Batches, batch_shape, size_of_batch


def hole_of(seed: int, height: int = 32, width: int = 48, channels: int = 3) -> Hole:
    """Return a random image with a hole in its middle."""
    made = np.random.default_rng(seed)
    mask = np.zeros((height, width), bool)
    mask[8:20, 10:30] = True
    shape = (height, width, channels)
    image = made.integers(0, 256, shape if channels > 1 else shape[:2], np.uint8)
    hole = find_hole(image, mask, "i", "m", lambda sentence: None)
    assert hole is not None
    return hole


def test_only_neighbours_of_one_shape_run_together_and_never_more_than_the_bound() -> None:
    small, other = (1, 3, 32, 48), (1, 3, 48, 32)
    assert size_of_batch([small]) == 1
    assert size_of_batch([small, small, other, small]) == 2
    assert size_of_batch([small, None, small]) == 1
    assert size_of_batch([None, None]) == 1
    assert size_of_batch([small] * 20) == MOST


def test_a_large_image_runs_alone_and_alpha_is_not_filled() -> None:
    assert batch_shape(hole_of(0), 48) == (1, 3, 32, 48)
    assert batch_shape(hole_of(0, channels=4), 48) == (1, 3, 32, 48)
    assert batch_shape(hole_of(0, channels=1), 48) == (1, 1, 32, 48)
    assert batch_shape(hole_of(0, 32, 49), 48) is None


def test_results_are_the_bytes_of_single_requests() -> None:
    torch.manual_seed(0)
    generator = build_generator("tiny").eval()
    torch.nn.init.normal_(generator.out.weight, std=0.01)
    holes = [hole_of(seed) for seed in range(3)]
    alone = [fill(generator, hole.colours, hole.valid) for hole in holes]
    batches = Batches()
    for _ in range(2):  # the first time both ways, then together if that is the same
        made = batches.fill("m", holes, lambda colours, valid: fill(generator, colours, valid))
        assert all(map(torch.equal, made, alone))


class Counting:
    """A way to fill that gives other bytes for batches, if `differs`, and counts its calls."""

    def __init__(self, differs: bool) -> None:
        self.differs, self.sizes = differs, list[int]()

    def __call__(self, colours: Tensor, valid: Tensor) -> Tensor:
        self.sizes.append(len(colours))
        return torch.where(valid, colours, 1 + (self.differs and len(colours) > 1))


def test_a_size_whose_batches_give_the_same_bytes_is_filled_in_one_call() -> None:
    way, batches, holes = Counting(False), Batches(), [hole_of(0), hole_of(1)]
    first = batches.fill("m", holes, way)
    assert way.sizes == [2, 1, 1]
    again = batches.fill("m", holes, way)
    assert way.sizes == [2, 1, 1, 2]
    assert all(map(torch.equal, first, again))


def test_a_size_whose_batches_give_other_bytes_is_filled_one_by_one() -> None:
    way, batches, holes = Counting(True), Batches(), [hole_of(0), hole_of(1)]
    for _ in range(2):
        for hole, made in zip(holes, batches.fill("m", holes, way), strict=True):
            assert torch.equal(made, torch.where(hole.valid, hole.colours, 1))
    assert way.sizes == [2, 1, 1, 1, 1]
    batches.fill("another model", holes, way)
    assert way.sizes[5:] == [2, 1, 1]
