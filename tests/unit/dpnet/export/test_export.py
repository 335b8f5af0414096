"""Exported graphs compared with the network, and the folder that `dpnet export` writes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import small_root
import torch
from PIL import Image

from data_prep.core.errors import PipelineError
from data_prep.core.storage.local import LocalStore
from dpnet.export import export
from dpnet.export.export import EXAMPLE, Inpainter, example, export_model, load_graph
from dpnet.export.model_card import FILES
from dpnet.inpainting.api import load_model
from dpnet.model import ModelConfig, build_generator
from dpnet.model_store.weights import load_generator, save_generator

SMALL = ModelConfig(
    widths=(8, 16, 16),
    blocks=1,
    attention_dim=8,
    guide=7,
    discriminator_widths=(8, 8, 8, 8),
)
# torch.export is slow with symbolic sizes.
FORMATS = [
    pytest.param("torch-export", marks=pytest.mark.slow),
    "onnx",
    "torchscript",
]
SHAPES = [(1, 64, 64), (3, 37, 50), (2, 16, 16), (1, 1, 1), (1, 129, 97), (1, 8, 200)]


def network_of(config: ModelConfig) -> Inpainter:
    """Return a network with only random weights, so that every layer changes the output."""
    torch.manual_seed(0)
    generator = build_generator(config)
    for parameter in generator.parameters():
        torch.nn.init.normal_(parameter, std=parameter.numel() ** -0.25)
    return Inpainter(generator)


@pytest.fixture(scope="module")
def network() -> Inpainter:
    return network_of(SMALL)


@pytest.fixture(scope="module", params=FORMATS)
def graph(request: pytest.FixtureRequest, network: Inpainter) -> export.Graph:
    return load_graph(request.param, export.MAKERS[request.param](network))


def worst(graph: export.Graph, network: Inpainter, shape: tuple[int, int, int]) -> float:
    image, valid = example(*shape, seed=sum(shape))
    with torch.inference_mode():
        return float((graph(image, valid) - network(image, valid)).abs().max())


@pytest.mark.parametrize("shape", SHAPES)
def test_a_graph_agrees_with_the_network_at_any_size_and_batch(
    graph: export.Graph, network: Inpainter, shape: tuple[int, int, int]
) -> None:
    assert shape != EXAMPLE
    assert worst(graph, network, shape) <= 1e-4


def test_a_graph_keeps_known_pixels_and_ignores_the_pixels_in_the_hole(graph: export.Graph) -> None:
    image, valid = example(2, 40, 56)
    hole = (valid == 0).expand_as(image)
    with torch.inference_mode():
        one = graph(image, valid)
        other = graph(image.masked_fill(hole, float("nan")), valid)
    assert torch.equal(one, other)
    assert torch.equal(one[~hole], image[~hole])
    assert not torch.isclose(one[hole], image[hole]).all()


@pytest.mark.slow
@pytest.mark.rotated(3)
@pytest.mark.parametrize(
    "switches",
    [
        {"attention": "none", "normalization": "instance"},
        {"attention": "single", "normalization": "region", "pyramid": False},
        {"mask": "binary", "normalization": "batch"},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["onnx", "torchscript"])
def test_a_network_with_other_switches_can_be_exported(kind: str, switches: dict[str, str]) -> None:
    network = network_of(ModelConfig(**{**SMALL.to_json(), **switches}))
    graph = load_graph(kind, export.MAKERS[kind](network))
    assert worst(graph, network, (1, 21, 75)) <= 1e-4


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, network: Inpainter) -> str:
    """Write a run with that network, and return its folder."""
    store = LocalStore(tmp_path_factory.mktemp("runs"))
    save_generator(store, "run", network.generator, {"step": 7})
    return str(store.folder / "run")


def exported(reference: str, out: Path, *formats: str, root: str = "") -> Path:
    assert export_model(reference, out, formats, root=root)["out"] == str(out)
    return out


@pytest.fixture(scope="module")
def folder(run: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exported")  # an existing empty folder is allowed
    return exported(run, out, "onnx", "torchscript")


def test_the_folder_contains_weights_config_card_and_the_requested_formats(folder: Path) -> None:
    names = {path.name for path in folder.iterdir()}
    always = {"model.safetensors", "config.json", "README.md"}
    assert names == always | {"generator.onnx", "generator.ts"}
    assert json.loads((folder / "config.json").read_text())["step"] == 7


def test_the_export_of_a_registered_model_contains_its_version_and_figures(
    network: Inpainter, tmp_path: Path
) -> None:
    store = LocalStore(tmp_path / "root")
    save_generator(store, "runs/x", network.generator, {})
    summary = {"hole_psnr": 20.0, "pairs_digest": "p" * 64, "figures": {}}
    evaluation = small_root.commit(
        store, "evaluate", "evaluations", {"report.json": b"{}"}, summary=summary
    )
    record = {
        "model": "dpnet",
        "version": 1,
        "alias": "champion",
        "run": {"folder": "runs/x"},
        "evaluation": {"folder": evaluation.folder},
    }
    store.write("registry/dpnet/champion.json", json.dumps(record).encode())
    out = exported("", tmp_path / "out", "torchscript", root=str(store.folder))
    config = json.loads((out / "config.json").read_text())
    assert config["registry"] == {"model": "dpnet", "version": 1, "alias": "champion"}
    assert config["evaluation"] == summary
    card = (out / "README.md").read_text()
    assert card.startswith("# DPNet image inpainting: dpnet version 1")
    assert "is 20.00 dB" in card


def test_an_exported_model_loads_as_the_same_network(
    run: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = load_model(run), load_model(str(folder))
    assert one.config == other.config
    state = one.state_dict()
    assert state.keys() == other.state_dict().keys()
    assert all(torch.equal(state[name], value) for name, value in other.state_dict().items())
    monkeypatch.chdir(folder)
    assert load_model(".").config == one.config


def test_two_exports_of_a_network_have_the_same_bytes(network: Inpainter, folder: Path) -> None:
    assert export.MAKERS["onnx"](network) == (folder / "generator.onnx").read_bytes()


def run_card(folder: Path, work: Path, generator_files: list[str]) -> None:
    """Run the card's code unchanged, and compare its results with the network."""
    for name in [*generator_files, "model.safetensors", "config.json"]:
        (work / name).write_bytes((folder / name).read_bytes())
    rng = np.random.default_rng(0)
    photo = rng.integers(0, 256, (50, 70, 3), dtype=np.uint8)
    mask = np.zeros((50, 70), np.uint8)
    mask[10:30, 20:50] = 255
    Image.fromarray(photo).save(work / "photo.png")
    Image.fromarray(mask).save(work / "mask.png")
    card = (folder / "README.md").read_text()
    prepare, *uses = re.findall(r"```python\n(.*?)```", card, re.S)
    *graphs, save, package = uses
    assert len(graphs) == len(generator_files)
    generator = load_generator(LocalStore(work.parent), work.name)
    image = torch.from_numpy(photo).permute(2, 0, 1)[None] / 255
    with torch.inference_mode():
        raw = generator(image, torch.from_numpy(mask == 0)[None, None].float())[0]
    want = (raw.permute(1, 2, 0).numpy() * 255).round()
    check = "import sys; assert not any(m.split('.')[0] == 'dpnet' for m in sys.modules)\n"
    for snippet in graphs:
        code = prepare + snippet + save + check
        subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=work, check=True)
        filled = np.asarray(Image.open(work / "filled.png"))
        assert (filled[mask == 0] == photo[mask == 0]).all()
        assert np.abs(filled[mask > 0] - want[mask > 0]).max() <= 1
        (work / "filled.png").unlink()
    code = prepare + package + "filled.save('filled.png')"
    subprocess.run([sys.executable, "-c", code], cwd=work, check=True)
    filled = np.asarray(Image.open(work / "filled.png"))
    assert np.abs(filled[mask > 0] - want[mask > 0]).max() <= 1


