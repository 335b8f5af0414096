"""`dpnet.inpaint` and `dpnet.load_model`: kinds of images, masks and models, and errors."""

import subprocess
import sys
import warnings

import numpy as np
import pytest
import small_root
import torch
from PIL import Image
from torch import nn

import dpnet
from data_prep.core.errors import PipelineError
from data_prep.core.storage.local import LocalStore
from dpnet.model import build_generator
from dpnet.model_store import packaged
from dpnet.model_store.find_model import PACKAGED, find_model


@pytest.fixture(scope="module")
def generator():
    """Return a real generator with an output that depends on its input."""
    torch.manual_seed(0)
    generator = build_generator("tiny").eval()
    nn.init.normal_(generator.out.weight, std=0.02)
    return generator


def photo(height=40, width=50, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def hole(height=40, width=50):
    """Return a mask that is True in a box."""
    mask = np.zeros((height, width), bool)
    mask[10:20, 5:30] = True
    return mask


HOLE = hole()
MASK = Image.fromarray(np.uint8(255) * HOLE)


@pytest.fixture(scope="module")
def expected(generator):
    """`photo()` with its hole filled, uint8 H W 3."""
    return dpnet.inpaint(photo(), HOLE, generator)


def test_the_hole_is_filled_and_no_bit_of_known_pixels_changes(expected):
    assert expected.dtype == np.uint8
    assert (expected[~HOLE] == photo()[~HOLE]).all()
    assert (expected[HOLE] != photo()[HOLE]).any()


def test_the_given_image_is_not_changed(generator, expected):
    array, tensor, pillow = photo(), torch.from_numpy(photo()).permute(2, 0, 1), as_pil("RGB")
    for image in (array, tensor, pillow):
        dpnet.inpaint(image, HOLE, generator)
    assert (array == photo()).all()
    assert (np.asarray(pillow) == photo()).all()


def as_pil(mode):
    return Image.fromarray(photo()).convert(mode)


def with_alpha(array):
    return np.concatenate([array, photo(seed=1)[..., :1]], axis=-1)


def first(array):
    """Return the array as a tensor with channels first."""
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(array, -1, -3)))


GREY = photo()[..., :1]
KINDS = {
    "array H W": GREY[..., 0],
    "array H W 1": GREY,
    "array H W 3": photo(),
    "array H W 4": with_alpha(photo()),
    "array N H W 1": GREY[None],
    "array N H W 3": np.stack([photo(), photo(seed=2)]),
    "array N H W 4": with_alpha(photo())[None],
    "array of floats": (photo() / 255).astype(np.float32),
    "array of doubles": photo() / 255,
    "array of halves": (photo() / 255).astype(np.float16),
    "array that is read-only": np.broadcast_to(GREY, (40, 50, 3)),
    "array with negative strides": photo()[::-1, ::-1],
    "tensor H W": first(GREY)[0],
    "tensor 1 H W": first(GREY),
    "tensor 3 H W": first(photo()),
    "tensor 4 H W": first(with_alpha(photo())),
    "tensor N 3 H W": first(np.stack([photo(), photo(seed=2)])),
    "tensor of floats": first(photo() / 255).float(),
    "tensor of bfloat16": first(photo() / 255).bfloat16(),
    "tensor that needs a gradient": first(photo() / 255).float().requires_grad_(),
    "Pillow image L": as_pil("L"),
    "Pillow image LA": as_pil("LA"),
    "Pillow image RGB": as_pil("RGB"),
    "Pillow image RGBA": Image.fromarray(with_alpha(photo())),
}


def plain(image):
    """Return the values as an array N H W C."""
    if isinstance(image, torch.Tensor):
        image = image.detach().double().numpy()
        image = np.moveaxis(image, -3, -1) if image.ndim > 2 else image
    array = np.asarray(image)
    array = array[..., None] if array.ndim == 2 else array
    return array if array.ndim == 4 else array[None]


