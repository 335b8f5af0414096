"""The model card of a registered version, and its figures for Hugging Face's Hub."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_root
import yaml
from PIL import Image

from data_prep.core.manifest import StageRef, read_manifest
from data_prep.core.storage.local import LocalStore
from dpnet.cli.parser import build_parser
from dpnet.evaluation.settings import EvaluateSettings
from dpnet.evaluation.stage import evaluate
from dpnet.model_store.records import find_record
from dpnet.pipeline.verify import verify
from dpnet.registry.card import card_facts, eval_results, licence_section, version_card
from dpnet.registry.settings import RegisterSettings
from dpnet.registry.stage import register


@pytest.fixture(scope="module")
def registered(tmp_path_factory: pytest.TempPathFactory) -> tuple[LocalStore, StageRef]:
    """Return a root with a real evaluation of an untrained model, and its registration."""
    store = small_root.new_store(tmp_path_factory.mktemp("card") / "root")
    images, masks = small_root.real_data(store)
    run = small_root.trained(store, images=images, masks=masks)
    evaluation = evaluate(EvaluateSettings(pictures=1), images, masks, run, store)
    return store, register(RegisterSettings(promote="always"), run, evaluation, store)


def card_of(registered: tuple[LocalStore, StageRef]) -> str:
    store, ref = registered
    return store.read(f"{ref.folder}/README.md").decode()


def report_of(store: LocalStore) -> dict[str, Any]:
    folder = find_record(store)["evaluation"]["folder"]
    found: dict[str, Any] = json.loads(store.read(f"{folder}/report.json"))
    return found


def test_the_card_is_a_file_of_the_registration_and_no_content(
    registered: tuple[LocalStore, StageRef],
) -> None:
    store, ref = registered
    files = {file.path: file.content for file in read_manifest(store, ref.folder).files}
    assert files == {"record.json": True, "README.md": False}
    assert verify(store).problems == []
    assert card_of(registered) == version_card(card_facts(store, find_record(store)))


def test_the_card_has_every_mean_with_its_interval(
    registered: tuple[LocalStore, StageRef],
) -> None:
    figures, card = report_of(registered[0])["figures"], card_of(registered)
    for name, group in {**figures["bins"], "all": figures["all"]}.items():
        psnr = group["methods"]["dpnet"]["hole_psnr"]
        cell = f"{psnr['mean']:.2f} [{psnr['low']:.2f}, {psnr['high']:.2f}]"
        assert re.search(rf"{re.escape(name)} \| {group['pairs']} \| {re.escape(cell)}", card), name
    assert "| Telea |" in card


def test_the_card_names_the_data_and_the_training(registered: tuple[LocalStore, StageRef]) -> None:
    store, card = registered[0], card_of(registered)
    run = read_manifest(store, find_record(store)["run"]["folder"])
    for role in ("images", "masks"):
        assert f"content digest {run.inputs[role].content_digest[:12]}" in card
    assert f"50 steps, settings {run.request_digest[:12]}" in card
    assert "recipes of the masks: " in card
    assert str(store.folder) not in card  # a root can be moved


def test_the_commands_and_the_four_lines_of_the_card_work(
    registered: tuple[LocalStore, StageRef], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = card_of(registered).replace("ROOT", str(registered[0].folder))
    commands = re.findall(r"^    (dpnet .*)$", card, re.M)
    assert len(commands) == 2
    for command in commands:
        build_parser().parse_args(command.split()[1:])
    (code,) = re.findall(r"```python\n(.*?)```", card, re.S)
    monkeypatch.chdir(tmp_path)
    photo = np.full((40, 40, 3), 100, np.uint8)
    mask = np.zeros((40, 40), np.uint8)
    mask[10:20, 10:20] = 255
    Image.fromarray(photo).save("photo.png")
    Image.fromarray(mask).save("mask.png")
    exec(compile(code, "card", "exec"), {})
    filled = np.asarray(Image.open("filled.png"))
    assert (filled[mask == 0] == 100).all()


def test_the_figures_for_the_hub_are_valid_yaml(registered: tuple[LocalStore, StageRef]) -> None:
    store, _ = registered
    report = report_of(store)
    entries = yaml.safe_load(eval_results(card_facts(store, find_record(store))))
    tasks = [each["dataset"]["task_id"] for each in entries]
    assert tasks[:2] == ["inpainting-hole-psnr", "inpainting-ssim"]
    for entry in entries:
        assert set(entry) == {"dataset", "value", "date", "notes"}
        assert entry["dataset"]["id"] == "small"
        assert isinstance(entry["value"], float)
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", entry["date"])
    psnr = report["figures"]["all"]["methods"]["dpnet"]["hole_psnr"]
    assert entries[0]["value"] == round(psnr["mean"], 2)
    assert f"95 % interval {psnr['low']:.2f} to {psnr['high']:.2f}" in entries[0]["notes"]


def test_facts_that_the_root_does_not_have_are_named_as_not_recorded(tmp_path: Path) -> None:
    store = small_root.new_store(tmp_path / "root")
    run, evaluation = small_root.run_and_evaluation(store, 20.0)
    ref = register(RegisterSettings(), run, evaluation, store)
    card = store.read(f"{ref.folder}/README.md").decode()
    assert "* photos: not recorded" in card
    assert "* masks: not recorded" in card
    assert "The report of the evaluation is not recorded." in card
    assert "is 20.00 dB" in card
    assert "It is better than the mean fill" in card
    facts = card_facts(store, find_record(store))
    assert eval_results(facts) == ""
    store.delete(f"{run.folder}/manifest.json")
    assert "training" not in card_facts(store, find_record(store))
    assert "* photos: not recorded" in version_card(card_facts(store, find_record(store)))


@pytest.mark.parametrize(
    ("images", "note"),
    [
        ({"name": "Places2", "settings": {}}, "Places2 may be used for research and education"),
        ({"name": "mine", "settings": {"layout": "celeba-hq"}}, "non-commercial research only"),
        ({"name": "mine", "settings": {"layout": "auto"}}, "terms of the photos are not recorded"),
        ({}, "terms of the photos are not recorded"),
    ],
)
def test_the_terms_are_those_that_the_name_of_the_photos_says(
    images: dict[str, Any], note: str
) -> None:
    assert note in licence_section({"images": images})


def test_a_name_cannot_change_the_layout_of_the_card() -> None:
    facts = {
        "model": "a", "version": 1, "reason": "x\n# y | <b>",
        "evaluation": {"hole_psnr": 20.0, "pairs_digest": "p"},
    }  # fmt: skip
    card = version_card(facts)
    assert "\n# y" not in card
    assert "\\<b>" in card


def test_fid_and_ids_are_on_the_card_and_on_the_hub(
    registered: tuple[LocalStore, StageRef],
) -> None:
    facts = card_facts(registered[0], find_record(registered[0]))
    assert "FID" not in version_card(facts)
    evaluation = facts["evaluation"] | {
        "sets": {"dpnet": {"fid": 12.5, "p_ids": 10.0, "u_ids": 20.0}},
        "set_notes": ["The weights are others."],
    }
    card = version_card(facts | {"evaluation": evaluation})
    assert "| method | FID | P-IDS, % | U-IDS, % |" in card
    assert "| DPNet | 12.50 | 10.00 | 20.00 |" in card
    assert "\nThe weights are others." in card
    entries = yaml.safe_load(eval_results(facts | {"evaluation": evaluation}))
    (fid,) = [each for each in entries if each["dataset"]["task_id"] == "inpainting-fid"]
    assert fid["value"] == 12.5
    assert fid["notes"].startswith("FID, over 12 frozen pairs ")
    assert fid["notes"].endswith(". The weights are others.")
