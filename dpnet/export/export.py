"""Write a trained generator for use elsewhere: weights, graphs that need no code of ours, a card.

The graphs take `image` (N3HW, float32 in [0, 1]) and `valid` (N1HW, 1 = known) of any batch and
size and give `composite`, the image with its hole filled. They attend by the plain form, whose
memory grows with the square of the pixels.
"""

from __future__ import annotations

import io
import secrets
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from data_prep.core.errors import PipelineError
from data_prep.core.manifest import read_manifest
from data_prep.core.progress import say
from data_prep.core.storage.local import LocalStore
from data_prep.core.storage.store import Store
from dpnet.export.model_card import FILES, model_card
from dpnet.model import Generator
from dpnet.model.generator import MULTIPLE
from dpnet.model_store.find_model import find_model
from dpnet.model_store.records import find_record
from dpnet.model_store.weights import EXPORTED, load_generator, read_config, save_generator

TOLERANCE = 1e-3  # how far a graph's colours, in [0, 1], may be from the network's
EXAMPLE = (2, 48, 80)  # batch, height, width that graphs are traced at
CHECKED = ((1, 64, 96), (3, 37, 53))  # the same that they are compared at
OPSET = 18
_NEEDS = {"onnx": ("onnx", "onnxruntime")}  # packages of a format that are optional

Graph = Callable[[Tensor, Tensor], Tensor]


