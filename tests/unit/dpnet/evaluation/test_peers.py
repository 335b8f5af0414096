"""Other models on the same pairs: exported pairs, folders of results, registered versions."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_root
from PIL import Image
from pydantic import ValidationError

from data_prep.core.errors import ConfigError, PipelineError, StorageError
from data_prep.core.manifest import StageRef, read_manifest
from data_prep.core.storage.local import LocalStore
from data_prep.shards.shards import decode_table
from dpnet.evaluation.export_pairs import export_pairs
from dpnet.evaluation.peers import FolderPeer, check_peers
from dpnet.evaluation.protocol import METHODS
from dpnet.evaluation.settings import EvaluateSettings
from dpnet.evaluation.stage import evaluate

Data = tuple[LocalStore, StageRef, StageRef, StageRef]


@pytest.fixture(autouse=True)
def _no_weights_of_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    store = LocalStore(tmp_path_factory.mktemp("data") / "root")
    images, masks = small_root.real_data(store, shard_samples=3)
    return store, images, masks, small_root.trained(store, images=images, masks=masks)


@pytest.fixture(scope="module")
def pairs(data: Data, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Export the pairs to a folder."""
    folder = tmp_path_factory.mktemp("pairs") / "new"
    store, images, masks, _ = data
    assert export_pairs(EvaluateSettings(), images, masks, store, folder) == 12
    return folder


@pytest.fixture
def results(pairs: Path, tmp_path: Path) -> Path:
    """Return the results of a model that knows the truth."""
    return Path(shutil.copytree(pairs / "truth", tmp_path / "results"))


def evaluated(data: Data, results: Any, **settings: Any) -> StageRef:
    store, *inputs = data
    compare = {"theirs": str(results)}
    return evaluate(EvaluateSettings(compare=compare, pictures=0, **settings), *inputs, store)


def rows_of(data: Data, ref: StageRef) -> list[dict[str, Any]]:
    return decode_table(data[0].read(f"{ref.folder}/metrics.parquet"))


def report_of(data: Data, ref: StageRef) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(data[0].read(f"{ref.folder}/report.json"))
    return found


def test_the_files_of_a_pair_have_one_name_and_white_is_the_hole(pairs: Path) -> None:
    listed = json.loads((pairs / "pairs.json").read_text())
    names = [pair["name"] for pair in listed["pairs"]]
    assert len(set(names)) == 12
    for kind in ("truth", "masked", "mask"):
        assert {path.stem for path in (pairs / kind).iterdir()} == set(names)
    for pair in listed["pairs"]:
        truth, masked, mask = (
            np.asarray(Image.open(pairs / kind / f"{pair['name']}.png"))
            for kind in ("truth", "masked", "mask")
        )
        assert set(np.unique(mask)) == {0, 255}
        assert (mask == 255).mean() == pytest.approx(pair["hole_ratio"])
        assert (masked[mask == 255] == 255).all()
        assert (masked[mask == 0] == truth[mask == 0]).all()


def test_exported_pairs_are_those_of_the_evaluation(data: Data, pairs: Path, results: Path) -> None:
    listed = json.loads((pairs / "pairs.json").read_text())
    ref = evaluated(data, results)
    assert listed["pairs_digest"] == ref.summary["pairs_digest"]
    rows = [row for row in rows_of(data, ref) if row["method"] == "theirs"]
    assert [(r["image"], r["mask"]) for r in rows] == [
        (pair["image"], pair["mask"]) for pair in listed["pairs"]
    ]


def test_other_pairs_have_other_names(data: Data, pairs: Path, tmp_path: Path) -> None:
    store, images, masks, _ = data
    export_pairs(EvaluateSettings(seed=1), images, masks, store, tmp_path)
    names = [{path.stem for path in (at / "mask").iterdir()} for at in (pairs, tmp_path)]
    assert names[0] != names[1]
    assert {name[:13] for name in names[0]} == {name[:13] for name in names[1]}


def test_a_file_in_place_of_the_folder_is_one_sentence(data: Data, tmp_path: Path) -> None:
    store, images, masks, _ = data
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="file"):
        export_pairs(EvaluateSettings(), images, masks, store, tmp_path / "file")


def test_results_that_are_the_truth_are_perfect(data: Data, results: Path) -> None:
    ref = evaluated(data, results)
    rows = [row for row in rows_of(data, ref) if row["method"] == "theirs"]
    assert {row["hole_psnr"] for row in rows} == {100.0}
    assert {row["l1"] for row in rows} == {0.0}
    report = report_of(data, ref)
    assert list(report["methods"]) == ["dpnet", "theirs", *list(METHODS)[1:]]
    assert report["perfect"]["theirs"] == 12
    found = report["figures"]["paired"]["theirs"]["hole_psnr"]
    assert found["high"] < 0
    assert ref.summary["figures"]["mean_over_bins"]["theirs"]["ssim"] == 1.0
    page = data[0].read(f"{ref.folder}/report.html").decode()
    assert ">theirs</th>" in page


def test_known_pixels_of_results_do_not_count(data: Data, results: Path, pairs: Path) -> None:
    for path in results.iterdir():
        mask = np.asarray(Image.open(pairs / "mask" / path.name))
        pixels = np.where(mask[..., None] == 255, np.asarray(Image.open(path)), np.uint8(7))
        Image.fromarray(pixels).save(path)
    rows = rows_of(data, evaluated(data, results))
    assert {row["psnr"] for row in rows if row["method"] == "theirs"} == {100.0}


