"""The page of the UI: its settings, its example and its screenshots."""

from __future__ import annotations

import json
from pathlib import Path

import yaml

from flows.deployments import DeploySettings

FOLDER = Path(__file__).parents[3] / "docs"


def test_the_table_of_the_deploy_file_has_every_setting_with_its_default_and_meaning() -> None:
    table = (FOLDER / "config.md").read_text("utf-8").split("## Deploy file")[1]
    rows = [line.split(" | ") for line in table.splitlines() if line.startswith("| `")]
    expected = [
        (f"| `{name}`", json.dumps(field.default).strip('"') or '""', f"{field.description} |")
        for name, field in DeploySettings.model_fields.items()
    ]
    assert [(row[0], row[1].strip("`"), row[-1]) for row in rows] == expected


def test_the_page_leads_to_the_table_and_its_example_can_be_deployed() -> None:
    text = (FOLDER / "ui.md").read_text("utf-8")
    assert "](config.md#deploy-file)" in text
    example = text.split("    # my-deploy.yaml\n")[1].split("\n\n")[0]
    settings = DeploySettings.model_validate(yaml.safe_load(example))
    assert (settings.config, settings.watch, settings.min_new) == ("demo", "0 * * * *", 20)


def test_every_screenshot_is_shown_and_small() -> None:
    text = (FOLDER / "ui.md").read_text()
    shots = sorted((FOLDER / "ui").glob("*.png"))
    assert len(shots) >= 5
    for shot in shots:
        assert f"](ui/{shot.name})" in text
        assert shot.stat().st_size < 200_000
