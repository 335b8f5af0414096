"""Read the VGG weights of the perceptual and style losses. Needs only torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from data_prep.core.errors import PipelineError
from dpnet.model import losses as L
from dpnet.training.state import first_line, placed


def load_vgg(file: Path, kind: str, device: torch.device) -> L.VGGFeatures:
    """Read a file of torchvision's VGG weights into a frozen feature network.

    Raises PipelineError if the file holds anything else.

    Args:
        file: A .pth or .safetensors file.
        kind: "vgg16" or "vgg19".
        device: Where to put the network.
    """
    where = f"losses.vgg_weights {str(file)!r}"
    advice = f"save torchvision's {kind} weights again, or leave the option out."
    try:
        weights = _read_weights(file)
    except Exception as error:
        raise PipelineError(
            f"{where} cannot be read ({first_line(error)}): it is missing, cut short or of another"
            f" kind. To mend it, {advice}"
        ) from error
    if not isinstance(weights, dict) or not all(isinstance(w, Tensor) for w in weights.values()):
        raise PipelineError(f"{where} holds no named weights: {advice}")
    # Up to the third stage, both networks have the same shapes under the same names.
    other, mark = {"vgg19": ("vgg16", 17), "vgg16": ("vgg19", 16)}[kind]
    if f"features.{mark}.weight" in weights:
        raise PipelineError(f"{where} holds weights of {other}: set losses.vgg to {other}.")
    try:
        return placed(L.VGGFeatures(weights, cast("Any", kind)), device)
    except (ValueError, KeyError, RuntimeError) as error:
        raise PipelineError(
            f"{where} does not hold the weights of torchvision's {kind}"
            f" ({' '.join(str(error).split()).rstrip('.')}): {advice}"
        ) from error


def _read_weights(file: Path) -> Any:
    if file.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(file)
    return torch.load(file, map_location="cpu", weights_only=True)
