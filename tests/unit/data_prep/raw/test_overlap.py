"""A source and a root that overlap are refused before shards are read as photos."""

from __future__ import annotations

from pathlib import Path

import pytest
from image_sets import crops, photographs

from data_prep.core.errors import ConfigError
from data_prep.core.storage.local import LocalStore
from data_prep.core.storage.open import open_store
from data_prep.images.next_version import look
from data_prep.images.stage import prepare_images
from data_prep.masks.settings import MasksSettings
from data_prep.masks.stage import prepare_masks
from data_prep.raw.overlap import check_apart
from dpnet.pipeline.chain import check_config
from dpnet.pipeline.config import load_config

S3 = "s3://bucket/photos"


@pytest.mark.parametrize("make", [True, False])
@pytest.mark.parametrize(
    ("source", "root"),
    [
        ("photos", "photos"),
        ("photos", "photos/dpnet"),
        ("photos", "photos/a/../b/dpnet/"),
        ("link", "photos/dpnet"),
        ("photos", "link/dpnet"),
        ("link", "photos"),
        (S3, S3),
        (S3, f"{S3}/a/root"),
        (f"{S3}/", f"{S3}/root/"),
        ("s3://bucket", f"{S3}/root"),
    ],
)
def test_a_source_that_contains_the_root_is_refused(
    tmp_path: Path, source: str, root: str, make: bool
) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "link").symlink_to("photos")
    source, root = (a if "://" in a else f"{tmp_path}/{a}" for a in (source, root))
    if make and "://" not in root:
        Path(root).mkdir(parents=True, exist_ok=True)
    with pytest.raises(ConfigError, match=r"contains the root .* Choose a root outside"):
        check_apart(source, root)


@pytest.mark.parametrize(
    ("source", "root"),
    [
        ("root/images", "root"),
        ("root/images/mine", "root"),
        ("link/images/mine", "root"),
        ("root/masks/x/train-000000.tar", "link"),
        ("mine", "root"),
        (f"{S3}/runs/a", S3),
        ("s3://bucket/images", "s3://bucket"),
    ],
)
def test_a_source_in_a_folder_that_the_root_fills_is_refused(
    tmp_path: Path, source: str, root: str
) -> None:
    (tmp_path / "root/images/mine").mkdir(parents=True)
    (tmp_path / "link").symlink_to("root")
    (tmp_path / "mine").symlink_to("root/images/mine")
    source, root = (a if "://" in a else f"{tmp_path}/{a}" for a in (source, root))
    with pytest.raises(ConfigError, match=r"a folder that the root .* fills itself"):
        check_apart(source, root)


@pytest.mark.parametrize(
    ("source", "root"),
    [
        ("root/photos", "root"),  # as in the demo
        ("root2", "root"),
        ("roo", "root"),
        ("images", "root"),
        (S3, "root"),
        ("root", S3),
        (f"{S3}2", S3),
        (S3, f"{S3}2"),
        (f"{S3}/mine", S3),
        ("s3://other/photos", S3),
    ],
)
def test_a_source_next_to_the_root_is_accepted(tmp_path: Path, source: str, root: str) -> None:
    source, root = (a if "://" in a else f"{tmp_path}/{a}" for a in (source, root))
    for place in (source, root):
        if "://" not in place:
            Path(place).mkdir(parents=True, exist_ok=True)
    check_apart(source, root)


def test_a_config_and_a_watch_with_the_root_in_the_source_are_refused(tmp_path: Path) -> None:
    photos = photographs(tmp_path / "photos")
    root = f"{photos}/dpnet"
    config = load_config("demo", [f"images.source={photos}"])
    with pytest.raises(ConfigError, match=r"images\.source .* contains the root"):
        check_config(config, "images", root)
    for use in (look, prepare_images):
        with pytest.raises(ConfigError, match=r"images\.source .* contains the root"):
            use(crops(photos), LocalStore(Path(root)))
    assert not Path(root).exists()


def test_mask_files_that_contain_the_root_are_refused(tmp_path: Path) -> None:
    masks = photographs(tmp_path / "masks")
    recipes = {"external": 1.0}
    settings = MasksSettings(name="m", external=str(masks), recipes=recipes)
    with pytest.raises(ConfigError, match=r"masks\.external .* contains the root"):
        prepare_masks(settings, LocalStore(masks / "root"))
    given = [f"masks.external={masks}", "masks.recipes.external=1"]
    with pytest.raises(ConfigError, match=r"masks\.external .* contains the root"):
        check_config(load_config("demo", given), "masks", f"{masks}/root")


@pytest.mark.parametrize("remote", [False, True])
def test_a_root_of_another_project_in_the_source_is_found(
    tmp_path: Path, moto_root: str, remote: bool
) -> None:
    first = LocalStore(tmp_path / "first")
    prepare_images(crops(photographs(tmp_path / "photos")), first)
    source = tmp_path / "all"
    source.mkdir()
    (source / "project").symlink_to(first.folder)
    uri = str(source)
    if remote:
        uri = f"{moto_root}/all"
        for entry in first.list():
            open_store(uri).write(f"project/{entry.key}", first.read(entry.key))
    with pytest.raises(ConfigError, match=r"contains a root with project/images/photographs/"):
        prepare_images(crops(uri), LocalStore(tmp_path / "second"))
    (version,) = (first.folder / "images/photographs").glob("*/manifest.json")
    again = prepare_images(crops(version.parent), LocalStore(tmp_path / "third"))
    assert again.summary["photographs"] == 12  # on purpose: only the samples of a version
