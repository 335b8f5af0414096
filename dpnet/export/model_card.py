"""The model card, README.md of an exported model: its training, its figures and its use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dpnet.evaluation.protocol import BRIEF, METHODS, METRICS
from dpnet.model import ModelConfig
from dpnet.registry.card import data_section, evaluation_section, licence_section

FILES = {
    "torch-export": "generator.pt2",
    "onnx": "generator.onnx",
    "torchscript": "generator.ts",
}
_METRICS = {name: METRICS[name] for name in BRIEF}

_PREPARE = """\
Every example below continues these lines:

```python
import numpy as np
from PIL import Image

photo = Image.open("photo.png").convert("RGB")
mask = Image.open("mask.png").convert("L")  # has the photo's size; white (255) is the hole
image = np.asarray(photo, np.float32).transpose(2, 0, 1)[None] / 255
valid = (np.asarray(mask) < 128).astype(np.float32)[None, None]  # 1 = known, 0 = hole
```
"""
_SAVE = """\
## Save the result

```python
pixels = np.asarray(composite)[0].transpose(1, 2, 0)
Image.fromarray((pixels * 255).round().astype(np.uint8)).save("filled.png")
```
"""
_USE = {
    "torch-export": """\
## generator.pt2: PyTorch

Loading is slow. Calls are fast.

```python
import torch

program = torch.export.load("generator.pt2").module()
with torch.inference_mode():
    composite = program(torch.from_numpy(image), torch.from_numpy(valid))
```
""",
    "onnx": """\
## generator.onnx: ONNX Runtime

```python
import onnxruntime

session = onnxruntime.InferenceSession("generator.onnx", providers=["CPUExecutionProvider"])
(composite,) = session.run(None, {"image": image, "valid": valid})
```
""",
    "torchscript": """\
## generator.ts: TorchScript

```python
import torch

network = torch.jit.load("generator.ts", map_location="cpu")
with torch.inference_mode():
    composite = network(torch.from_numpy(image), torch.from_numpy(valid))
```
""",
}
_WEIGHTS = """\
## model.safetensors and config.json: the package dpnet-pipeline

The package fills photos of any size and kind; large ones in tiles. "." is this folder.

```python
import dpnet

filled = dpnet.inpaint(photo, mask, ".")
```

On the command line: `dpnet inpaint photo.png mask.png -o filled.png --model FOLDER`.
"""
_CONTINUE = """\
## training_state.safetensors: train on

