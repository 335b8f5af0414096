"""Read named tensors from a weights file that a user gives, and check them before use."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from data_prep.core.digest import sha256_bytes
from data_prep.core.errors import ConfigError, PipelineError
from dpnet.evaluation.weights import WeightsFile


@dataclass(frozen=True)
class TensorFile:
    """The tensors of a weights file.

    Attributes:
        where: the file in messages, such as "the LPIPS weights '/w.pth'".
        network: whose weights they should be, such as "torchvision's AlexNet".
        advice: what to do about a file that cannot be used.
        tensors: by name.
    """

    where: str
    network: str
    advice: str
    tensors: Mapping[str, Tensor]

    def take(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Return a tensor as float32.

        Raises:
            ConfigError: it is missing, has another shape, or is not finite.
        """
        tensor = self.tensors.get(name)
        if tensor is None or tuple(tensor.shape) != shape:
            found = "missing" if tensor is None else tuple(tensor.shape)
            raise ConfigError(
                f"{self.where} are not those of {self.network} ({name} is {found}, not {shape}):"
                f" {self.advice}"
            )
        if not torch.isfinite(tensor.float()).all():
            raise ConfigError(
                f"{self.where} have values that are not finite in {name}: {self.advice}"
            )
        return tensor.float()


def read_tensors(file: WeightsFile, what: str, network: str, advice: str) -> TensorFile:
    """Read the tensors of a .safetensors or .pth file. No code in the file is run.

    Args:
        file: the file, with its digest when the evaluation was requested.
        what: whose weights they are, in messages.
        network: whose weights they should be.
        advice: what to do about a file that cannot be used.

    Raises:
        ConfigError: the file is cut short, or has no named tensors.
        PipelineError: the file is missing on this machine, or was changed.
    """
    where = f"the {what} weights {str(file.path)!r}"
    try:
        data = file.path.read_bytes()
    except FileNotFoundError:
        raise PipelineError(
            f"{where} are not on this machine: put the file there, or name it by a path that all"
            " machines of the cluster have."
        ) from None
    except OSError as error:
        raise PipelineError(f"{where} cannot be read ({error.strerror}): {advice}") from error
    try:
        if file.path.suffix == ".safetensors":
            from safetensors.torch import load

            found: Any = load(data)
        else:
            found = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:
        reason = " ".join(str(error).split()).partition(". ")[0].rstrip(".")[:200]
        raise ConfigError(
            f"{where} cannot be read ({reason}): the file is cut short or of another kind. To mend"
            f" it, {advice}"
        ) from error
    if sha256_bytes(data) != file.sha256:
        raise PipelineError(f"{where} were changed during the evaluation: run it again.")
    if not isinstance(found, dict) or not all(isinstance(w, Tensor) for w in found.values()):
        raise ConfigError(f"{where} are no named tensors: {advice}")
    return TensorFile(where, network, advice, found)
