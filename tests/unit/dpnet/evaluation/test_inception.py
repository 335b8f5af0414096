"""The features of FID's Inception network against torch-fidelity's, and its weights files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from random_weights import inception_state, random_inception

from data_prep.core.digest import sha256_file
from data_prep.core.errors import ConfigError
from dpnet.evaluation import inception
from dpnet.evaluation.inception import FEATURES, Inception, load_inception, scale_as_tensorflow
from dpnet.evaluation.settings import EvaluateSettings
from dpnet.evaluation.weights import WeightsFile, is_official, weights_of

REFERENCE = Path(__file__).parents[3] / "data/inception-features.npy"


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_inception(tmp_path_factory.mktemp("weights") / "inception.safetensors")


@pytest.fixture(scope="module")
def network(file: Path) -> Inception:
    return loaded(file)


def loaded(file: Path) -> Inception:
    return load_inception(WeightsFile(file, sha256_file(file)))


def picture(height: int, width: int) -> Any:
    """Return the picture of a reference: NumPy's legacy generator never changes its numbers."""
    made = np.random.RandomState(height)
    return made.randint(0, 256, (height, width, 3)).astype(np.uint8)


def test_the_features_are_those_of_torch_fidelity(network: Inception) -> None:
    """tests/data/README.md says how the reference was made."""
    found = [network.features([picture(*shape)])[0] for shape in ((40, 56), (320, 300))]
    reference = np.load(REFERENCE, allow_pickle=False)
    assert reference.shape == (2, FEATURES)
    assert np.abs(np.stack(found) - reference).max() < 1e-4
    assert np.abs(reference).mean() > 1


def test_features_do_not_depend_on_the_number_of_threads(
    network: Inception, monkeypatch: pytest.MonkeyPatch
) -> None:
    from concurrent.futures import ThreadPoolExecutor

    from dpnet.evaluation.exact import one_thread_per_call

    monkeypatch.setattr(inception, "SIDE", 75)
    pictures = [[picture(32, 32), picture(33, 33)[:32, :32]] for _ in range(3)]
    with one_thread_per_call():
        one = [network.features(each) for each in pictures]
        with ThreadPoolExecutor(3) as pool:
            many = list(pool.map(network.features, pictures))
    assert np.array_equal(one, many)


def test_an_image_is_scaled_as_tensorflow_1_does() -> None:
    ramp = torch.arange(4.0).reshape(1, 1, 1, 4).expand(1, 1, 4, 4)
    scaled = scale_as_tensorflow(ramp, 8)[0, 0, 0].tolist()
    assert scaled == [0, 0.5, 1, 1.5, 2, 2.5, 3, 3]  # torch's own begins 0, 0.25, 0.75
    down = scale_as_tensorflow(ramp.transpose(2, 3), 2)[0, 0, :, 0].tolist()
    assert down == [0, 2]


def test_a_file_of_torch_gives_the_same(
    network: Inception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inception, "SIDE", 75)
    torch.save(inception_state(), tmp_path / "inception.pth")
    own, other = (each.features([picture(32, 32)]) for each in (network, loaded_pth(tmp_path)))
    assert np.array_equal(own, other)


def loaded_pth(folder: Path) -> Inception:
    return loaded(folder / "inception.pth")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        # torchvision's own Inception V3 has the same names, and 1000 classes.
        ({"fc.weight": torch.zeros(1000, FEATURES)}, r"fc\.weight is \(1000, 2048\), not \(1008"),
        (
            {"Mixed_7c.branch_pool.conv.weight": None},
            r"Mixed_7c\.branch_pool\.conv\.weight is miss",
        ),
        ({"Mixed_5b.branch1x1.bn.weight": torch.ones(32)}, r"bn\.weight is \(32,\), not \(64,\)"),
        (
            {"Mixed_6a.branch3x3.bn.bias": torch.full((384,), float("nan"))},
            r"not finite in Mixed_6a\.branch3x3\.bn\.bias",
        ),
    ],
)
def test_weights_of_another_network_are_refused_in_one_sentence(
    changes: dict[str, Any], says: str, tmp_path: Path
) -> None:
    file = random_inception(tmp_path / "other.safetensors", **changes)
    with pytest.raises(ConfigError, match=says) as refused:
        loaded(file)
    assert "evaluate.inception_weights" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_only_the_published_file_is_official(file: Path) -> None:
    assert not is_official(sha256_file(file))
    assert is_official("6726825d" + "0" * 56)


def test_the_weights_are_a_named_file_only(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert weights_of(EvaluateSettings(allow_downloads=False)).inception is None
    found = weights_of(EvaluateSettings(inception_weights=str(file)))
    assert found.inception == WeightsFile(file, sha256_file(file))
    assert found.sources == {"inception": sha256_file(file)}
    with pytest.raises(ConfigError, match=r"evaluate\.inception_weights names .* not a file"):
        weights_of(EvaluateSettings(inception_weights=str(tmp_path / "missing.pth")))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_gives_the_features_of_a_cpu_each_time(file: Path, network: Inception) -> None:
    pictures = [picture(64, 64), picture(65, 65)[:64, :64]]
    on_gpu = loaded(file).to("cuda")
    found = on_gpu.features(pictures)
    assert np.array_equal(found, on_gpu.features(pictures))
    assert np.abs(found - network.features(pictures)).max() < 1e-2
