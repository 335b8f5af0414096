"""`dpnet inpaint`: which files it uses, what it writes, and what it reports."""

import json
import os
import struct

import numpy as np
import other_formats
import photo_files
import pytest
import small_root
from PIL import Image

from data_prep.pictures.decoding import decode_rgb
from data_prep.pictures.formats import EXTENSIONS, UNREADABLE
from data_prep.pictures.limits import Limits
from dpnet.cli import main as cli
from dpnet.inpainting import files as inpaint_files
from dpnet.inpainting.files import plan_jobs


def photo(height=40, width=50, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def hole_mask(height=40, width=50):
    """Return a mask with a white box."""
    mask = np.zeros((height, width), np.uint8)
    mask[10:20, 5:30] = 255
    return Image.fromarray(mask)


KNOWN = np.asarray(hole_mask()) == 0


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Return a root with a real, untrained champion."""
    store = small_root.new_store(tmp_path_factory.mktemp("root"))
    small_root.champion(store)
    return store.folder


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Enter a folder with a photo and a mask."""
    monkeypatch.chdir(tmp_path)
    Image.fromarray(photo()).save("photo.png")
    hole_mask().save("mask.png")
    return tmp_path


@pytest.fixture
def folders(files):
    """Add three photos, and masks for them with both kinds of names."""
    for name in ("photos", "masks"):
        (files / name).mkdir()
    for number, name in enumerate(("a.jpg", "b.png", "c.webp")):
        Image.fromarray(photo(seed=number)).save(files / "photos" / name)
    for name in ("a.png", "b_mask.png", "c_mask001.png"):
        hole_mask().save(files / "masks" / name)
    return files


@pytest.fixture
def run(root, capsys):
    """Return a function that runs `dpnet inpaint`: exit status, result and standard error."""

    def run(*words):
        status = cli.main(["inpaint", *words, "--json", "--root", str(root)])
        out, err = capsys.readouterr()
        return status, json.loads(out), err

    return run


def opened(path):
    return np.asarray(Image.open(path))


def test_a_file_is_filled_with_the_champion_of_the_root(files, run):
    status, result, _ = run("photo.png", "mask.png", "-o", "new/folder/out.png")
    assert status == 0
    filled = opened("new/folder/out.png")
    assert (filled[KNOWN] == photo()[KNOWN]).all()
    assert (filled[~KNOWN] != photo()[~KNOWN]).any()
    assert result["model"] == "dpnet version 1"
    (done,) = result["pictures"]
    assert (done["width"], done["height"], done["filled"]) == (50, 40, True)


def test_the_start_is_logged_before_the_model_is_loaded(folders, run, monkeypatch):
    def load(*_):
        raise inpaint_files.PipelineError("it was not loaded.")

    monkeypatch.setattr(inpaint_files, "load_generator", load)
    _, found, err = run("photos", "masks", "-o", "filled")
    assert found["error"] == "it was not loaded."
    assert "inpaint: loads dpnet version 1 to fill 3 images\n" in err


def test_a_file_goes_into_a_folder_under_its_own_name(files, run):
    (files / "out").mkdir()
    assert run("photo.png", "mask.png", "-o", "out")[0] == 0
    assert opened("out/photo.png").shape == (40, 50, 3)


def test_without_json_one_line_sums_up_the_result(files, root, capsys):
    assert cli.main(["inpaint", "photo.png", "mask.png", "-o", "o.png", "--root", str(root)]) == 0
    assert capsys.readouterr().out.startswith("o.png: 50 x 40, filled with dpnet version 1 in ")


@pytest.mark.parametrize(
    ("image", "mask"), [("photos", "masks"), ("photos/*", "masks/*.png"), ("photos/", "mask.png")]
)
def test_results_of_folders_and_globs_have_the_names_of_the_photos(folders, run, image, mask):
    status, result, err = run(image, mask, "-o", "out")
    assert (status, result["failed"]) == (0, [])
    assert [p["out"] for p in result["pictures"]] == ["out/a.png", "out/b.png", "out/c.png"]
    for name, filled in zip(("a.jpg", "b.png", "c.webp"), "abc", strict=True):
        before, after = opened(f"photos/{name}"), opened(f"out/{filled}.png")
        assert (after[KNOWN] == before[KNOWN]).all()
        assert (after[~KNOWN] != before[~KNOWN]).any()
    assert "3/3 images" in err


def test_the_model_is_loaded_only_once_for_several_photos(folders, run, monkeypatch):
    real, calls = inpaint_files.load_generator, []
    monkeypatch.setattr(
        inpaint_files, "load_generator", lambda *given: (calls.append(given), real(*given))[1]
    )
    assert len(run("photos", "masks", "-o", "out")[1]["pictures"]) == 3
    assert len(calls) == 1


def test_one_bad_file_does_not_stop_the_others(folders, run):
    (folders / "photos/b.png").write_text("not an image")
    (folders / "masks/c_mask001.png").unlink()
    status, result, err = run("photos", "masks", "-o", "out")
    assert (status, result["ok"]) == (1, False)
    assert [p["out"] for p in result["pictures"]] == ["out/a.png"]
    unreadable, maskless = result["failed"]
    assert "b.png cannot be decoded" in unreadable["error"]
    assert "c.webp has no mask in masks: name it c.png or c_mask.png" in maskless["error"]
    assert unreadable["error"] in err
    assert sorted(p.name for p in (folders / "out").iterdir()) == ["a.png"]


def test_without_json_the_failed_files_are_listed(folders, root, capsys):
    (folders / "photos/b.png").write_text("not an image")
    words = ["inpaint", "photos", "masks", "-o", "out", "--root", str(root)]
    assert cli.main(words) == 1
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("out: 2 of 3 images written, 2 of them filled with dpnet version 1 in ")
    assert second.startswith("failed: photos/b.png cannot be decoded")


def test_existing_results_are_overwritten(folders, run):
    (folders / "out").mkdir()
    (folders / "out/a.png").write_text("old")
    assert run("photos", "masks", "-o", "out")[0] == 0
    assert opened("out/a.png").shape == (40, 50, 3)


def names(jobs):
    return [
        (job.image.name, job.mask if isinstance(job.mask, str) else job.mask.name) for job in jobs
    ]


def test_a_mask_of_the_same_name_is_preferred_to_one_with_an_ending(folders):
    hole_mask().save(folders / "masks/a_mask.png")
    assert names(plan_jobs("photos", "masks", "out").jobs)[0] == ("a.jpg", "a.png")


def test_an_image_with_several_masks_is_reported(folders):
    hole_mask().save(folders / "masks/c_mask002.png")
    (*_, (_, message)) = names(plan_jobs("photos", "masks", "out").jobs)
    assert "has 2 masks in masks (c_mask001.png, c_mask002.png): keep only one" in message


def test_images_and_masks_may_be_in_one_folder(folders):
    for mask in (folders / "masks").iterdir():
        mask.rename(folders / "photos" / mask.name.replace("a.png", "a_mask.png"))
    expected = [("a.jpg", "a_mask.png"), ("b.png", "b_mask.png"), ("c.webp", "c_mask001.png")]
    assert names(plan_jobs("photos", "photos", "out").jobs) == expected
    assert names(plan_jobs("photos/*", "photos/*_mask*.png", "out").jobs) == expected


def test_a_folder_means_the_image_files_directly_in_it(folders):
    (folders / "photos/notes.txt").write_text("")
    (folders / "photos/more.png").mkdir()
    assert len(plan_jobs("photos", "mask.png", "out").jobs) == 3


def test_a_folder_means_every_format_that_the_product_reads(folders, run):
    for extension, format in (("avif", "AVIF"), ("jfif", "JPEG"), ("jpe", "JPEG"), ("jp2", None)):
        Image.fromarray(photo()).save(folders / "photos" / f"in-{extension}.{extension}", format)
    Image.fromarray(photo()).save(folders / "photos/in-ppm.PPM")
    Image.fromarray(photo()).save(folders / "photos/without-extension", "PNG")
    status, result, _ = run("photos", "mask.png", "-o", "out")
    assert status == 0
    assert {each["image"] for each in result["pictures"]} == {
        f"photos/{path.name}" for path in (folders / "photos").iterdir()
    }
    assert result["left_out"] == []


def test_every_extension_of_the_product_is_an_image_of_a_folder(files):
    (files / "many").mkdir()
    for extension in EXTENSIONS | UNREADABLE:
        (files / "many" / f"{extension}.{extension.upper()}").write_bytes(b"")
    jobs, left_out = plan_jobs("many", "mask.png", "out")
    assert {job.image.stem for job in jobs} == EXTENSIONS | UNREADABLE
    assert left_out == []


def test_what_a_folder_holds_beside_images_is_named(folders, run):
    (folders / "photos/notes.txt").write_text("")
    (folders / "photos/.hidden.png").write_bytes(b"")
    (folders / "photos/more").mkdir()
    (folders / "masks/README").write_text("")
    status, result, err = run("photos", "masks", "-o", "photos/out")
    assert status == 0
    for where in (".hidden.png", "notes.txt", "more"):
        assert f"photos/{where}" in result["left_out"]
        assert f"photos/{where}" in err
    assert "masks/README" in result["left_out"]
    again = run("photos", "masks", "-o", "photos/out")
    assert again[1]["left_out"] == result["left_out"]  # the results are not named


def test_a_photo_in_a_format_that_cannot_be_read_fails_with_its_name(folders, run):
    for name in ("IMG_1.HEIC", "IMG_2"):
        (folders / "photos" / name).write_bytes(b"\0\0\0\x18ftypheic" + bytes(60))
    status, result, _ = run("photos", "mask.png", "-o", "out")
    assert (status, len(result["pictures"])) == (1, 3)
    assert [each["image"] for each in result["failed"]] == ["photos/IMG_1.HEIC", "photos/IMG_2"]


@pytest.mark.parametrize(
    ("image", "mask"),
    [
        ("caf\u00e9.jpg", "cafe\u0301.png"),
        ("cafe\u0301.jpg", "caf\u00e9_mask01.png"),
        ("IMG_1.JPG", "img_1.png"),
        ("IMG_1.JPG", "img_1_MASK.PNG"),
        ("STRASSE.jpg", "stra\u00dfe.png"),
        ("\u00c9T\u00c9.jpg", "e\u0301te\u0301.png"),
    ],
)
def test_photo_and_mask_meet_in_another_case_and_form_of_unicode(files, image, mask):
    for folder, name in (("one", image), ("two", mask)):
        (files / folder).mkdir()
        (files / folder / name).write_bytes(b"")
    assert names(plan_jobs("one", "two", "out").jobs) == [(image, mask)]


def test_the_closest_name_of_a_mask_is_used(files):
    for folder, some in (("one", ["A.jpg", "a.jpg"]), ("two", ["a.png", "A_mask.png"])):
        (files / folder).mkdir()
        for name in some:
            (files / folder / name).write_bytes(b"")
    expected = [("A.jpg", "A_mask.png"), ("a.jpg", "a.png")]
    assert names(plan_jobs("one", "two", "out").jobs) == expected


def test_an_existing_file_with_glob_signs_in_its_name_is_a_file(files):
    (files / "photo.png").rename(files / "ph[ot]o.png")
    (job,) = plan_jobs("ph[ot]o.png", "mask.png", "out.png").jobs
    assert job.out.name == "out.png"


def test_two_results_with_the_same_file_are_refused_before_any_work(folders, run):
    Image.fromarray(photo()).save(folders / "photos/a.png")
    status, result, _ = run("photos", "mask.png", "-o", "out")
    assert status == 2
    assert "a.jpg and photos/a.png would both be written to out/a.png" in result["error"]
    assert not (folders / "out").exists()


@pytest.mark.parametrize(
    "words",
    [
        ("photo.png", "mask.png", "-o", "photo.png"),
        ("photo.png", "mask.png", "-o", "../{here}/mask.png"),
        ("photos", "masks", "-o", "photos"),
        ("photos", "masks", "-o", "masks"),
    ],
)
def test_no_image_or_mask_is_overwritten(folders, run, words):
    before = {path: path.read_bytes() for path in folders.rglob("*.*")}
    status, result, _ = run(*(word.format(here=folders.name) for word in words))
    assert status == 2
    assert "would be overwritten" in result["error"]
    assert {path: path.read_bytes() for path in folders.rglob("*.*")} == before


def test_several_images_need_a_folder(folders, run):
    status, result, _ = run("photos", "masks", "-o", "mask.png")
    assert (status, "give a folder (-o) for several images" in result["error"]) == (2, True)


@pytest.mark.parametrize("where", ["empty", "photos/*.gif"])
def test_a_folder_or_glob_without_images_is_reported(folders, run, where):
    (folders / "empty").mkdir()
    for words in ((where, "mask.png"), ("photos", where)):
        status, result, _ = run(*words, "-o", "out")
        assert (status, f"{where} contains no image" in result["error"]) == (2, True)


@pytest.mark.parametrize("name", ["valid", "known_03", "photo-inverted", "KEEP", "a.keep"])
def test_a_mask_with_a_name_that_suggests_white_is_known_is_reported_once(files, caplog, name):
    (files / "mask.png").rename(files / f"{name}.png")
    plan_jobs("photo.png", f"{name}.png", "out.png")
    assert caplog.text.count("the name suggests that white is known") == 1


@pytest.mark.parametrize("name", ["validation", "unknown", "invalid", "keeper", "mask"])
def test_other_names_of_masks_are_not_reported(files, caplog, name):
    plan_jobs("photo.png", f"{name}.png", "out.png")
    assert caplog.text == ""


def test_a_missing_file_is_reported(files, run):
    status, result, _ = run("gone.png", "mask.png", "-o", "out.png")
    assert (status, result["error"]) == (2, "gone.png does not exist: check the path.")


def test_a_file_that_is_not_an_image_is_reported(files, run):
    (files / "text.png").write_text("not an image")
    _, result, _ = run("photo.png", "text.png", "-o", "out.png")
    assert "text.png cannot be decoded" in result["error"]


def test_other_formats_that_pillow_knows_are_refused_and_start_no_program(
    files, run, tmp_path, monkeypatch
):
    started = other_formats.trap_ghostscript(tmp_path / "bin", monkeypatch)
    names = other_formats.write_all(files / "formats")
    status, result, _ = run("formats", "mask.png", "-o", "out")
    assert status == 1
    assert [each["error"].partition(". ")[0] for each in result["failed"]] == [
        f"formats/{name} cannot be decoded: {other_formats.REASON}" for name in sorted(names)
    ]
    _, result, _ = run("photo.png", "formats/EPS.png", "-o", "out.png")
    assert other_formats.REASON in result["error"]
    assert not started.exists()


def test_a_bomb_is_refused_from_its_header(files, run):
    (files / "bomb.png").write_bytes(photo_files.bomb(100_000, 100_000))
    sentence = "bomb.png is too large: it has 100000x100000 pixels, the limit is 178000000."
    for words in (("bomb.png", "mask.png"), ("photo.png", "bomb.png")):
        status, result, _ = run(*words, "-o", "out.png")
        assert (status, result["error"]) == (1, f"{sentence} Give a smaller image.")


def test_a_pipe_and_a_device_are_refused(files, run):
    os.mkfifo(files / "pipe.png")
    for name in ("pipe.png", "/dev/zero"):
        _, result, _ = run(name, "mask.png", "-o", "out.png")
        assert result["error"] == f"{name} cannot be read: it is not a file. Check the path."


def test_a_truncated_image_is_reported(files, run):
    (files / "half.png").write_bytes((files / "photo.png").read_bytes()[:2000])
    _, result, _ = run("half.png", "mask.png", "-o", "out.png")
    assert "half.png cannot be decoded" in result["error"]


def test_a_mask_of_another_size_is_reported_with_its_name(files, run):
    hole_mask(39).save("small.png")
    _, result, _ = run("photo.png", "small.png", "-o", "out.png")
    assert "small.png is 50 x 39 pixels but the image is 50 x 40" in result["error"]


def test_each_image_that_the_mask_does_not_fit_is_named(folders, run):
    hole_mask(39).save("small.png")
    status, result, err = run("photos", "small.png", "-o", "out")
    assert status == 1
    assert result["failed"][0]["error"].startswith("photos/a.jpg: small.png is 50 x 39 pixels")
    assert "photos/b.png: small.png is" in err


def test_a_mask_without_a_hole_is_reported_and_leaves_the_image_unchanged(files, run):
    Image.new("L", (50, 40)).save("black.png")
    status, result, err = run("photo.png", "black.png", "-o", "out.png")
    assert (status, result["pictures"][0]["filled"]) == (0, False)
    assert (opened("out.png") == photo()).all()
    assert "black.png has no hole" in err


def test_a_grey_mask_is_reported_with_its_name(files, run):
    grey = np.where(KNOWN, 0, 200).astype(np.uint8)
    Image.fromarray(grey).save("grey.png")
    _, _, err = run("photo.png", "grey.png", "-o", "out.png")
    assert "grey.png is not pure black and white" in err
    assert "pixels of 128 and more are the hole" in err


def test_exchanged_arguments_are_refused(files, run):
    status, result, _ = run("mask.png", "photo.png", "-o", "out.png")
    assert status == 1
    assert "photo.png cannot be used: it is mostly grey" in result["error"]
    assert "not exchanged" in result["error"]


def test_an_unknown_extension_is_reported_before_any_work(files, run):
    _, result, _ = run("photo.png", "mask.png", "-o", "out.docx")
    assert ".png, .webp" in result["error"]


def test_a_tile_that_is_too_small_is_reported(files, run):
    _, result, _ = run("photo.png", "mask.png", "-o", "out.png", "--tile", "63")
    assert "at least 64" in result["error"]


def test_a_jpeg_is_not_written_without_the_alpha_channel(files, run):
    Image.new("RGBA", (50, 40)).save("clear.png")
    _, result, _ = run("clear.png", "mask.png", "-o", "out.jpg")
    assert "alpha channel" in result["error"]


def test_a_path_that_cannot_be_written_is_reported(files, run):
    (files / "file").write_text("")
    _, result, _ = run("photo.png", "mask.png", "-o", "file/out.png")
    assert "cannot write" in result["error"]


@pytest.mark.parametrize("extension", ["webp", "tif", "jpg"])
def test_other_formats_are_written_and_lossless_ones_keep_known_pixels(files, run, extension):
    _, _, err = run("photo.png", "mask.png", "-o", f"out.{extension}")
    filled = opened(f"out.{extension}")
    assert filled.shape == (40, 50, 3)
    assert (filled[KNOWN] == photo()[KNOWN]).all() == (extension != "jpg")
    assert ("lossy" in err) == (extension == "jpg")


def test_a_photo_is_first_turned_upright(files, run):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(photo(50, 40)).save("turned.png", exif=exif)
    run("turned.png", "mask.png", "-o", "out.png")
    upright = np.rot90(photo(50, 40), -1)
    assert (opened("out.png")[KNOWN] == upright[KNOWN]).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_turned_like_the_photos_of_a_build(files, run, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = photo_files.file(photo(40, 50), "PNG", exif=exif)
    (files / "turned.png").write_bytes(data)
    upright = decode_rgb(data, Limits(10_000)).rgb
    Image.new("L", (upright.shape[1], upright.shape[0])).save("black.png")
    run("turned.png", "black.png", "-o", "out.png")
    assert (opened("out.png") == upright).all()
    assert "exif" not in Image.open("out.png").info  # it would turn the result again


def odd_photos(folder):
    """Write photos that made Pillow raise errors of many kinds; return the names of sound ones."""
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x9999] = "x"  # a tag that Pillow reads and cannot write again
    odd = exif.tobytes().replace(b"\x99\x99\x02\0", b"\x99\x99\xff\0")
    Image.fromarray(photo(50, 40)).save(folder / "odd-tags.jpg", exif=odd)
    Image.fromarray(photo(50, 40)).save(folder / "broken-tags.jpg", exif=b"Exif\0\0MM\0*\xff\xff")
    avif = photo_files.file(photo(), "AVIF")
    (folder / "damaged.avif").write_bytes(avif[:60] + bytes(30) + avif[90:])
    (folder / "short.avif").write_bytes(avif[:-40])
    (folder / "texture.png").write_bytes(other_formats.FILES["DDS"])
    Image.fromarray(photo()).convert("CMYK").save(folder / "ink.jpg")
    Image.fromarray(photo()).convert("LAB").save(folder / "lab.tif")
    Image.fromarray(photo()[..., 0].astype(np.float32)).save(folder / "float.tif")


def test_no_odd_photo_ends_the_work_on_a_folder(folders, run):
    odd_photos(folders / "photos")
    count = len(list((folders / "photos").iterdir()))
    status, result, err = run("photos", "mask.png", "-o", "out")
    assert status == 1
    assert {"a.jpg", "b.png", "c.webp"} <= {
        each["image"].partition("/")[2] for each in result["pictures"]
    }
    assert len(result["pictures"]) + len(result["failed"]) == count
    assert "internal error" not in err
    assert all("photos/" in each["error"] for each in result["failed"])


@pytest.mark.parametrize("error", [SystemError("x"), struct.error("y"), MemoryError(), KeyError(3)])
def test_any_error_of_one_photo_is_that_photos_failure(folders, run, monkeypatch, error):
    original = inpaint_files.fill_image

    def fails_for_b(generator, image, mask, tile, name, *rest, **options):
        if name.endswith("b.png"):
            raise error
        return original(generator, image, mask, tile, name, *rest, **options)

    monkeypatch.setattr(inpaint_files, "fill_image", fails_for_b)
    status, result, err = run("photos", "mask.png", "-o", "out")
    assert (status, len(result["pictures"])) == (1, 2)
    (failed,) = result["failed"]
    assert failed["image"] == "photos/b.png"
    assert f"cannot be filled ({type(error).__name__}" in failed["error"]
    status, result, err = run("photos/b.png", "mask.png", "-o", "out.png")
    assert (status, "photos/b.png cannot be filled" in result["error"]) == (1, True)
    assert "internal error" not in err


def test_a_colour_profile_is_kept(files, run):
    Image.fromarray(photo()).save("profiled.png", icc_profile=b"a profile")
    run("profiled.png", "mask.png", "-o", "out.png")
    assert Image.open("out.png").info["icc_profile"] == b"a profile"


def test_a_recursive_glob_uses_only_files(folders):
    (folders / "photos/deep").mkdir()
    (folders / "photos/a.jpg").rename(folders / "photos/deep/a.jpg")
    jobs = plan_jobs("photos/**", "masks", "out").jobs
    assert [name for name, _ in names(jobs)] == ["b.png", "c.webp", "a.jpg"]
