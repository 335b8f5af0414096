"""Filling tensors: whole images, tiles, seams, and what tiles share."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from data_prep.core.errors import PipelineError
from data_prep.core.logs import start_logging
from dpnet.inpainting import tiles
from dpnet.inpainting.tiles import fill, inpaint_arrays, tile_boxes
from dpnet.model import build_generator
from dpnet.model.config import preset
from dpnet.model.generator import FOLLOW


@pytest.fixture(scope="module")
def generator():
    """Return a real generator with an output that depends on its input."""
    torch.manual_seed(0)
    generator = build_generator("tiny").eval()
    nn.init.normal_(generator.out.weight, std=0.02)
    return generator


@pytest.fixture
def seen(generator):
    """(image, valid, units) of every forward pass, added during the test."""
    calls = []
    handle = generator.register_forward_hook(lambda _module, given, _result: calls.append(given))
    yield calls
    handle.remove()


def noise(*shape, seed=0):
    return torch.randint(0, 256, shape, generator=torch.manual_seed(seed), dtype=torch.uint8)


def holed(count, height, width, *boxes):
    valid = torch.ones((count, 1, height, width), dtype=torch.bool)
    for box in boxes:
        valid[..., *box] = False
    return valid


BOX = (slice(10, 20), slice(5, 30))


def test_known_pixels_are_kept_and_the_hole_is_the_rounded_prediction(generator):
    images, valid = noise(2, 3, 40, 50), holed(2, 40, 50, BOX)
    filled = fill(generator, images, valid)
    with torch.no_grad():
        raw = generator(images / 255, valid.float())
    assert filled.dtype == torch.uint8
    assert torch.equal(filled[..., 20:, :], images[..., 20:, :])
    assert torch.equal(filled[..., *BOX], (raw[..., *BOX] * 255).round().to(torch.uint8))


def test_arrays_and_tensors_are_filled_alike(generator):
    images, valid = noise(2, 3, 40, 50), holed(2, 40, 50, BOX)
    arrays = images.permute(0, 2, 3, 1).numpy()
    filled = inpaint_arrays(generator, arrays, valid[:, 0].numpy().astype(np.uint8))
    assert filled.dtype == np.uint8
    assert (filled == fill(generator, images, valid).permute(0, 2, 3, 1).numpy()).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_floating_point_keeps_its_type_and_every_bit_of_known_pixels(generator, dtype):
    images = torch.rand((1, 3, 40, 50), generator=torch.manual_seed(0), dtype=torch.float64)
    images, valid = images.to(dtype), holed(1, 40, 50, BOX)
    filled = fill(generator, images, valid)
    assert filled.dtype == dtype
    assert torch.equal(filled[valid.expand_as(filled)], images[valid.expand_as(filled)])
    assert not torch.equal(filled, images)


def test_grey_is_filled_with_the_mean_of_the_three_predicted_channels(generator):
    images, valid = noise(1, 1, 40, 50) / 255, holed(1, 40, 50, BOX)
    with torch.no_grad():
        raw = generator(images.expand(-1, 3, -1, -1), valid.float())
    filled = fill(generator, images, valid)
    assert torch.equal(filled[..., *BOX], raw.mean(1, keepdim=True)[..., *BOX])


@pytest.mark.parametrize("size", [(40, 50), (100, 150)])
def test_the_pixels_in_the_hole_have_no_influence(generator, size):
    images, valid = noise(1, 3, *size) / 255, holed(1, *size, BOX)
    expected = fill(generator, images, valid, tile=64)
    for content in (float("nan"), 7.0):
        other = torch.where(valid, images, content)
        assert torch.equal(fill(generator, other, valid, tile=64), expected)


def test_an_image_without_a_hole_is_not_computed(generator, seen):
    images, valid = noise(3, 3, 40, 50), holed(3, 40, 50, BOX)
    valid[1] = True
    filled = fill(generator, images, valid)
    assert [len(image) for image, *_ in seen] == [2]
    assert torch.equal(filled[1], images[1])


def test_small_images_run_together_up_to_the_pixels_of_a_tile(generator, seen):
    images, valid = noise(5, 3, 32, 64), holed(5, 32, 64, BOX)
    fill(generator, images, valid, tile=64)
    assert [len(image) for image, *_ in seen] == [2, 2, 1]


def test_a_model_that_predicts_nan_is_refused():
    broken = build_generator("tiny").eval()
    nn.init.constant_(broken.out.bias, float("nan"))
    with pytest.raises(PipelineError, match="not finite"):
        fill(broken, noise(1, 3, 40, 50), holed(1, 40, 50, BOX))


def test_a_tile_that_is_too_small_is_refused(generator):
    with pytest.raises(PipelineError, match="give --tile 64 or more"):
        fill(generator, noise(1, 3, 40, 50), holed(1, 40, 50, BOX), tile=63)


def test_too_little_gpu_memory_is_reported(generator, monkeypatch):
    def fake_predict(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(tiles, "predict", fake_predict)
    with pytest.raises(PipelineError, match="smaller tile"):
        fill(generator, noise(1, 3, 40, 50), holed(1, 40, 50, BOX))


@pytest.mark.parametrize("size", [(64, 64), (65, 300), (79, 80), (211, 301), (500, 97)])
def test_tiles_cover_the_image_begin_on_the_grid_and_overlap(size):
    covered = np.zeros(size, int)
    boxes = tile_boxes(*size, 80)
    for rows, columns in boxes:
        assert rows.start % 16 == columns.start % 16 == 0
        assert rows.stop - rows.start <= 80
        assert columns.stop - columns.start <= 80
        covered[rows, columns] += 1
    assert covered.min() >= 1
    for parts in zip(*boxes, strict=True):  # of rows, of columns
        edges = sorted({(part.start, part.stop) for part in parts})
        for (_, stop), (start, _) in pairwise(edges):
            assert stop - start >= 0.25 * 80 - 8  # less by half a step of the grid at most


def test_no_pass_is_larger_than_a_tile_and_tiles_without_a_hole_are_not_computed(generator, seen):
    images, valid = noise(1, 3, 300, 310), holed(1, 300, 310, CORNER, (slice(290, 295),) * 2)
    fill(generator, images, valid, tile=90)  # which is rounded down to 80
    boxes = tile_boxes(300, 310, 80)
    holes = sum(not valid[..., *box].all() for box in boxes)
    assert len(seen) == 2 * holes < len(boxes)
    assert {(image.shape[2] + 15) // 16 for image, *_ in seen} == {5}
    assert {(image.shape[3] + 15) // 16 for image, *_ in seen} == {5}


CORNER = (slice(5, 8), slice(5, 20))


def test_in_a_large_image_only_the_hole_and_its_surroundings_are_computed(generator, seen):
    images, valid = noise(2, 3, 300, 310), holed(2, 300, 310, (slice(100, 130), slice(270, 300)))
    images[1] = images[0]
    images[1, :, :50] = 0
    images[1, :, :, :200] = 0
    filled = fill(generator, images, valid, tile=80)
    assert torch.equal(filled[0, :, 60:, 210:], filled[1, :, 60:, 210:])
    assert torch.equal(filled[1, :, :50], images[1, :, :50])
    (image, *_), _ = seen
    assert image.shape[2:] == (80, 80)
    assert torch.equal(image[0, :, 5, 5], images[0, :, 80, 235] / 255)


def test_a_single_tile_with_a_hole_is_computed_once(generator, seen):
    fill(generator, noise(1, 3, 200, 200), holed(1, 200, 200, (slice(4), slice(4))), tile=64)
    assert len(seen) == 1


def test_tiles_share_the_units_of_the_whole_image():
    # With its convolutions silenced, the network returns the smooth fill of the whole image.
    generator = build_generator("tiny").eval()
    nn.init.constant_(generator.follow, 1 / FOLLOW)
    images, valid = gradient()[..., :61, :251], holed(1, 61, 251, STRIP)
    with torch.no_grad():
        whole = generator(images, valid.float())
    filled = fill(generator, images, valid, tile=64)
    assert (filled - whole)[~valid.expand_as(images)].abs().max() < 1e-5


STRIP = (slice(24, 40), slice(8, 248))


def gradient():
    """Return an image in which tiles differ in statistics: dark and smooth to bright and noisy."""
    across = torch.linspace(0.1, 0.8, 256)
    rough = torch.rand((1, 3, 64, 256), generator=torch.manual_seed(0)) - 0.5
    return (across + 0.4 * rough * across).clamp(0, 1)


def unlike_the_whole(generator, images, valid):
    """Return the mean difference in the hole between tiles and the whole image."""
    with torch.no_grad():
        whole = generator(images, valid.float())
    there = ~valid.expand_as(images)
    return float((fill(generator, images, valid, tile=64) - whole)[there].abs().mean())


class FakeSharing:
    """A replacement for `shared_statistics`: each tile keeps its own statistics."""

    def __init__(self, _generator):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def use(self):
        pass


def test_shared_statistics_bring_tiles_closer_to_the_whole_image(generator, monkeypatch):
    images, valid = gradient(), holed(1, 64, 256, STRIP)
    shared = unlike_the_whole(generator, images, valid)
    monkeypatch.setattr(tiles, "shared_statistics", FakeSharing)
    assert shared < 0.7 * unlike_the_whole(generator, images, valid)


def test_a_normalization_that_cannot_be_shared_runs_each_tile_once():
    generator = build_generator(preset("tiny", normalization="instance")).eval()
    calls = []
    generator.register_forward_hook(lambda *_: calls.append(1))
    fill(generator, gradient(), holed(1, 64, 256, STRIP), tile=64)
    assert len(calls) == len(tile_boxes(64, 256, 64))


def test_neighbouring_tiles_fade_into_each_other():
    # A new network returns the mean of the known pixels. The hook removes the shared units, so this
    # is the mean of each tile. Without the fade a seam would be a jump of about 40.
    generator = build_generator("tiny").eval()
    generator.register_forward_pre_hook(lambda _module, given: given[:2])
    images = torch.linspace(0, 1, 256).expand(1, 3, 64, 256)
    filled = fill(generator, images, holed(1, 64, 256, STRIP), tile=64)
    row = 255 * filled[0, 0, 30, 8:248]
    assert row[-1] - row[0] > 100
    assert row.diff().abs().max() <= 4


def test_a_hole_that_covers_a_whole_tile_is_reported(generator):
    messages = []
    valid = holed(1, 200, 200, (slice(20, 180), slice(20, 180)))
    fill(generator, noise(1, 3, 200, 200), valid, 64, messages.append)
    assert len(messages) == 1
    assert "larger tile" in messages[0]


def test_the_tiles_are_counted_on_standard_error_if_progress_is_on(generator, capsys):
    start_logging()
    images, valid = gradient(), holed(1, 64, 256, STRIP)
    fill(generator, images, valid, tile=64)
    assert capsys.readouterr().err == ""
    fill(generator, images, valid, tile=64, progress=True)
    assert "10/10 tiles" in capsys.readouterr().err


def test_each_tile_and_each_group_of_small_images_is_a_step(generator):
    steps = []

    def step(done, total):
        steps.append((done, total))

    valid = holed(1, 64, 160, (slice(8, 60), slice(8, 150)))
    fill(generator, noise(1, 3, 64, 160), valid, 64, step=step)
    runs = steps[-1][1]
    assert steps == [(n, runs) for n in range(runs + 1)]
    assert runs > 4
    steps.clear()
    fill(generator, noise(3, 3, 64, 64), holed(3, 64, 64, BOX), 64, step=step)
    assert steps == [(0, 3), (1, 3), (1, 3), (2, 3), (2, 3), (3, 3)]


def test_what_a_step_raises_ends_the_work_before_the_next_tile(generator, seen):
    class Enough(Exception):
        pass

    def step(done, total):
        if done == 2:
            raise Enough

    valid = holed(1, 64, 160, (slice(8, 60), slice(8, 150)))
    with pytest.raises(Enough):
        fill(generator, noise(1, 3, 64, 160), valid, 64, step=step)
    assert len(seen) == 2
    assert torch.isfinite(fill(generator, noise(1, 3, 64, 64), holed(1, 64, 64, BOX)).float()).all()