@pytest.mark.slow
@pytest.mark.rotated(3)
def test_the_code_in_the_card_works(folder: Path, tmp_path: Path) -> None:
    run_card(folder, tmp_path, ["generator.onnx", "generator.ts"])


@pytest.mark.slow
@pytest.mark.rotated(3)
def test_the_code_in_the_card_works_for_torch_export(run: str, tmp_path: Path) -> None:
    out, work = exported(run, tmp_path / "out", "torch-export"), tmp_path / "work"
    work.mkdir()
    run_card(out, work, ["generator.pt2"])


def test_the_card_contains_training_and_evaluation() -> None:
    from dpnet.export.model_card import model_card

    means = {"dpnet": {"hole_psnr": 21.234, "ssim": 0.87654, "l1": None}}
    facts = {
        "step": 1200,
        "images": "i" * 64,
        "masks": "m" * 64,
        "evaluation": {
            "hole_psnr": 21.234,
            "pairs_digest": "p" * 64,
            "figures": {"mean_over_bins": means},
        },
    }
    card = model_card("dpnet version 3", SMALL, facts, ["onnx"], {"generator.onnx": 1e-7}, SHAPES)
    assert "# DPNet image inpainting: dpnet version 3" in card
    assert "steps: 1200" in card
    for digest in ("i" * 64, "m" * 64, "p" * 64):
        assert digest in card
    assert "| DPNet | 21.23 | 0.8765 | not computed |" in card
    assert "white (255) is the hole" in card
    assert "No evaluation is recorded" in model_card("x", SMALL, {}, ["onnx"], {}, SHAPES)


