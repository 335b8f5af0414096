"""The README.md of an exported model: what it is, what it was trained on, how to use each file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dpnet.evaluation.protocol import BRIEF, METHODS, METRICS
from dpnet.model import ModelConfig

FILES = {
    "torch-export": "generator.pt2",
    "onnx": "generator.onnx",
    "torchscript": "generator.ts",
}
_METRICS = {name: METRICS[name] for name in BRIEF}

_PREPARE = """\
Everything below goes on from these lines:

```python
import numpy as np
from PIL import Image

photo = Image.open("photo.png").convert("RGB")
mask = Image.open("mask.png").convert("L")  # of the photo's size, white (255) is the hole
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

Loading takes torch a while, a call does not.

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

Photographs of any size and kind, in tiles where they are large. "." is this folder.

```python
import dpnet

filled = dpnet.inpaint(photo, mask, ".")
```

On the command line: `dpnet inpaint photo.png mask.png -o filled.png --model FOLDER`.
"""


def model_card(
    name: str,
    config: ModelConfig,
    facts: Mapping[str, Any],
    formats: Sequence[str],
    differences: Mapping[str, float],
    checked: Sequence[tuple[int, int, int]],
) -> str:
    """Markdown. `differences` are by file name, `checked` the shapes they were found at."""
    network = ", ".join(f"{key} {_plain(value)}" for key, value in config.to_json().items())
    parts = [
        f"# DPNet image inpainting: {name}\n\n"
        "Fills the holes of photographs. A mask-aware pyramidal encoder, a decoder with pyramidal"
        " attention and dynamic normalization, after Wang, Shao, Meng, Zuo: Dual-Pyramidal Image"
        " Inpainting with Dynamic Normalization (IEEE TCSVT 2022, DOI 10.1109/TCSVT.2022.3165587)."
        " The authors have published no code and no weights: this is an independent"
        " implementation, and these are not their weights.\n\n"
        f"Network: {network}.\n",
        _training(facts),
        _evaluation(facts),
    ]
    parts += [_contract(formats), _PREPARE, *(_USE[each] for each in formats), _SAVE]
    parts += [_checks(differences, checked), _WEIGHTS, _LIMITS]
    return "\n".join(parts)


def _training(facts: Mapping[str, Any]) -> str:
    known = {
        "step": "steps",
        "images": "content digest of the image shards",
        "masks": "content digest of the mask shards",
    }
    rows = [f"* {label}: {facts[key]}" for key, label in known.items() if key in facts]
    return "## Training\n\n" + ("\n".join(rows) or "Nothing is recorded.") + "\n"


def _evaluation(facts: Mapping[str, Any]) -> str:
    evaluation = facts.get("evaluation")
    if not evaluation:
        return (
            "## Evaluation\n\nNone is recorded with this model: export it from the registry"
            " (models:/NAME@champion) to have the figures here.\n"
        )
    lines = [
        "## Evaluation\n",
        f"Mean over the hole-ratio bins of hole PSNR: {evaluation['hole_psnr']:.2f} dB, on the"
        f" pairs of images and masks with digest {evaluation['pairs_digest']}.",
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
    files = ", ".join(FILES[each] for each in formats)
    return f"""\
## Input and output of {files}

* `image`: float32 N x 3 x H x W, RGB in [0, 1]. What it holds in the hole has no influence.
* `valid`: float32 N x 1 x H x W, **1 where a pixel is known, 0 in the hole**. Mask files are the
  other way round: white (255) is the hole. Values above 0.5 count as known.
* `composite`: float32 N x 3 x H x W: known pixels as they were given, the hole filled.

N, H and W are free, up to about 512 x 512 pixels (see Limits). The files hold no Python objects and
need none of our code.
"""


def _checks(differences: Mapping[str, float], checked: Sequence[tuple[int, int, int]]) -> str:
    shapes = " and ".join(f"{n} x 3 x {height} x {width}" for n, height, width in checked)
    rows = "\n".join(f"* {file}: {worst:.1e}" for file, worst in differences.items())
    return (
        "## Checked\n\nLargest difference of a colour in [0, 1] from the network itself, on the"
        f" CPU, at {shapes}:\n\n{rows}\n"
    )


_LIMITS = """\
## Limits

* What is filled in is invented. It is no evidence of what was there.
* The memory of the graphs grows with the square of the number of pixels. Above 512 x 512 the
  network itself averages attention's maps, which the graphs do not, so their results differ there.
  `dpnet inpaint` works on images of any size.
* A known pixel that is NaN or infinite makes the result NaN.
* It does as well as on its evaluation only on photographs and masks that are like those it was
  trained on.

## Licence

The code is under Apache-2.0. Which terms apply to the weights depends on the photographs they were
trained on, which whoever trained them has to know.
"""


def _plain(value: Any) -> str:
    return "/".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