class Inpainter(nn.Module):
    """What is exported: `forward(image_N3HW in [0, 1], valid_N1HW) -> composite N3HW`.

    A pixel is known where `valid` is above 0.5. Known pixels come back as they are.
    """

    def __init__(self, generator: Generator) -> None:
        super().__init__()
        self.generator = generator
        self.eval()  # itself too: torch.onnx.export puts all back in the mode that it finds here

    def forward(self, image: Tensor, valid: Tensor) -> Tensor:
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
    """The next multiple of 16, as a size of its own to `torch.export`.

    All sizes in the network are then plain multiples of one symbol; as expressions of the input's
    side they take torch minutes to reason about, and end in guards that shut out small images.
    """
    units = cast("int", torch.scalar_tensor(-(-side // MULTIPLE), dtype=torch.int64).item())
    torch._check(units >= 1)  # type: ignore[no-untyped-call]
    torch._check(MULTIPLE * units >= side)  # type: ignore[no-untyped-call]
    return MULTIPLE * units


def export_model(reference: str, out: Path, formats: Sequence[str], *, root: str) -> dict[str, Any]:
    """Write the model that `reference` names (see `load_model`) to the folder `out`.

    Always model.safetensors, config.json and README.md; for the formats torch-export, onnx and
    torchscript generator.pt2, .onnx and .ts, each of which is loaded again and compared with the
    network. Returns JSON values: the model's name, the files' sizes and the largest differences.
    Raises PipelineError, and leaves nothing behind, if any of it fails.
    """
    formats = list(dict.fromkeys(formats))
    for name in formats:
        _check_installed(name)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise PipelineError(f"{out} is there already: choose a new or empty folder.")
    store, folder, used = find_model(reference, root)
    generator = load_generator(store, folder)
    facts = _facts(store, folder, reference)
    new = out.parent / f".{out.name}-{secrets.token_hex(4)}"
    try:
        new.mkdir(parents=True)
        differences = _write(new, generator, used, facts, formats)
        new.rename(out)  # which may be there, empty
    except OSError as error:
        reason = error.strerror or error
        raise PipelineError(f"cannot write {out}: {reason}; choose another folder.") from error
    finally:
        shutil.rmtree(new, ignore_errors=True)
    return {
        "model": used,
        "out": str(out),
        "files": {path.name: path.stat().st_size for path in sorted(out.iterdir())},
        "differences": differences,
    }


def _write(
    folder: Path,
    generator: Generator,
    name: str,
    facts: Mapping[str, Any],
    formats: Sequence[str],
) -> dict[str, float]:
    """All files of an exported model; how far each graph is from the network at most."""
    save_generator(LocalStore(folder.parent), folder.name, generator, facts, EXPORTED)
    network = Inpainter(generator)
    cases = [example(*shape, seed=seed) for seed, shape in enumerate(CHECKED)]
    with torch.inference_mode():
        wanted = [network(*case) for case in cases]
    differences = {}
    for each in formats:
        say(f"export: {FILES[each]}")
        data = MAKERS[each](network)
        (folder / FILES[each]).write_bytes(data)
        differences[FILES[each]] = worst = _difference(each, data, cases, wanted)
        if not worst <= TOLERANCE:  # NaN is no success
            raise PipelineError(
                f"{FILES[each]} differs from the network by {worst:.2g} in [0, 1]; {TOLERANCE} is"
                " allowed: choose another --format."
            )
    card = model_card(name, generator.config, facts, formats, differences, CHECKED)
    (folder / "README.md").write_text(card, "utf-8")
    return differences


def _facts(store: Store, folder: str, reference: str) -> dict[str, Any]:
    """What is known of a model beside its weights: its training, and its evaluation if any."""
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
    missing = [package for package in _NEEDS.get(name, ()) if find_spec(package) is None]
    if missing:
        raise PipelineError(
            f"--format {name} needs {' and '.join(missing)}, not installed here: run"
            " `pip install 'dpnet-pipeline[export]'`."
        )


def example(batch: int, height: int, width: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A random image and a mask with a box and scattered pixels unknown."""
    random = torch.Generator().manual_seed(seed)
    image = torch.rand(batch, 3, height, width, generator=random)
    valid = (torch.rand(batch, 1, height, width, generator=random) > 0.1).float()
    valid[:, :, height // 4 : height // 2, width // 4 : width // 2] = 0
    return image, valid


def torch_export(network: Inpainter) -> bytes:
    """A program for `torch.export.load`."""
    batch, height, width = (torch.export.Dim(name) for name in ("batch", "height", "width"))
    sizes = {0: batch, 2: height, 3: width}
    with torch.no_grad(), _quiet():
        program = torch.export.export(
            network, example(*EXAMPLE), dynamic_shapes={"image": sizes, "valid": sizes}
        )
        for node in program.graph.nodes:
            # Where in our files an operation comes from is of no use elsewhere, and large.
            for key in ("stack_trace", "nn_module_stack", "source_fn_stack", "torch_fn"):
                node.meta.pop(key, None)
        program.example_inputs = None
        data = io.BytesIO()
        torch.export.save(program, data)
    return data.getvalue()


def torchscript(network: Inpainter) -> bytes:
    """A traced module for `torch.jit.load`."""
    data = io.BytesIO()
    with torch.no_grad(), _quiet():
        # Compared by us, at other sizes than the example's.
        traced = torch.jit.trace(network, example(*EXAMPLE), check_trace=False)  # type: ignore[no-untyped-call]
        torch.jit.save(traced, data)
    return data.getvalue()


def onnx(network: Inpainter) -> bytes:
    """An ONNX model.

    By torch's older exporter, which goes by the trace: the newer one gives the same figures but
    takes many times as long over these dynamic sizes (torch 2.13).
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
                data,  # type: ignore[arg-type]  # the older exporter takes a file too
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
    return graph.op("Atanh", x)  # which that exporter has forgotten


MAKERS = {"torch-export": torch_export, "onnx": onnx, "torchscript": torchscript}


def load_graph(name: str, data: bytes) -> Graph:
    """What the file of a format holds, to be called with an image and a mask."""
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
    """How far the graph in `data` is at most from what is wanted."""
    graph = load_graph(name, data)
    with torch.inference_mode():
        worst = [
            (graph(*case) - want).abs().max() for case, want in zip(cases, wanted, strict=True)
        ]
    return float(torch.stack(worst).max())  # NaN if any is


@contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's warnings: that formats are deprecated, and that tracing fixes constants."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