@pytest.mark.parametrize("image", KINDS.values(), ids=KINDS.keys())
def test_every_kind_of_image_comes_back_as_the_same_kind_with_only_the_hole_changed(
    generator, image
):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        filled = dpnet.inpaint(image, HOLE, generator)
    assert type(filled) is type(image)
    if isinstance(image, Image.Image):
        assert (filled.mode, filled.size) == (image.mode, image.size)
    else:
        assert (filled.dtype, filled.shape) == (image.dtype, image.shape)
    before, after = plain(image), plain(filled)
    assert (after[:, ~HOLE] == before[:, ~HOLE]).all()
    colours = {2: 1, 4: 3}.get(before.shape[3], before.shape[3])
    assert (after[:, HOLE, :colours] != before[:, HOLE, :colours]).any(axis=(1, 2)).all()
    assert (after[..., colours:] == before[..., colours:]).all()  # alpha
    assert 0 <= after.min() <= after.max() <= (255 if before.max() > 1 else 1)


def test_every_kind_of_image_is_filled_with_the_same_values(generator, expected):
    for name in ("array of floats", "tensor of floats", "array of doubles"):
        assert np.abs(plain(dpnet.inpaint(KINDS[name], HOLE, generator)) * 255 - expected).max() < 1
    for name in ("tensor 3 H W", "Pillow image RGB"):
        assert (plain(dpnet.inpaint(KINDS[name], HOLE, generator)) == expected).all()
    assert (plain(dpnet.inpaint(KINDS["array N H W 3"], HOLE, generator))[0] == expected).all()
    with_alpha = dpnet.inpaint(KINDS["array H W 4"], HOLE, generator)
    assert (with_alpha[..., :3] == expected).all()


@pytest.mark.parametrize(("mode", "becomes"), [("1", "L"), ("P", "RGB")])
def test_a_pillow_image_of_few_colours_becomes_grey_or_rgb(generator, mode, becomes):
    image = as_pil(mode)
    filled = dpnet.inpaint(image, HOLE, generator)
    assert filled.mode == becomes
    assert (np.asarray(filled)[~HOLE] == np.asarray(image.convert(becomes))[~HOLE]).all()


def test_a_palette_with_transparency_becomes_rgba(generator):
    image = as_pil("P")
    image.info["transparency"] = 3
    assert dpnet.inpaint(image, HOLE, generator).mode == "RGBA"


def test_a_pillow_image_keeps_its_colour_profile(generator):
    image = as_pil("RGB")
    image.info["icc_profile"] = b"profile"
    assert dpnet.inpaint(image, HOLE, generator).info["icc_profile"] == b"profile"


def rgba_mask():
    """Return a mask that is white everywhere, and transparent outside the hole."""
    mask = Image.new("RGBA", (50, 40), (255, 255, 255, 0))
    mask.paste((255, 255, 255, 255), (5, 10, 30, 20))
    return mask


