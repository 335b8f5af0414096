"""What is checked before the stages run."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest

from data_prep.core.errors import PipelineError
from dpnet.cli.commands.data import images_build
from dpnet.pipeline.chain import StageName, check_config
from dpnet.pipeline.config import load_config

# A machine that prepares data has no VGG file, and training's settings are not yet final there.
VGG_FILE_MISSING = "losses.vgg_weights=/no/such/vgg19.pth"
CONTRADICTION = "train.min_workers=9"
SOURCE_MISSING = "images.source=/no/such/photos"


def is_refused(wanted: StageName, override: str) -> bool:
    try:
        check_config(load_config("demo", [override]), wanted)
    except PipelineError:
        return True
    return False


@pytest.mark.parametrize(
    ("override", "refused"),
    [
        (VGG_FILE_MISSING, {"train", "evaluate", "register"}),
        ("evaluate.lpips_weights=/missing.pth", {"evaluate", "register"}),
        ("evaluate.compare={theirs: /missing}", {"evaluate", "register"}),
        (CONTRADICTION, {"train", "evaluate", "register"}),
        (SOURCE_MISSING, {"images", "train", "evaluate", "register"}),
    ],
)
def test_a_config_is_checked_only_for_the_stages_that_will_run(
    override: str, refused: set[StageName]
) -> None:
    assert {stage for stage in get_args(StageName) if is_refused(stage, override)} == refused


def test_images_are_built_on_a_machine_without_the_vgg_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from argparse import Namespace

    class Built(Exception):
        """The stage has been called: the checks before it have passed."""

    def build(*given: object, **options: object) -> None:
        raise Built

    monkeypatch.setattr("data_prep.images.stage.prepare_images", build)
    monkeypatch.setattr("dpnet.pipeline.chain.with_photographs", lambda config, store: config)
    args = Namespace(
        source="demo", name=None, size=None, set=[VGG_FILE_MISSING],
        root=str(tmp_path), ray=None, retry_failed=False, repack=False,
    )  # fmt: skip
    with pytest.raises(Built):
        images_build(args)