def test_only_the_names_and_bytes_of_the_results_are_in_the_request(
    data: Data, results: Path, tmp_path: Path
) -> None:
    first = evaluated(data, results)
    moved = Path(shutil.copytree(results, tmp_path / "moved"))
    (moved / "notes.txt").write_text("no picture")
    again = evaluated(data, moved)
    assert (again.skipped, again.folder) == (True, first.folder)
    one = next(path for path in moved.iterdir() if path.suffix == ".png")
    Image.new("RGB", (small_root.SIZE, small_root.SIZE)).save(one)
    assert evaluated(data, moved).folder != first.folder
    sources = read_manifest(data[0], first.folder).sources
    assert list(sources) == ["compare/theirs"]


def remove(path: Path) -> None:
    path.unlink()


def empty(path: Path) -> None:
    path.write_bytes(b"")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


def shrink(path: Path) -> None:
    Image.open(path).resize((16, 32)).save(path)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (remove, "are missing"),
        (empty, "cannot be read as pictures"),
        (cut, "cannot be read as pictures"),
        (shrink, "are not 32 x 32 pixels"),
    ],
)
def test_results_that_do_not_fit_are_counted_and_named_before_the_work(
    damage: Callable[[Path], None], says: str, data: Data, results: Path
) -> None:
    damaged = sorted(results.iterdir())[:4]
    for path in damaged:
        damage(path)
    named = ", ".join(path.stem for path in damaged[:3])
    with pytest.raises(ConfigError) as raised:
        evaluated(data, results)
    assert f"the results of theirs do not fit the 12 pairs: 4 {says} ({named}, …)." in str(
        raised.value
    )
    assert damaged[3].stem not in str(raised.value)


def test_several_kinds_of_problems_are_one_message(data: Data, results: Path) -> None:
    one, two, *_ = sorted(results.iterdir())
    one.unlink()
    shrink(two)
    with pytest.raises(
        ConfigError, match=rf"1 are missing \({one.stem}\); 1 are not 32 x 32 .*{two.stem}"
    ):
        evaluated(data, results)


def test_two_pictures_of_one_name_are_refused(data: Data, results: Path) -> None:
    one = sorted(results.iterdir())[0]
    Image.open(one).save(one.with_suffix(".jpg"))
    with pytest.raises(ConfigError, match=f"has several pictures named {one.stem}: keep one"):
        evaluated(data, results)


def test_results_that_change_during_the_evaluation_are_refused(
    data: Data, results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def check(own: FolderPeer, *given: Any) -> None:
        for path in results.iterdir():
            Image.new("RGB", (32, 32)).save(path)

    monkeypatch.setattr(FolderPeer, "check", check)
    with pytest.raises(PipelineError, match="was changed during the evaluation: run it again"):
        evaluated(data, results, max_pairs=11)


@pytest.mark.parametrize("reference", ["models:/dpnet/1", "models:/dpnet@champion"])
def test_a_registered_version_fills_the_same_holes_and_its_number_is_reported(
    reference: str, data: Data, tmp_path: Path
) -> None:
    from dpnet.registry.settings import RegisterSettings
    from dpnet.registry.stage import register

    store = LocalStore(tmp_path / "root")
    shutil.copytree(data[0].folder, store.folder, ignore=shutil.ignore_patterns("evaluations"))
    store.write("mlflow.db", small_root.new_database().data)
    own = (store, *data[1:])
    plain = evaluate(EvaluateSettings(pictures=0), *own[1:], store)
    register(RegisterSettings(promote="always"), own[3], plain, store)
    other = small_root.trained(store, seed=1, images=own[1], masks=own[2])
    ref = evaluated((*own[:3], other), reference)
    report = json.loads(store.read(f"{ref.folder}/report.json"))
    assert report["versions"] == {"theirs": "models:/dpnet/1"}
    assert "theirs (models:/dpnet/1)" in store.read(f"{ref.folder}/report.html").decode()
    version = [row for row in rows_of(own, ref) if row["method"] == "theirs"]
    before = [row for row in rows_of(own, plain) if row["method"] == "dpnet"]
    assert [row["hole_psnr"] for row in version] == [row["hole_psnr"] for row in before]
    assert read_manifest(store, ref.folder).sources == {"compare/theirs": own[3].content_digest}
    with pytest.raises(PipelineError, match="no models:/dpnet/7: its versions are 1"):
        evaluated(own, "models:/dpnet/7")


@pytest.mark.parametrize("name", ["", "DPNet", "telea", "mean fill", "a/b", "é", "x" * 31])
def test_a_name_that_is_taken_or_odd_is_refused(name: str) -> None:
    with pytest.raises(ValidationError):
        EvaluateSettings(compare={name: "results"})


def test_a_missing_folder_is_refused_before_the_stages_run(tmp_path: Path) -> None:
    settings = EvaluateSettings(compare={"theirs": str(tmp_path / "missing")})
    with pytest.raises(ConfigError, match=r"evaluate\.compare\.theirs names .* not a folder"):
        check_peers(settings, LocalStore(tmp_path))