def test_an_export_logs_each_step(
    run: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "dpnet")
    export_model(run, tmp_path / "out", ["torchscript", "onnx"], root="")
    logged = [record.getMessage() for record in caplog.records]
    assert logged[:3] == [
        f"export: loads {run}",
        "export: writes generator.ts, graph 1 of 2",
        "export: compares generator.ts with the network",
    ]
    assert logged[3].startswith("export: generator.ts took ")
    assert "export: writes generator.onnx, graph 2 of 2" in logged


def test_no_file_remains_if_a_graph_differs_from_the_network(
    run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "TOLERANCE", -1.0)
    with pytest.raises(PipelineError, match=r"generator\.ts differs from the network by"):
        exported(run, tmp_path / "out", "torchscript")
    assert list(tmp_path.iterdir()) == []


def test_a_network_that_returns_nan_is_not_exported(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "store")
    generator = build_generator(SMALL)
    torch.nn.init.constant_(generator.out.weight, float("nan"))
    save_generator(store, "run", generator, {})
    with pytest.raises(PipelineError, match="differs from the network by nan"):
        exported(str(store.folder / "run"), tmp_path / "out", "torchscript")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_not_empty_is_refused_and_not_changed(run: str, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    for place in (tmp_path, tmp_path / "mine"):
        with pytest.raises(PipelineError, match="exists already: choose a new or empty folder"):
            exported(run, place, "torchscript")
    assert (tmp_path / "mine").read_text() == "mine"


def test_a_folder_that_cannot_be_created_is_reported(run: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(PipelineError, match=r"cannot write .*: Not a directory"):
        exported(run, tmp_path / "file" / "out", "torchscript")


def test_missing_packages_for_onnx_are_reported_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "find_spec", lambda name: None)
    with pytest.raises(PipelineError, match=r"needs onnx and onnxruntime, .* 'dpnet-pipeline\["):
        export_model("/nowhere", tmp_path / "out", ["onnx"], root="")


def test_every_format_has_a_file_and_a_maker() -> None:
    from dpnet.cli.parser import build_parser

    assert FILES.keys() == export.MAKERS.keys()
    formats = [word for name in FILES for word in ("--format", name)]
    assert build_parser().parse_args(["export", "-o", "x", *formats]).format == list(FILES)
