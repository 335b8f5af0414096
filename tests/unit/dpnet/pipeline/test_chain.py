"""What is checked before the stages run."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest
import small_root

from data_prep.core.errors import ConfigError, PipelineError
from data_prep.core.storage.local import LocalStore
from dpnet.cli.commands.data import images_build
from dpnet.model_store.weights_file import holds_weights
from dpnet.pipeline.chain import StageName, check_config, run_chain
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


def refusal(wanted: StageName, *overrides: str, root: Path | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        check_config(load_config("demo", overrides), wanted, root and str(root))
    return str(caught.value)


MASK_FILES_MISSING = ("masks.external=/no/such/masks", "masks.recipes.external=1")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["evaluate.compare={theirs: 'models:/dpnet/7'}"], "evaluate.compare.theirs: "),
        (["evaluate.compare={theirs: 'models:/dpnet'}"], "is not a model reference"),
        (["train.init_from=models:/dpnet/7"], "no such model"),
        (["train.init_from=/no/such/run"], "'/no/such/run' holds no model"),
        (["model.preset=base"], "names the packaged weights, a network that differs"),
        (["register.tracking_uri=localhost:5000"], "register.tracking_uri is 'localhost:5000'"),
        (["register.tracking_uri=htp://mlflow"], "register.tracking_uri is 'htp://mlflow'"),
        (["launch.launcher=ray-job", "launch.address=head:8265"], "launch.address is 'head:8265'"),
        (["launch.launcher=ray-job"], "launch.address is missing"),
        (["launch.launcher=kuberay"], "launch.image is missing"),
        (
            ["launch.launcher=kuberay", "launch.template=none.yaml"],
            "launch.template is 'none.yaml'",
        ),
        (["launch.launcher=kuberay", "launch.image=a/b:1"], "a folder that the pods of a training"),
        (MASK_FILES_MISSING, "masks.external /no/such/masks does not exist"),
    ],
)
def test_what_a_late_stage_needs_is_checked_before_the_first_one(
    overrides: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    assert words in refusal("register", *overrides, root=tmp_path)
    assert list(tmp_path.iterdir()) == []
    check_config(load_config("demo", overrides), "images", str(tmp_path))


def test_a_registration_from_s3_without_an_mlflow_server_is_refused_before_the_first_stage(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    config = load_config("demo", [])
    with pytest.raises(ConfigError, match=r"register\.tracking_uri is not set and s3:"):
        check_config(config, "register", "s3://bucket/root")
    check_config(config, "evaluate", "s3://bucket/root")


def test_a_cluster_that_cannot_be_asked_is_only_a_warning_where_a_training_has_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = load_config("demo", ["launch.launcher=kuberay", "launch.image=a/b:1"])
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    monkeypatch.setattr("dpnet.pipeline.chain.check_shared_root", lambda template, root: None)
    root = tmp_path / "root"
    with pytest.raises(ConfigError, match="credentials for Kubernetes"):
        check_config(config, "train", str(root))
    manifest = root / f"runs/{config.name}-0123456789ab/manifest.json"
    manifest.parent.mkdir(parents=True)
    manifest.write_text("{}")
    check_config(config, "train", str(root))
    assert "credentials for Kubernetes" in caplog.text


@pytest.mark.parametrize("option", ["losses.vgg_weights", "evaluate.lpips_weights"])
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("page.pth", b"<html>404"),
        ("cut.pth", b"PK\x03\x04 without an end"),
        ("photo.safetensors", b"\xff\xd8\xff\xe0\x00\x10JFIF"),
        ("cut.safetensors", (1000).to_bytes(8, "little") + b'{"features.0.weight": '),
        ("empty.pth", b""),
    ],
)
def test_a_file_that_cannot_hold_weights_is_refused_before_the_first_stage(
    option: str, name: str, content: bytes, tmp_path: Path
) -> None:
    file = tmp_path / name
    file.write_bytes(content)
    assert f"{option} names {str(file)!r}, which is not a file of weights" in refusal(
        "register", f"{option}={file}"
    )


@pytest.mark.parametrize("kind", ["zip.pth", "legacy.pth", "tensors.safetensors"])
def test_a_file_that_torch_or_safetensors_writes_can_hold_weights(
    kind: str, tmp_path: Path
) -> None:
    import torch
    from safetensors.torch import save_file

    file, weights = tmp_path / kind, {"features.0.weight": torch.zeros(2)}
    if kind.endswith(".safetensors"):
        save_file(weights, file)
    else:
        torch.save(weights, file, _use_new_zipfile_serialization=kind.startswith("zip"))
    assert holds_weights(file)


def test_weights_that_may_be_downloaded_are_fetched_before_the_first_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("TORCH_HOME", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr("dpnet.evaluation.weights.URL", (tmp_path / "no.pth").as_uri())
    config = load_config("demo", ["evaluate.allow_downloads=true"])
    with pytest.raises(PipelineError, match=r"evaluate\.allow_downloads is true, but .* cannot"):
        check_config(config, "evaluate")
    check_config(config, "train")


def test_results_of_another_model_are_missed_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(*given: object) -> None:
        raise AssertionError("training has begun")

    monkeypatch.setattr("dpnet.pipeline.chain.train", train)
    source = small_root.photographs(tmp_path / "photos")
    (tmp_path / "results").mkdir()
    values = tmp_path / "small.yaml"
    values.write_text(
        f"name: small\nimages: {{source: {source}, size: 32}}\n"
        "masks: {size: 32, train: 4, eval_per_bin: 1, recipes: {free-form: 1}}\n"
        f"evaluate: {{compare: {{theirs: {tmp_path}/results}}}}\n"
    )
    config = load_config(str(values))
    store = LocalStore(tmp_path / "root")
    with pytest.raises(PipelineError, match=r"the results of theirs do not fit .* are missing"):
        run_chain(config, store, "evaluate")
    assert not store.exists("runs")
