"""docs/ui.md says what is so."""

from __future__ import annotations

import json
from pathlib import Path

from flows.deployments import DeploySettings

FOLDER = Path(__file__).parents[3] / "docs"


def test_the_table_of_settings_has_every_name_default_and_description() -> None:
    expected = [
        f"| `{name}` | `{json.dumps(field.default)}` | {field.description} |"
        for name, field in DeploySettings.model_fields.items()
    ]
    text = (FOLDER / "ui.md").read_text()
    table = text.split("| setting | default | what |\n|---|---|---|\n")[1].split("\n\n")[0]
    assert table.splitlines() == expected


def test_every_screenshot_is_shown_and_small() -> None:
    text = (FOLDER / "ui.md").read_text()
    shots = sorted((FOLDER / "ui").glob("*.png"))
    assert len(shots) >= 5
    for shot in shots:
        assert f"](ui/{shot.name})" in text
        assert shot.stat().st_size < 200_000
