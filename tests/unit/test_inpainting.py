import numpy as np
import pytest
import small_root
import torch
from PIL import Image
from torch import nn

from data_prep.errors import PipelineError
from data_prep.storage import LocalStore
from dpnet.inpainting import inpaint_arrays, inpaint_files, inpaint_large, inpaint_photograph
from dpnet.register import RegisterSettings, register


class Constant(nn.Module):
    """A stand-in generator that predicts one value and counts the tiles it saw."""

    def __init__(self, value=0.5):
        super().__init__()
        self.value, self.calls = value, 0

    def forward(self, image, valid):
        self.calls += 1
        return torch.full_like(image, self.value)


class Echo(nn.Module):
    """A stand-in generator that gives its input back."""

    def forward(self, image, valid):
        return image


class KnownMean(nn.Module):
    """A stand-in generator whose prediction differs from tile to tile."""

    def forward(self, image, valid):
        return ((image * valid).sum((2, 3), True) / valid.sum((2, 3), True)).expand_as(image)


def picture(height=40, width=50, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def hole_mask(height=40, width=50):
    """A mask file's picture with a white box."""
    mask = np.zeros((height, width), np.uint8)
    mask[10:20, 5:30] = 255
    return Image.fromarray(mask)


def test_known_pixels_stay_bit_for_bit_and_the_hole_is_the_rounded_prediction():
    images = np.stack([picture(), picture(seed=1)])
    valid = np.ones((2, 40, 50), np.uint8)
    valid[:, 5:9, 7:30] = 0
    filled = inpaint_arrays(Constant(0.3), images, valid)
    assert filled.dtype == np.uint8
    assert (filled[valid == 1] == images[valid == 1]).all()
    assert (filled[valid == 0] == round(0.3 * 255)).all()


def test_the_network_sees_values_from_0_to_1_and_1_where_a_pixel_is_known():
    seen = {}

    class Spy(nn.Module):
        def forward(self, image, valid):
            seen.update(image=image, valid=valid)
            return image

    image = picture()[None]
    valid = np.ones((1, 40, 50), np.uint8)
    valid[0, 0, 0] = 0
    inpaint_arrays(Spy(), image, valid)
    assert seen["image"].shape == (1, 3, 40, 50)
    assert torch.equal(
        (seen["image"] * 255).round().byte()[0, :, 3, 4], torch.tensor(image[0, 3, 4])
    )
    assert seen["valid"].shape == (1, 1, 40, 50)
    assert seen["valid"][0, 0, 0, 0] == 0
    assert seen["valid"].sum() == 40 * 50 - 1


def test_a_model_that_predicts_nan_is_refused():
    valid = np.zeros((1, 40, 50), np.uint8)
    with pytest.raises(PipelineError, match="not finite"):
        inpaint_arrays(Constant(float("nan")), picture()[None], valid)


def test_tiles_add_up_to_what_the_network_predicts():
    image, valid = picture(150, 210), np.zeros((150, 210), np.uint8)
    valid[0, ::7] = 1
    assert (inpaint_large(Echo(), image, valid, tile=64) == image).all()


def test_only_tiles_with_a_hole_are_run():
    image, valid = picture(300, 300), np.ones((300, 300), np.uint8)
    valid[5:8, 5:8] = 0
    generator = Constant()
    inpaint_large(generator, image, valid, tile=64)
    assert generator.calls == 1


def test_no_tile_is_larger_than_asked_for():
    sizes = []

    class Spy(nn.Module):
        def forward(self, image, valid):
            sizes.append(tuple(image.shape[2:]))
            return image

    valid = np.zeros((200, 100), np.uint8)
    valid[::9] = 1
    inpaint_large(Spy(), picture(200, 100), valid, tile=80)
    assert set(sizes) == {(80, 80)}


def test_neighbouring_tiles_fade_into_each_other():
    # Brightness grows from left to right, so each tile's prediction is another one.
    image = np.repeat(np.linspace(0, 255, 256).astype(np.uint8)[None, :, None], 64, 0).repeat(3, 2)
    valid = np.ones((64, 256), np.uint8)
    valid[20:40, 8:-8] = 0
    filled = inpaint_large(KnownMean(), image, valid, tile=64)
    row = filled[30, 8:-8, 0].astype(int)
    assert row[-1] - row[0] > 100
    assert np.abs(np.diff(row)).max() <= 4  # a seam would be a jump of about 40


def test_a_hole_that_fills_a_whole_tile_is_told(capsys):
    valid = np.ones((200, 200), np.uint8)
    valid[20:180, 20:180] = 0
    inpaint_large(Constant(), picture(200, 200), valid, tile=64)
    assert "larger --tile" in capsys.readouterr().err


def test_the_real_network_takes_a_picture_of_any_size():
    from dpnet.model import build_generator

    photo = Image.fromarray(picture(37, 53))
    mask = Image.new("L", (53, 37))
    mask.paste(255, (10, 10, 30, 25))
    filled = inpaint_photograph(build_generator("tiny").eval(), photo, mask)
    assert filled.size == (53, 37)
    known = np.asarray(mask) == 0
    assert (np.asarray(filled)[known] == np.asarray(photo)[known]).all()


def test_a_grey_photograph_stays_grey():
    photo = Image.fromarray(picture()[..., 0])
    filled = inpaint_photograph(Constant(), photo, hole_mask())
    assert filled.mode == "L"
    known = np.asarray(hole_mask()) == 0
    assert (np.asarray(filled)[known] == np.asarray(photo)[known]).all()
    assert (np.asarray(filled)[~known] == 128).all()


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_an_alpha_channel_and_the_colours_under_it_are_kept(mode):
    alpha = Image.fromarray(picture(seed=3)[..., 0])
    photo = Image.fromarray(picture()).convert(mode)
    photo.putalpha(alpha)
    filled = inpaint_photograph(Constant(), photo, hole_mask())
    assert filled.mode == mode
    assert filled.getchannel("A").tobytes() == alpha.tobytes()
    known = np.asarray(hole_mask()) == 0
    assert (np.asarray(filled)[known] == np.asarray(photo)[known]).all()


def test_a_palette_picture_becomes_rgb():
    photo = Image.fromarray(picture()).convert("P")
    filled = inpaint_photograph(Constant(), photo, hole_mask())
    assert filled.mode == "RGB"
    known = np.asarray(hole_mask()) == 0
    assert (np.asarray(filled)[known] == np.asarray(photo.convert("RGB"))[known]).all()


def test_white_is_the_hole_from_128_up_and_a_grey_mask_is_told(capsys):
    mask = np.zeros((40, 50), np.uint8)
    mask[0, 0], mask[0, 1] = 127, 128
    filled = np.asarray(
        inpaint_photograph(Constant(0), Image.fromarray(picture()), Image.fromarray(mask))
    )
    assert (filled[0, 0] == picture()[0, 0]).all()
    assert (filled[0, 1] == 0).all()
    assert "not pure black and white" in capsys.readouterr().err


def test_a_black_and_white_mask_is_taken_without_a_word(capsys):
    inpaint_photograph(Constant(), Image.fromarray(picture()), hole_mask().convert("1"))
    assert "mask" not in capsys.readouterr().err


def test_white_paint_on_a_transparent_mask_is_the_hole():
    mask = Image.new("RGBA", (50, 40), (255, 255, 255, 0))
    mask.paste((255, 255, 255, 255), (5, 5, 10, 10))
    filled = np.asarray(inpaint_photograph(Constant(0), Image.fromarray(picture()), mask))
    assert (filled[5:10, 5:10] == 0).all()
    assert (filled[20:] == picture()[20:]).all()


def test_a_mask_of_another_size_is_refused_with_both_sizes():
    with pytest.raises(PipelineError, match=r"50 x 40 pixels .* 50 x 39"):
        inpaint_photograph(Constant(), Image.fromarray(picture(39)), hole_mask())


def test_a_mask_without_a_hole_gives_the_picture_back(capsys):
    photo = Image.fromarray(picture())
    filled = inpaint_photograph(Constant(), photo, Image.new("L", (50, 40)))
    assert filled.tobytes() == photo.tobytes()
    assert "no hole" in capsys.readouterr().err


def test_a_mask_that_is_all_hole_is_refused():
    with pytest.raises(PipelineError, match="white everywhere"):
        inpaint_photograph(Constant(), Image.fromarray(picture()), Image.new("L", (50, 40), 255))


def test_a_mask_that_leaves_little_known_is_warned_about(capsys):
    mask = Image.new("L", (50, 40), 255)
    mask.paste(0, (0, 0, 5, 5))
    inpaint_photograph(Constant(), Image.fromarray(picture()), mask)
    assert "invert the mask" in capsys.readouterr().err


def test_a_picture_with_16_bits_is_refused():
    photo = Image.fromarray(np.zeros((40, 50), np.uint16))
    with pytest.raises(PipelineError, match="8-bit"):
        inpaint_photograph(Constant(), photo, hole_mask())


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A root with a real, untrained model registered in it."""
    store = small_root.new_store(tmp_path_factory.mktemp("root"))
    nothing = small_root.commit(store, "images", "images/x", {"a": b"a"})
    run = small_root.trained(store, images=nothing, masks=nothing)
    summary = {"hole_psnr": 20.0, "pairs_digest": "p" * 64, "figures": {}}
    evaluation = small_root.commit(
        store,
        "evaluate",
        "evaluations",
        {"report.json": b"{}"},
        inputs={"run": run},
        summary=summary,
    )
    register(RegisterSettings(), run, evaluation, store)
    return store.folder, run


@pytest.fixture
def files(tmp_path):
    Image.fromarray(picture()).save(tmp_path / "photo.png")
    hole_mask().save(tmp_path / "mask.png")
    return tmp_path


def fill(files, root, out="out.png", image="photo.png", mask="mask.png", **options):
    return inpaint_files(files / image, files / mask, files / out, root=str(root), **options)


def test_files_are_filled_with_the_champion_of_the_root(files, root):
    result = fill(files, root[0], "new/folder/out.png")
    filled = np.asarray(Image.open(files / "new/folder/out.png"))
    known = np.asarray(hole_mask()) == 0
    assert (filled[known] == picture()[known]).all()
    assert result["model"] == "dpnet version 1"
    assert (result["width"], result["height"]) == (50, 40)


def test_every_way_of_naming_the_model_gives_the_same_picture(files, root):
    folder, run = root
    references = ["", "models:/dpnet@champion", "models:/dpnet/1", run.folder]
    references += [str(folder / run.folder), f"{(folder / run.folder).as_uri()}/model"]
    made = set()
    for reference in references:
        fill(files, folder, model=reference)
        made.add((files / "out.png").read_bytes())
    assert len(made) == 1


def test_a_root_without_a_champion_is_told(files, tmp_path):
    with pytest.raises(PipelineError, match="no champion yet"):
        fill(files, tmp_path / "empty")


@pytest.mark.parametrize(
    ("reference", "told"),
    [
        ("models:/dpnet/7", "its versions are 1"),
        ("models:/other@champion", "no such model"),
        ("models:/dpnet@staging", "no model reference"),
        ("models:/../x/1", "no model reference"),
        ("/nowhere/runs/x", "holds no model"),
    ],
)
def test_a_model_that_is_not_there_is_told(files, root, reference, told):
    with pytest.raises(PipelineError, match=told):
        fill(files, root[0], model=reference)


def test_a_missing_file_is_told(files, root):
    with pytest.raises(PipelineError, match=r"gone\.png does not exist"):
        fill(files, root[0], image="gone.png")


def test_a_file_that_is_no_picture_is_told(files, root):
    (files / "text.png").write_text("not a picture")
    with pytest.raises(PipelineError, match=r"text\.png is not a picture that can be read"):
        fill(files, root[0], mask="text.png")


def test_a_picture_that_is_cut_short_is_told(files, root):
    (files / "half.png").write_bytes((files / "photo.png").read_bytes()[:2000])
    with pytest.raises(PipelineError, match=r"half\.png is not a picture that can be read"):
        fill(files, root[0], image="half.png")


def test_an_unknown_extension_is_told_before_any_work(files, root):
    with pytest.raises(PipelineError, match=r"\.png, \.webp"):
        fill(files, root[0], out="out.docx")


def test_alpha_is_not_dropped_silently_into_a_jpeg(files, root):
    Image.new("RGBA", (50, 40)).save(files / "clear.png")
    with pytest.raises(PipelineError, match="alpha channel"):
        fill(files, root[0], image="clear.png", out="out.jpg")


def test_a_place_that_cannot_be_written_is_told(files, root):
    (files / "file").write_text("")
    with pytest.raises(PipelineError, match="cannot write"):
        fill(files, root[0], out="file/out.png")


@pytest.mark.parametrize("extension", ["webp", "tif", "jpg"])
def test_other_formats_are_written_and_lossless_ones_keep_known_pixels(files, root, extension):
    fill(files, root[0], out=f"out.{extension}")
    filled = np.asarray(Image.open(files / f"out.{extension}"))
    assert filled.shape == (40, 50, 3)
    known = np.asarray(hole_mask()) == 0
    assert (filled[known] == picture()[known]).all() or extension == "jpg"


def test_a_photograph_lying_on_its_side_is_turned_upright_first(files, root):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(picture(50, 40)).save(files / "turned.png", exif=exif)
    fill(files, root[0], image="turned.png")
    upright = np.rot90(picture(50, 40), -1)
    known = np.asarray(hole_mask()) == 0
    assert (np.asarray(Image.open(files / "out.png"))[known] == upright[known]).all()


def test_an_altered_model_is_refused(files, root, tmp_path):
    folder, run = root
    store = LocalStore(tmp_path / "copy")
    for path in ("model/generator.safetensors", "model/model.json"):
        store.write(f"run/{path}", (folder / run.folder / path).read_bytes())
    weights = bytearray(store.read("run/model/generator.safetensors"))
    weights[-1] ^= 1
    store.write("run/model/generator.safetensors", bytes(weights))
    with pytest.raises(PipelineError, match="altered"):
        fill(files, folder, model=str(tmp_path / "copy" / "run"))
