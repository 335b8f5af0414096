"""Export a trained generator: weights, graphs that run without our code, and a model card.

A graph has the inputs `image` (N 3 H W, float32 in [0, 1]) and `valid` (N 1 H W, 1 = known) of any
batch and size. Its output `composite` is the image with its hole filled. Graphs use the plain form
of attention: its memory grows with the square of the number of pixels.
"""

from __future__ import annotations

import io
import logging
import secrets
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from data_prep.core.digest import sha256_bytes
from data_prep.core.errors import ConfigError, PipelineError
from data_prep.core.manifest import read_manifest
from data_prep.core.storage.local import LocalStore
from data_prep.core.storage.store import Store
from data_prep.core.text import duration
from dpnet.export.model_card import FILES, model_card
from dpnet.model import Generator
from dpnet.model.generator import MULTIPLE
from dpnet.model_store.find_model import find_model
from dpnet.model_store.layout import EXPORTED, RUN, TRAINING_STATE, find_layout
from dpnet.model_store.records import find_record
from dpnet.model_store.weights import load_generator, read_config, save_generator
from dpnet.registry.card import card_facts, eval_results
from dpnet.training.exported_state import read_run_state

log = logging.getLogger(__name__)

TOLERANCE = 1e-3  # largest allowed difference between a graph's colour and the network's, in [0, 1]
EXAMPLE = (2, 48, 80)  # batch, height and width of the images for tracing
CHECKED = ((1, 64, 96), (3, 37, 53))  # the same of the images for the comparison
OPSET = 18  # of ONNX
_NEEDS = {"onnx": ("onnx", "onnxruntime")}  # optional packages that a format needs

EVAL_RESULTS = ".eval_results/dpnet.yaml"  # where Hugging Face's Hub looks for figures

Graph = Callable[[Tensor, Tensor], Tensor]


class Inpainter(nn.Module):
    """The exported module: `forward(image_N3HW in [0, 1], valid_N1HW) -> composite_N3HW`.

    A pixel is known where `valid` is above 0.5. Known pixels do not change.
    """

    def __init__(self, generator: Generator) -> None:
        super().__init__()
        self.generator = generator
        self.eval()  # torch.onnx.export restores the mode of this module in all its parts

    def forward(self, image: Tensor, valid: Tensor) -> Tensor:
        """Fill the hole of each image."""
        known = valid > 0.5
        mask = known.to(image.dtype)
        height, width = image.shape[2:]
        if torch.compiler.is_exporting():
            pad = (0, _padded(width) - width, 0, _padded(height) - height)
            raw = self.generator(F.pad(image, pad), F.pad(mask, pad))[:, :, :height, :width]
        else:
            raw = self.generator(image, mask)
        return torch.where(known, image, raw)


