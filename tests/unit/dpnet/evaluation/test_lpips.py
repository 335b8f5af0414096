"""LPIPS against the authors' numbers and torchmetrics' own network, and its weights files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from random_weights import random_alexnet
from safetensors.torch import load_file, save_file

from data_prep.core.digest import sha256_file
from data_prep.core.errors import ConfigError, PipelineError
from dpnet.evaluation import weights
from dpnet.evaluation.lpips import LEAST_SIDE, Lpips, load_lpips
from dpnet.evaluation.settings import EvaluateSettings
from dpnet.evaluation.weights import WeightsFile, check_weights_file, find_weights

SHARED = Path(__file__).parents[5] / "shared"
ALEXNET = SHARED / "weights/alexnet-features.safetensors"
EXAMPLES = SHARED / "data/lpips"


def loaded(file: Path) -> Lpips:
    return load_lpips(WeightsFile(file, sha256_file(file)))


def picture(seed: int, side: int = 64) -> Any:
    return np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)


def test_the_authors_examples_have_the_authors_distances() -> None:
    for needed in (ALEXNET, EXAMPLES):
        if not needed.exists():
            pytest.skip(f"no AlexNet weights and examples of LPIPS at {needed}")
    reference, *others = (
        np.asarray(Image.open(EXAMPLES / f"{name}.png").convert("RGB"))
        for name in ("ex_ref", "ex_p0", "ex_p1")
    )
    assert loaded(ALEXNET).distances(reference, others) == pytest.approx(
        [0.72188, 0.13757], abs=1e-5
    )


@pytest.mark.parametrize("side", [LEAST_SIDE, 64, 97])
def test_the_distance_is_that_of_torchmetrics(
    side: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchmetrics.functional.image import lpips as theirs

    file = random_alexnet(tmp_path / "alexnet.safetensors")
    state = load_file(file)

    def features(net: str, pretrained: bool = False) -> torch.nn.Sequential:
        from torch.nn import Conv2d, MaxPool2d, ReLU

        made = torch.nn.Sequential(
            Conv2d(3, 64, 11, 4, 2), ReLU(), MaxPool2d(3, 2),
            Conv2d(64, 192, 5, padding=2), ReLU(), MaxPool2d(3, 2),
            Conv2d(192, 384, 3, padding=1), ReLU(), Conv2d(384, 256, 3, padding=1), ReLU(),
            Conv2d(256, 256, 3, padding=1), ReLU(),
        )  # fmt: skip
        made.load_state_dict({name.removeprefix("features."): w for name, w in state.items()})
        return made

    monkeypatch.setattr(theirs, "_get_tv_model_features", features)
    network = theirs._NoTrainLpips(net="alex")
    truth, others = picture(0, side), [picture(1, side), picture(0, side) // 2]
    tensors = [torch.from_numpy(p).permute(2, 0, 1)[None].float() / 255 for p in (truth, *others)]
    expected = [float(network(tensors[0], other, normalize=True)) for other in tensors[1:]]
    assert loaded(file).distances(truth, others) == pytest.approx(expected, rel=1e-5)


def test_an_equal_image_has_no_distance(tmp_path: Path) -> None:
    network = loaded(random_alexnet(tmp_path / "alexnet.safetensors"))
    assert network.distances(picture(0), [picture(0)]) == [0.0]


def test_a_file_of_torch_and_a_file_of_safetensors_give_the_same(tmp_path: Path) -> None:
    file = random_alexnet(tmp_path / "alexnet.safetensors")
    whole = load_file(file) | {"classifier.1.weight": torch.zeros(2)}
    torch.save(whole, tmp_path / "alexnet.pth")
    distances = [
        loaded(path).distances(picture(0), [picture(1)])
        for path in (file, tmp_path / "alexnet.pth")
    ]
    assert distances[0] == distances[1]


def changed(tmp_path: Path, **changes: Any) -> dict[str, Any]:
    state = load_file(random_alexnet(tmp_path / "good.safetensors"))
    return {name: w for name, w in {**state, **changes}.items() if w is not None}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"features.0.weight": torch.ones(64, 3, 3, 3)},
            r"are not those of torchvision's AlexNet \(features\.0\.weight is \(64, 3, 3, 3\)",
        ),
        ({"features.10.bias": None}, r"features\.10\.bias is missing"),
        (
            {"features.6.bias": torch.full((384,), float("nan"))},
            r"not finite in features\.6\.bias",
        ),
    ],
)
@pytest.mark.parametrize("ending", ["pth", "safetensors"])
def test_weights_of_another_network_or_with_nan_are_refused_in_one_sentence(
    changes: dict[str, Any], says: str, ending: str, tmp_path: Path
) -> None:
    file = tmp_path / f"weights.{ending}"
    (torch.save if ending == "pth" else save_file)(changed(tmp_path, **changes), file)
    with pytest.raises(ConfigError, match=says) as refused:
        loaded(file)
    assert "evaluate.lpips_weights" in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("ending", ["pth", "safetensors"])
@pytest.mark.parametrize("share", [0, 2])
def test_a_truncated_file_is_refused_in_one_sentence(
    ending: str, share: int, tmp_path: Path
) -> None:
    file = tmp_path / f"weights.{ending}"
    (torch.save if ending == "pth" else save_file)(changed(tmp_path), file)
    os.truncate(file, file.stat().st_size // share if share else 0)
    with pytest.raises(ConfigError, match=r"cannot be read .* cut short") as refused:
        loaded(file)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("content", [torch.ones(3), {"epoch": 3}])
def test_a_file_without_named_tensors_is_refused(content: Any, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "weights.pth")
    with pytest.raises(ConfigError, match="are no named tensors"):
        loaded(tmp_path / "weights.pth")


def test_a_pickle_with_code_is_not_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "made"),)

    torch.save({"features.0.weight": Evil()}, tmp_path / "weights.pth")
    with pytest.raises(PipelineError, match="cannot be read"):
        loaded(tmp_path / "weights.pth")
    assert not (tmp_path / "made").exists()


def test_a_file_that_changes_after_the_request_is_refused(tmp_path: Path) -> None:
    file = random_alexnet(tmp_path / "alexnet.safetensors")
    before = sha256_file(file)
    random_alexnet(file, seed=1)
    with pytest.raises(PipelineError, match="were changed during the evaluation"):
        load_lpips(WeightsFile(file, before))


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("TORCH_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def touch(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


def test_the_named_file_comes_first_then_our_folder_then_torchvisions_cache(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert find_weights(EvaluateSettings()) is None
    cached = touch(home / ".cache/torch/hub/checkpoints/alexnet-owt-7be5be79.pth")
    assert find_weights(EvaluateSettings()) == cached
    own = touch(home / ".cache/dpnet/weights/alexnet-features.safetensors")
    assert find_weights(EvaluateSettings()) == own
    named = random_alexnet(home / "named.safetensors")
    assert find_weights(EvaluateSettings(lpips_weights="~/named.safetensors")) == named


def test_torchvisions_cache_may_be_elsewhere(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(home / "torch"))
    cached = touch(home / "torch/hub/checkpoints/alexnet-owt-7be5be79.pth")
    assert find_weights(EvaluateSettings()) == cached


def test_a_named_file_that_is_missing_is_refused_and_not_replaced(home: Path) -> None:
    touch(home / ".cache/dpnet/weights/alexnet-features.safetensors")
    settings = EvaluateSettings(lpips_weights=str(home / "missing.pth"))
    for check in (check_weights_file, find_weights):
        with pytest.raises(ConfigError, match=r"evaluate\.lpips_weights names .* not a file"):
            check(settings)


@pytest.fixture
def source(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Let the download come from a file."""
    file = random_alexnet(home / "source.safetensors")
    monkeypatch.setattr(weights, "URL", file.as_uri())
    monkeypatch.setattr(weights, "HASH_PREFIX", sha256_file(file)[:8])
    return file


def test_weights_are_downloaded_only_if_that_is_allowed(source: Path, home: Path) -> None:
    assert find_weights(EvaluateSettings()) is None
    found = find_weights(EvaluateSettings(allow_downloads=True))
    assert found == home / ".cache/dpnet/weights/alexnet-owt-7be5be79.pth"
    assert found.read_bytes() == source.read_bytes()
    source.unlink()
    assert find_weights(EvaluateSettings(allow_downloads=True)) == found


@pytest.mark.parametrize("fault", ["missing", "other bytes"])
def test_a_failed_download_is_one_sentence_and_leaves_no_file(
    fault: str, source: Path, home: Path
) -> None:
    source.unlink() if fault == "missing" else source.write_bytes(b"other")
    with pytest.raises(PipelineError, match=r"cannot be downloaded \(.*\): name a file") as raised:
        find_weights(EvaluateSettings(allow_downloads=True))
    assert "\n" not in str(raised.value)
    assert not list((home / ".cache/dpnet/weights").iterdir())


def test_finding_weights_needs_no_torch() -> None:
    import subprocess
    import sys

    code = "import sys, dpnet.evaluation.weights; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
