"""Settings of the images and masks stages."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
from image_sets import crops, tiles
from pydantic import ValidationError

from data_prep.images.settings import ImagesSettings


def requested(source: str = "photos", **options: Any) -> dict[str, Any]:
    return crops(source, **options).request_settings()


def test_only_options_that_change_the_output_are_in_the_digest() -> None:
    plain = requested()
    same: dict[str, Any] = {
        "workers": 2,
        "max_failure_ratio": 0.5,
        "name": "other",
        "tile": [64],
        "max_tiles": 3,
        "min_side": 32,
        "near_duplicates": "off",
    }
    assert requested(**same) == plain
    assert requested("elsewhere") == plain
    other: list[dict[str, Any]] = [
        {"size": 64},
        {"quality": 80},
        {"val": 0.1},
        {"min_side": 40},
        {"max_bytes": 1000},
        {"max_pixels": 1000},
        {"dedupe": "off"},
        {"near_duplicates": "drop"},
        {"resample": "lanczos"},
        {"format": "png"},
        {"mode": "short-side"},
        {"layout": "files"},
        {"shard_samples": 7},
    ]
    changed = [json.dumps(requested(**option), sort_keys=True) for option in other]
    assert len({json.dumps(plain, sort_keys=True), *changed}) == 1 + len(other)
    assert requested(format="png", quality=3) == requested(format="png")
    assert requested(mode="keep", size=64, quality=3) == requested(mode="keep")


def test_the_order_and_repetition_of_tile_sides_do_not_change_the_request() -> None:
    plain = tiles("photos").request_settings()
    assert tiles("photos", tile=[48, 32, 48]).request_settings() == plain
    assert tiles("photos", max_tiles=3).request_settings() != plain


@pytest.mark.parametrize(
    "options",
    [
        {"sise": 64},
        {"size": 0},
        {"tile": []},
        {"tile": [4]},
        {"val": 0.4, "test": 0.4},
        {"name": "../x"},
        {"layout": "imagenet"},
        {"mode": "squeeze"},
    ],
)
def test_invalid_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        ImagesSettings(**{"source": "photos", **options})


def test_one_tile_side_can_be_given_as_a_number() -> None:
    assert ImagesSettings(source="photos", tile=128).tile == (128,)  # type: ignore[arg-type]


@pytest.mark.parametrize("module", ["data_prep.images.settings", "data_prep.masks.settings"])
def test_settings_import_neither_the_work_nor_heavy_libraries(module: str) -> None:
    code = f"import sys, {module}; print(*sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(found.stdout.split())
    assert module in loaded
    assert not loaded & {"numpy", "PIL", "cv2", "pyarrow", "boto3"}
    work = ("stage", "build", "shard_task", "pool", "prepare", "decoding", "external", "shards")
    ours = {name for name in loaded if name.startswith("data_prep.")}
    assert not {name for name in ours if name.rpartition(".")[2] in work}