def _padded(side: int) -> int:
    """Return the next multiple of 16 as a new symbol of `torch.export`.

    All sizes in the network are then multiples of one symbol. If they are expressions of the
    input's side instead, torch needs minutes to analyse them and adds guards that refuse small
    images.
    """
    units = cast("int", torch.scalar_tensor(-(-side // MULTIPLE), dtype=torch.int64).item())
    torch._check(units >= 1)  # type: ignore[no-untyped-call]
    torch._check(MULTIPLE * units >= side)  # type: ignore[no-untyped-call]
    return MULTIPLE * units


def export_model(
    reference: str, out: Path, formats: Sequence[str], *, root: str, with_state: bool = False
) -> dict[str, Any]:
    """Write a model to a folder for use without this package.

    Args:
        reference: name of a model, as for `load_model`.
        out: new or empty folder. It gets model.safetensors, config.json and README.md.
        formats: torch-export, onnx, torchscript; they add generator.pt2, .onnx and .ts. Each graph
            is loaded again and compared with the network.
        root: where models are searched.
        with_state: add the training state of the run's newest checkpoint, from which others can
            continue the training.

    Returns:
        JSON values: the model's name, the sizes of the files in bytes, and the largest differences.

    Raises:
        PipelineError: a step failed. Then nothing is written.
    """
    formats = list(dict.fromkeys(formats))
    for name in formats:
        _check_installed(name)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} exists already: choose a new or empty folder (-o).")
    store, folder, used = find_model(reference, root)
    log.info("export: loads %s", used)
    generator = load_generator(store, folder)
    facts = _facts(store, folder, reference)
    state = None
    if with_state:
        if find_layout(store, folder) != RUN:
            raise ConfigError(
                f"{used} is an exported model, so its run's checkpoints are not there: give the run"
                " or the registered version, or leave --training-state out."
            )
        step, state = read_run_state(store, folder)
        facts["training_state"] = {"step": step, "sha256": sha256_bytes(state)}
        log.info("export: the training state is that of step %d", step)
        if step < facts.get("step", 0):
            log.warning(
                "export: the model is that of step %d, and the newest checkpoint that is left of"
                " step %d: `dpnet gc` removes the later ones of finished runs.",
                facts["step"],
                step,
            )
    registered = None
    if not reference or reference.startswith("models:/"):
        registered = card_facts(store, find_record(store, reference))
    new = out.parent / f".{out.name}-{secrets.token_hex(4)}"
    try:
        new.mkdir(parents=True)
        if state is not None:
            (new / TRAINING_STATE).write_bytes(state)
        differences = _write(new, generator, used, facts, formats, registered)
        new.rename(out)  # replaces an empty folder
    except OSError as error:
        reason = error.strerror or error
        raise PipelineError(f"cannot write {out}: {reason}. Choose another folder (-o).") from error
    finally:
        shutil.rmtree(new, ignore_errors=True)
    return {
        "model": used,
        "out": str(out),
        "files": {
            path.relative_to(out).as_posix(): path.stat().st_size
            for path in sorted(out.rglob("*"))
            if path.is_file()
        },
        "differences": differences,
    }


def _write(
    folder: Path,
    generator: Generator,
    name: str,
    facts: Mapping[str, Any],
    formats: Sequence[str],
    registered: Mapping[str, Any] | None,
) -> dict[str, float]:
    """Write all files of an exported model.

    Args:
        folder: an existing folder.
        generator: the model.
        name: the model's name for the card.
        facts: what is known about its training and evaluation.
        formats: the graphs to write.
        registered: what the registry knows about the model, if it is a registered version.

    Returns:
        The largest difference of each graph from the network, by file name.
    """
    save_generator(LocalStore(folder.parent), folder.name, generator, facts, EXPORTED)
    network = Inpainter(generator)
    cases = [example(*shape, seed=seed) for seed, shape in enumerate(CHECKED)]
    with torch.inference_mode():
        wanted = [network(*case) for case in cases]
    differences = {}
    for number, each in enumerate(formats, 1):
        start = time.monotonic()
        log.info("export: writes %s, graph %d of %d", FILES[each], number, len(formats))
        data = MAKERS[each](network)
        (folder / FILES[each]).write_bytes(data)
        log.info("export: compares %s with the network", FILES[each])
        differences[FILES[each]] = worst = _difference(each, data, cases, wanted)
        log.info("export: %s took %s", FILES[each], duration(time.monotonic() - start))
        if not worst <= TOLERANCE:  # also if it is NaN
            raise PipelineError(
                f"{FILES[each]} differs from the network by {worst:.2g} in [0, 1], and at most"
                f" {TOLERANCE} is allowed: choose another --format."
            )
    card = model_card(name, generator.config, facts, formats, differences, CHECKED, registered)
    (folder / "README.md").write_text(card, "utf-8")
    if registered is not None and (results := eval_results(registered)):
        (folder / EVAL_RESULTS).parent.mkdir()
        (folder / EVAL_RESULTS).write_text(results, "utf-8")
    return differences


def _facts(store: Store, folder: str, reference: str) -> dict[str, Any]:
    """Return what is known about a model: its training, and its evaluation if it has one."""
    record, _ = read_config(store, folder)
    facts = {k: v for k, v in record.items() if k not in ("format", "model", "weights_sha256")}
    if not reference or reference.startswith("models:/"):
        entry = find_record(store, reference)
        evaluation = read_manifest(store, entry["evaluation"]["folder"]).summary
        facts["registry"] = {key: entry[key] for key in ("model", "version", "alias")}
        facts["evaluation"] = {
            key: evaluation[key] for key in ("hole_psnr", "pairs_digest", "figures")
        }
    return facts


def _check_installed(name: str) -> None:
    """Raise PipelineError if a package for the format is missing."""
    missing = [package for package in _NEEDS.get(name, ()) if find_spec(package) is None]
    if missing:
        raise PipelineError(
            f"--format {name} needs {' and '.join(missing)}, which is not installed: run"
            " `pip install 'dpnet-pipeline[export]'`."
        )


def example(batch: int, height: int, width: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return random images, and masks with a box and scattered pixels unknown."""
    random = torch.Generator().manual_seed(seed)
    image = torch.rand(batch, 3, height, width, generator=random)
    valid = (torch.rand(batch, 1, height, width, generator=random) > 0.1).float()
    valid[:, :, height // 4 : height // 2, width // 4 : width // 2] = 0
    return image, valid


def torch_export(network: Inpainter) -> bytes:
    """Return a program for `torch.export.load`."""
    batch, height, width = (torch.export.Dim(name) for name in ("batch", "height", "width"))
    sizes = {0: batch, 2: height, 3: width}
    with torch.no_grad(), _quiet():
        program = torch.export.export(
            network, example(*EXAMPLE), dynamic_shapes={"image": sizes, "valid": sizes}
        )
        for node in program.graph.nodes:
            # The places in our source files are large, and useless elsewhere.
            for key in ("stack_trace", "nn_module_stack", "source_fn_stack", "torch_fn"):
                node.meta.pop(key, None)
        program.example_inputs = None
        data = io.BytesIO()
        torch.export.save(program, data)
    return data.getvalue()


def torchscript(network: Inpainter) -> bytes:
    """Return a traced module for `torch.jit.load`."""
    data = io.BytesIO()
    with torch.no_grad(), _quiet():
        # No check by torch: `_difference` compares at other sizes than the example's.
        traced = torch.jit.trace(network, example(*EXAMPLE), check_trace=False)  # type: ignore[no-untyped-call]
        torch.jit.save(traced, data)
    return data.getvalue()


def onnx(network: Inpainter) -> bytes:
    """Return an ONNX model.

    It uses torch's older exporter, which traces. The newer exporter gives the same values, but
    needs many times as long with these dynamic sizes (torch 2.13).
    """
    sizes = {0: "batch", 2: "height", 3: "width"}
    data = io.BytesIO()
    with torch.no_grad(), _quiet():
        torch.onnx.register_custom_op_symbolic(  # type: ignore[attr-defined]
            "aten::atanh", _atanh, OPSET
        )
        try:
            torch.onnx.export(
                network,
                example(*EXAMPLE),
                data,  # type: ignore[arg-type]  # the older exporter accepts a file too
                dynamo=False,
                opset_version=OPSET,
                input_names=["image", "valid"],
                output_names=["composite"],
                dynamic_axes={"image": sizes, "valid": sizes, "composite": sizes},
            )
        finally:
            torch.onnx.unregister_custom_op_symbolic(  # type: ignore[attr-defined]
                "aten::atanh", OPSET
            )
    return data.getvalue()


def _atanh(graph: Any, x: Any) -> Any:
    """Translate atanh, which the older exporter does not know."""
    return graph.op("Atanh", x)


MAKERS = {"torch-export": torch_export, "onnx": onnx, "torchscript": torchscript}


def load_graph(name: str, data: bytes) -> Graph:
    """Load the file of a format, and return it as a function of images and masks."""
    if name == "torch-export":
        return torch.export.load(io.BytesIO(data)).module()
    if name == "torchscript":
        with _quiet():
            return cast("Graph", torch.jit.load(io.BytesIO(data)))  # type: ignore[no-untyped-call]
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])

    def run(image: Tensor, valid: Tensor) -> Tensor:
        return torch.from_numpy(
            session.run(None, {"image": image.numpy(), "valid": valid.numpy()})[0]
        )

    return run


def _difference(
    name: str, data: bytes, cases: Sequence[tuple[Tensor, Tensor]], wanted: Sequence[Tensor]
) -> float:
    """Return the largest difference between the outputs of a graph and the wanted ones.

    Args:
        name: the format.
        data: the content of the graph's file.
        cases: (images, masks) to run.
        wanted: the network's outputs for them.
    """
    graph = load_graph(name, data)
    with torch.inference_mode():
        worst = [
            (graph(*case) - want).abs().max() for case, want in zip(cases, wanted, strict=True)
        ]
    return float(torch.stack(worst).max())  # NaN if one is NaN


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide torch's warnings about deprecated formats and about constants in traces."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