MASKS = {
    "array of booleans": HOLE,
    "array of 0 and 255": np.uint8(255) * HOLE,
    "array of 0 and 1": HOLE.astype(np.uint8),
    "array of integers": HOLE.astype(np.int64),
    "array of floats": HOLE.astype(np.float32),
    "array H W 1": HOLE[..., None],
    "array H W 3": np.repeat(np.uint8(255) * HOLE[..., None], 3, axis=2),
    "array H W 4": np.asarray(rgba_mask()),
    "array N H W": HOLE[None],
    "array N H W 1": HOLE[None, ..., None],
    "tensor H W": torch.from_numpy(HOLE),
    "tensor 1 H W": torch.from_numpy(HOLE)[None].float(),
    "tensor N 1 H W": torch.from_numpy(HOLE)[None, None] * 255,
    "Pillow image L": MASK,
    "Pillow image 1": MASK.convert("1"),
    "Pillow image P": MASK.convert("P"),
    "Pillow image RGB": MASK.convert("RGB"),
    "Pillow image RGBA": rgba_mask(),
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
def test_every_kind_of_mask_is_accepted_without_a_warning(generator, expected, mask):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (dpnet.inpaint(photo(), mask, generator) == expected).all()


def test_a_batch_needs_one_mask_for_all_images_or_one_for_each(generator, expected):
    images, other = np.stack([photo(), photo(seed=2)]), HOLE[::-1].copy()
    both = dpnet.inpaint(images, np.stack([HOLE, other]), generator)
    assert (both[0] == expected).all()
    assert (both[1] == dpnet.inpaint(images[1], other, generator)).all()
    for one in (HOLE, HOLE[None], MASK):
        assert (dpnet.inpaint(images, one, generator)[0] == expected).all()
    tensors = dpnet.inpaint(first(images), torch.from_numpy(np.stack([HOLE, other])), generator)
    assert (plain(tensors) == both).all()


def test_a_list_may_contain_different_sizes_and_kinds(generator, expected):
    images = [photo(), Image.fromarray(photo(30, 35))]
    masks = [MASK, hole(30, 35)]
    filled = dpnet.inpaint(images, masks, generator)
    assert (filled[0] == expected).all()
    assert filled[1].size == (35, 30)
    assert (dpnet.inpaint([photo()] * 2, MASK, generator)[1] == expected).all()
    with pytest.raises(PipelineError, match="3 masks for 2 images"):
        dpnet.inpaint(images, [MASK] * 3, generator)


def test_a_large_image_is_computed_in_tiles_of_the_given_size(generator):
    sizes = []
    handle = generator.register_forward_hook(lambda _m, given, _r: sizes.append(given[0].shape[2:]))
    dpnet.inpaint(photo(100, 130), hole(100, 130), generator, tile=64)
    handle.remove()
    assert max(max(size) for size in sizes) == 64


def test_the_pixels_in_the_hole_have_no_influence(generator):
    image = KINDS["array of floats"]
    expected = dpnet.inpaint(image, HOLE, generator)
    for content in (np.nan, np.inf, -3.0):
        other = np.where(HOLE[..., None], np.float32(content), image)
        assert (dpnet.inpaint(other, HOLE, generator) == expected).all()


def test_an_image_without_a_hole_is_returned_itself(generator):
    image = photo()
    assert dpnet.inpaint(image, np.zeros_like(HOLE), generator) is image


def test_in_a_batch_an_image_without_a_hole_is_unchanged(generator):
    images = np.stack([photo(), photo(seed=2)])
    filled = dpnet.inpaint(images, np.stack([HOLE, np.zeros_like(HOLE)]), generator)
    assert (filled[1] == images[1]).all()


@pytest.mark.parametrize(("white", "half"), [(255, "of 128 and"), (1.0, "of 0.5 and")])
def test_in_a_grey_mask_the_hole_begins_at_half_of_white_and_a_warning_says_so(
    generator, expected, white, half
):
    grey = np.where(HOLE, white, 0.0)
    grey[9:11, 5:8] = 0.49 * white
    grey[10, 5:8] = 0.51 * white
    mask = grey.astype(np.uint8 if white == 255 else np.float32)
    with pytest.warns(UserWarning, match=half) as caught:
        assert (dpnet.inpaint(photo(), mask, generator) == expected).all()
    assert len(caught) == 1
    assert caught[0].filename == __file__


def test_a_mask_that_leaves_little_known_causes_a_warning(generator):
    with pytest.warns(UserWarning, match="invert the mask"):
        dpnet.inpaint(photo(200, 200), ~hole(200, 200), generator)


def floats(**changes):
    image = KINDS["array of floats"].copy()
    for name, value in changes.items():
        image[0, 0, "rgb".index(name)] = value
    return image


BAD_IMAGES = {
    "NaN or infinite": floats(r=np.nan),
    "known pixels that are NaN or infinite": floats(g=np.inf),
    r"values from 0 to 1\.5": floats(r=0, b=1.5),
    "values from -0.25 to": floats(r=-0.25),
    "the image has known values from .* to 255: give .* uint8": photo().astype(np.float32),
    "of type uint16: .*divide 16-bit values by 65535": photo().astype(np.uint16),
    "of type bool": HOLE,
    "of type int64": first(photo()).long(),
    "shape 3 x 40 x 50: give H x W": np.moveaxis(photo(), -1, 0),
    "shape 40 x 50 x 3: give H x W, C x H x W": torch.from_numpy(photo()),
    "shape 40 x 50 x 2": photo()[..., :2],
    "shape 1 x 1 x 40 x 50 x 3": photo()[None, None],
    "shape 0 x 50 x 3": photo()[:0],
    "mode I;16": Image.fromarray(np.zeros((40, 50), np.uint16)),
    "mode CMYK": Image.new("CMYK", (50, 40)),
    "is a str": "photo.png",
}


@pytest.mark.parametrize("message", BAD_IMAGES)
def test_an_image_that_cannot_be_used_is_reported(generator, message):
    with pytest.raises(PipelineError, match=message):
        dpnet.inpaint(BAD_IMAGES[message], HOLE, generator)


BAD_MASKS = {
    "is 50 x 39 pixels but the image is 50 x 40": HOLE[:39],
    "the mask is 49 x 40 pixels": torch.from_numpy(HOLE)[None, :, :49],
    "a batch of 3 masks for 1 images": np.stack([HOLE] * 3)[..., None],
    "shape 40 x 50 x 5": np.stack([HOLE] * 5, axis=-1),
    "values from 0 to 300": np.int64(300) * HOLE,
    "values from -1 to 0": -HOLE.astype(np.int8),
    "values from 0 to 255: give": np.float32(255) * HOLE,
    "values from nan": np.where(HOLE, np.nan, 0),
    "white everywhere": np.ones_like(HOLE),
    "the mask has values of type <U1": HOLE.astype("U1"),
    "the mask is a NoneType": None,
    "mostly grey .* not exchanged": photo(),
    "the mask cannot be used: it is mostly grey": Image.fromarray(photo()),
    "pixels that are not numbers": Image.fromarray(np.full((40, 50), np.nan, np.float32)),
}


@pytest.mark.parametrize("message", BAD_MASKS)
def test_a_mask_that_cannot_be_used_is_reported(generator, message):
    with pytest.raises(PipelineError, match=message):
        dpnet.inpaint(photo(), BAD_MASKS[message], generator)


def test_an_image_of_a_batch_without_known_pixels_is_named(generator):
    with pytest.raises(PipelineError, match=r"number 1 of the batch.* white everywhere"):
        dpnet.inpaint(np.stack([photo()] * 2), np.stack([HOLE, ~HOLE | HOLE]), generator)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Return a root with a real, untrained model registered in it."""
    store = small_root.new_store(tmp_path_factory.mktemp("root"))
    return store.folder, small_root.champion(store)


def test_every_way_of_naming_the_model_gives_the_same_result(root):
    folder, run = root
    references = [None, "models:/dpnet@champion", "models:/dpnet/1", run.folder]
    references += [str(folder / run.folder), f"{(folder / run.folder).as_uri()}/model"]
    made = {dpnet.inpaint(photo(), HOLE, each, root=str(folder)).tobytes() for each in references}
    assert len(made) == 1


def test_a_loaded_model_can_be_used_again(root):
    generator = dpnet.load_model(root=str(root[0]))
    expected = dpnet.inpaint(photo(), HOLE, root=str(root[0]))
    assert (dpnet.inpaint(photo(), HOLE, generator) == expected).all()


def test_without_a_root_dpnet_root_is_used_then_the_packaged_weights(root, monkeypatch, tmp_path):
    monkeypatch.setenv("DPNET_ROOT", str(root[0]))
    dpnet.load_model()
    monkeypatch.delenv("DPNET_ROOT")
    monkeypatch.chdir(tmp_path)
    assert find_model("", None)[2] == PACKAGED
    dpnet.load_model()
    monkeypatch.setattr(packaged, "_FOLDER", tmp_path / "none")
    with pytest.raises(PipelineError, match="dpnet-demo has no champion yet"):
        dpnet.load_model()


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("models:/dpnet/7", "its versions are 1"),
        ("models:/other@champion", "no such model"),
        ("models:/dpnet@staging", "is not a model reference"),
        ("models:/../x/1", "is not a model reference"),
        ("/nowhere/runs/x", "holds no model"),
    ],
)
def test_a_missing_model_is_reported(root, reference, message):
    with pytest.raises(PipelineError, match=message):
        dpnet.load_model(reference, str(root[0]))


def test_an_altered_model_is_refused(root, tmp_path):
    folder, run = root
    store = LocalStore(tmp_path / "copy")
    for path in ("model/generator.safetensors", "model/model.json"):
        store.write(f"run/{path}", (folder / run.folder / path).read_bytes())
    weights = bytearray(store.read("run/model/generator.safetensors"))
    weights[-1] ^= 1
    store.write("run/model/generator.safetensors", bytes(weights))
    with pytest.raises(PipelineError, match="altered"):
        dpnet.load_model(str(tmp_path / "copy" / "run"))


def test_torch_is_not_imported_before_it_is_used():
    code = "import sys, dpnet; before = 'torch' in sys.modules; dpnet.inpaint; print(before)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_an_unknown_name_of_the_package_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'outpaint'"):
        getattr(dpnet, "outpaint")  # noqa: B009
