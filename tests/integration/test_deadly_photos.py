"""A photo that crashes its decoder, or makes it hang, is a failure of that photo alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import small_root
from deadly_photos import CRASH, HANG, KILL, deadly_decoders, deadly_photo
from image_sets import crops, files_of, photograph, photographs, shards_of, table
from PIL import Image

from data_prep.core.errors import PipelineError
from data_prep.core.manifest import StageRef
from data_prep.core.pool import run_tasks
from data_prep.core.storage.local import LocalStore
from data_prep.images.settings import ImagesSettings
from data_prep.images.stage import prepare_images
from data_prep.masks.recipes import draw
from data_prep.masks.settings import MasksSettings
from data_prep.masks.stage import prepare_masks
from dpnet.cli import main as cli
from dpnet.pipeline.ray_map import ray_map
from dpnet.pipeline.verify import verify
from dpnet.training.ray.start import connect, prepare_start

pytestmark = [pytest.mark.integration, pytest.mark.slow]
BAD = ["trip 0/odd.png", "trip 1/odd.png"]


def settings(source: Path, **options: Any) -> ImagesSettings:
    defaults = {"max_failure_ratio": 0.5, "shard_samples": 6, "val": 0.2, "test": 0.2}
    return crops(source, **{**defaults, **options})


def reasons(store: LocalStore, ref: StageRef) -> dict[str, str]:
    return {row["key"]: row["reason"] for row in table(store, ref, "failures")}


def expected_shards(tmp_path: Path, options: dict[str, Any]) -> dict[str, str]:
    """Build the same source, in which the deadly photos are ordinary broken ones."""
    source = photographs(tmp_path / "ordinary", 24)
    for name in BAD:
        (source / name).write_bytes(b"\x89PNG\r\n\x1a\n broken")
    store = LocalStore(tmp_path / "expected")
    return shards_of(store, prepare_images(settings(source, **options), store, run_tasks))


@pytest.mark.parametrize(
    "options",
    [
        {"workers": 1},
        {"workers": 2},
        {"workers": 2, "mode": "keep"},
        {"workers": 1, "shard_samples": 1000},
    ],
)
def test_a_photo_that_crashes_its_decoder_is_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    expected = expected_shards(tmp_path, options)
    deadly_decoders(tmp_path / "hook", monkeypatch)
    source = photographs(tmp_path / "photos", 24)
    for name in BAD:
        deadly_photo(source / name, CRASH)
    store = LocalStore(tmp_path / "root")
    ref = prepare_images(settings(source, **options), store)
    assert reasons(store, ref) == dict.fromkeys(BAD, "its decoder crashed (SIGSEGV)")
    assert ref.summary["photographs"] == 24
    assert shards_of(store, ref) == expected
    assert verify(store).problems == []
    assert prepare_images(settings(source, **options), store).skipped


def test_a_photo_whose_decoder_never_returns_is_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data_prep.images.build.DECODE_S", 8.0)
    expected = expected_shards(tmp_path, {"workers": 2})
    deadly_decoders(tmp_path / "hook", monkeypatch)
    source = photographs(tmp_path / "photos", 24)
    deadly_photo(source / BAD[0], HANG)
    (source / BAD[1]).write_bytes(b"\x89PNG\r\n\x1a\n broken")
    store = LocalStore(tmp_path / "root")
    ref = prepare_images(settings(source, workers=2), store)
    assert reasons(store, ref)[BAD[0]] == "its decoder did not finish within 8 s"
    assert shards_of(store, ref) == expected


def test_a_worker_that_the_system_kills_is_no_failure_of_a_photo(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deadly_decoders(tmp_path / "hook", monkeypatch)
    source = photographs(tmp_path / "photos", 24)
    deadly_photo(source / BAD[0], KILL)
    with pytest.raises(PipelineError, match=r"killed 3 times \(perhaps because memory is short\)"):
        prepare_images(settings(source), LocalStore(tmp_path / "root"))


def test_a_mask_file_that_crashes_its_decoder_is_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    deadly_decoders(tmp_path / "hook", monkeypatch)
    folder = tmp_path / "masks"
    folder.mkdir()
    for number in range(40):
        Image.fromarray(draw("strokes", 0, number, 32)).save(folder / f"{number:02d}.png")
    deadly_photo(folder / "odd.png", CRASH)
    options = MasksSettings(
        name="m", size=32, train=4, eval_per_bin=1, recipes={"external": 1},
        external=str(folder), external_polarity="white-hole",
    )  # fmt: skip
    store = LocalStore(tmp_path / "root")
    ref = prepare_masks(options, store)
    assert (ref.summary["external"]["failed"], ref.summary["external"]["files"]) == (1, 41)
    assert "odd.png cannot be used: its decoder crashed (SIGSEGV)" in caplog.text


def test_a_photo_that_crashes_its_decoder_does_not_end_the_work_of_inpaint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    store = small_root.new_store(tmp_path / "root")
    small_root.champion(store)
    deadly_decoders(tmp_path / "hook", monkeypatch)
    source = photographs(tmp_path / "photos", 3) / "trip 0"
    deadly_photo(source / "odd.png", CRASH)
    photograph(source / "sound.png", 7)
    Image.fromarray(draw("box", 0, 0, 96)).crop((0, 0, 80, 64)).save(tmp_path / "mask.png")
    words = [str(source), str(tmp_path / "mask.png"), "-o", str(tmp_path / "out")]
    assert cli.main(["inpaint", *words, "--json", "--root", str(tmp_path / "root")]) == 1
    result = json.loads(capsys.readouterr().out)
    assert [Path(each["image"]).name for each in result["pictures"]] == ["0.png", "sound.png"]
    (failed,) = result["failed"]
    assert "odd.png cannot be decoded: its decoder crashed (SIGSEGV)" in failed["error"]


def test_on_ray_a_photo_that_crashes_its_decoder_is_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = expected_shards(tmp_path, {})
    deadly_decoders(tmp_path / "hook", monkeypatch)
    source = photographs(tmp_path / "photos", 24)
    for name in BAD:
        deadly_photo(source / name, CRASH)
    store = LocalStore(tmp_path / "root")
    with prepare_start("test-") as start, start.in_this_process():
        import ray

        connect(**start.init_options(2))
        try:
            ref = prepare_images(settings(source), store, ray_map("local"))
        finally:
            ray.shutdown()
    assert reasons(store, ref) == dict.fromkeys(BAD, "its decoder crashed (SIGSEGV)")
    assert shards_of(store, ref) == expected
    assert files_of(store, ref)