The generator and its average, the discriminator and the state of both optimisers after step {step}.
`dpnet train CONFIG --set train.init_from=FOLDER` continues them on your photos, with the schedule
of your config from its step 0. Without this file it starts from the generator alone.
"""


def model_card(
    name: str,
    config: ModelConfig,
    facts: Mapping[str, Any],
    formats: Sequence[str],
    differences: Mapping[str, float],
    checked: Sequence[tuple[int, int, int]],
    registered: Mapping[str, Any] | None = None,
) -> str:
    """Return the model card in Markdown.

    Args:
        name: the model's name.
        config: the network's configuration.
        facts: what is known about training and evaluation.
        formats: the formats of the exported graphs.
        differences: largest difference of each graph from the network, by file name.
        checked: (batch, height, width) of the compared images.
        registered: what the registry knows about the model, if it is a registered version.
    """
    network = ", ".join(f"{key} {_plain(value)}" for key, value in config.to_json().items())
    parts = [
        f"# DPNet image inpainting: {name}\n\n"
        "This model fills the holes of photos. It has a mask-aware pyramidal encoder, and a decoder"
        " with pyramidal attention and dynamic normalization. The paper is: Wang, Shao, Meng, Zuo:"
        " Dual-Pyramidal Image Inpainting with Dynamic Normalization (IEEE TCSVT 2022, DOI"
        " 10.1109/TCSVT.2022.3165587). Its authors have published no code and no weights. This is"
        " an independent implementation, and the weights are not theirs.\n\n"
        f"Network: {network}.\n",
        _training(facts) if registered is None else data_section(registered),
        _evaluation(facts) if registered is None else evaluation_section(registered),
    ]
    parts += [_contract(formats), _PREPARE, *(_USE[each] for each in formats), _SAVE]
    parts += [_checks(differences, checked), _WEIGHTS]
    if state := facts.get("training_state"):
        parts.append(_CONTINUE.format(step=state["step"]))
    parts += [_LIMITS, licence_section(registered or {})]
    return "\n".join(parts)


def _training(facts: Mapping[str, Any]) -> str:
    """Return the section about the training."""
    known = {
        "step": "steps",
        "images": "content digest of the image shards",
        "masks": "content digest of the mask shards",
    }
    rows = [f"* {label}: {facts[key]}" for key, label in known.items() if key in facts]
    return "## Training\n\n" + ("\n".join(rows) or "No facts are recorded.") + "\n"


def _evaluation(facts: Mapping[str, Any]) -> str:
    """Return the section about the evaluation, with a table of mean figures."""
    evaluation = facts.get("evaluation")
    if not evaluation:
        return (
            "## Evaluation\n\nNo evaluation is recorded with this model. To have the figures here,"
            " export it from the registry (models:/NAME@champion).\n"
        )
    lines = [
        "## Evaluation\n",
        "The hole PSNR, as a mean over the bins of hole ratio, is"
        f" {evaluation['hole_psnr']:.2f} dB. The digest of the evaluated pairs of images and masks"
        f" is {evaluation['pairs_digest']}.",
    ]
    if means := evaluation["figures"].get("mean_over_bins"):
        lines += [
            "",
            "| method | " + " | ".join(m.label for m in _METRICS.values()) + " |",
            "|---|" + "---|" * len(_METRICS),
        ]
        for method, label in METHODS.items():
            if method in means:
                cells = [_figure(means[method].get(key), m.digits) for key, m in _METRICS.items()]
                lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _figure(value: float | None, digits: int) -> str:
    return "not computed" if value is None else f"{value:.{digits}f}"


def _contract(formats: Sequence[str]) -> str:
    """Return the section about inputs and outputs."""
    files = ", ".join(FILES[each] for each in formats)
    return f"""\
## Input and output of {files}

* `image`: float32 N x 3 x H x W, RGB in [0, 1]. Its pixels in the hole have no influence.
* `valid`: float32 N x 1 x H x W, **1 where a pixel is known, 0 in the hole**. Mask files have the
  opposite values: white (255) is the hole. Values above 0.5 count as known.
* `composite`: float32 N x 3 x H x W: the image with its hole filled. Known pixels do not change.

N, H and W may have any value, up to about 512 x 512 pixels (see Limits). The files contain no
Python objects and do not need our code.
"""


def _checks(differences: Mapping[str, float], checked: Sequence[tuple[int, int, int]]) -> str:
    """Return the section about the comparison of the graphs with the network."""
    shapes = " and ".join(f"{n} x 3 x {height} x {width}" for n, height, width in checked)
    rows = "\n".join(f"* {file}: {worst:.1e}" for file, worst in differences.items())
    return (
        "## Checks\n\nEach file was compared with the network itself, on the CPU, with images of"
        f" {shapes}. The largest difference of a colour in [0, 1] was:\n\n{rows}\n"
    )


_LIMITS = """\
## Limits

* The model invents the pixels in the hole. They do not show what was really there.
* The memory of the graphs grows with the square of the number of pixels. Above 512 x 512 pixels the
  network averages the maps of attention, and the graphs do not, so their results differ. `dpnet
  inpaint` fills images of any size.
* A known pixel that is NaN or infinite makes the result NaN.
* Expect figures like those of the evaluation only for photos and masks that are similar to the
  training data.
"""


def _plain(value: Any) -> str:
    return "/".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
