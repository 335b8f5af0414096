"""The training state in an exported folder, with which others continue the training of a model.

A checkpoint is for the run that wrote it. This file is for everybody: safetensors, so it holds only
tensors, by these names:

* `generator.NAME`, `ema.NAME` (the averaged generator), `discriminator.NAME`;
* `generator_optimizer.KEY.NAME`, `discriminator_optimizer.KEY.NAME`: what Adam keeps for the weight
  NAME; KEY is step, exp_avg or exp_avg_sq. A weight that never had a gradient has none.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from data_prep.core.digest import sha256_bytes
from data_prep.core.errors import PipelineError
from data_prep.core.storage.store import Store
from dpnet.model import ModelConfig, build_discriminator, build_generator
from dpnet.model_store.layout import TRAINING_STATE
from dpnet.training.checkpoints import newest
from dpnet.training.state import TrainState

_MODULES = ("generator", "ema", "discriminator")
_OPTIMIZERS = {"generator_optimizer": "generator", "discriminator_optimizer": "discriminator"}
_KEYS = ("exp_avg", "exp_avg_sq", "step")  # of Adam


def read_run_state(store: Store, run: str) -> tuple[int, bytes]:
    """Return the step of a run's newest checkpoint, and its state as a file for others.

    Args:
        store: The root.
        run: Key of the run's folder.

    Raises:
        PipelineError: The run has no checkpoint, or it is damaged or of another version.
    """
    found = newest(store, run)
    if found is None:
        raise PipelineError(
            f"{store.label}/{run} has no checkpoint, so there is no training state to export:"
            " `dpnet gc` removes those of finished runs. Leave --training-state out, or train"
            " again."
        )
    where = f"{store.label}/{found.mark.folder}"
    try:
        return found.mark.step, encode_state(found.state)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise PipelineError(
            f"the checkpoint {where} was not made by this version of dpnet: export it with the"
            " version that trained it."
        ) from error


def encode_state(saved: Mapping[str, Any]) -> bytes:
    """Return what `TrainState.to_dict` returned as safetensors."""
    config = ModelConfig.from_json(saved["model"])
    modules: dict[str, nn.Module] = {
        "generator": build_generator(config),
        "discriminator": build_discriminator(config),
    }
    tensors = {
        f"{part}.{name}": tensor for part in _MODULES for name, tensor in saved[part].items()
    }
    for optimizer, module in _OPTIMIZERS.items():
        names = [name for name, _ in modules[module].named_parameters()]
        for index, kept in saved[optimizer]["state"].items():
            for key in _KEYS:
                tensors[f"{optimizer}.{key}.{names[index]}"] = kept[key]
    return save({name: tensor.contiguous() for name, tensor in tensors.items()})


def load_state(state: TrainState, store: Store, folder: str, sha256: str) -> None:
    """Load the training state of an exported folder: networks and optimisers, not the step.

    Args:
        state: The state to change. Its schedule starts at step 0.
        store: The store with the folder.
        folder: Key of the exported folder.
        sha256: Wanted hash of the file.

    Raises:
        PipelineError: The file is missing, was altered, or is that of another network.
    """
    where = f"{store.label}/{folder}/{TRAINING_STATE}"
    try:
        data = store.read(f"{folder}/{TRAINING_STATE}")
    except FileNotFoundError:
        raise PipelineError(f"{where} is missing: restore the file, or export it again.") from None
    if sha256_bytes(data) != sha256:
        raise PipelineError(
            f"{where} was altered or cut short: its hash is not {sha256[:12]}…. Restore the file,"
            " or export it again."
        )
    try:
        tensors = load(data)
    except (SafetensorError, KeyError, ValueError, RuntimeError, TypeError) as error:
        raise PipelineError(f"{where} is not a safetensors file: export it again.") from error
    if problem := _problem(state, tensors):
        raise PipelineError(
            f"{where} does not fit this config's networks ({problem}): set the same preset and"
            f" switches in `model`, or remove the file to start from the generator alone."
        )
    for part in _MODULES:
        module: nn.Module = getattr(state, part)
        module.load_state_dict({name: tensors[f"{part}.{name}"] for name in module.state_dict()})
    for optimizer, part in _OPTIMIZERS.items():
        adam: torch.optim.Adam = getattr(state, optimizer)
        kept = {
            index: {key: _like(weight, tensors[f"{optimizer}.{key}.{name}"], key) for key in _KEYS}
            for index, (name, weight) in enumerate(getattr(state, part).named_parameters())
            if f"{optimizer}.{_KEYS[0]}.{name}" in tensors
        }
        # The settings of the optimiser stay those of this run.
        adam.load_state_dict({**adam.state_dict(), "state": kept})


def _like(weight: Tensor, kept: Tensor, key: str) -> Tensor:
    """Return a moment with the strides of its weight, as Adam's fused form needs it."""
    return kept if key == "step" else torch.empty_like(weight).copy_(kept)


def _problem(state: TrainState, found: Mapping[str, Tensor]) -> str:
    """Return how the tensors of a file differ from those that `state` needs, or ""."""
    wanted = dict(_wanted(state, found))
    if missing := sorted(wanted.keys() - found.keys()):
        return f"it lacks {missing[0]}"
    if extra := sorted(found.keys() - wanted.keys()):
        return f"it has {extra[0]}, which is unknown"
    for name, shape in sorted(wanted.items()):
        if found[name].shape != shape:
            return f"{name} has the shape {tuple(found[name].shape)}, not {tuple(shape)}"
        if not found[name].is_floating_point() and not name.endswith("num_batches_tracked"):
            return f"{name} does not hold floating-point numbers"
    return ""


def _wanted(state: TrainState, found: Mapping[str, Tensor]) -> Iterator[tuple[str, torch.Size]]:
    """Yield the name and shape of each tensor that a file for `state` has."""
    for part in _MODULES:
        for name, tensor in getattr(state, part).state_dict().items():
            yield f"{part}.{name}", tensor.shape
    for optimizer, part in _OPTIMIZERS.items():
        for name, weight in getattr(state, part).named_parameters():
            names = [f"{optimizer}.{key}.{name}" for key in _KEYS]
            if any(each in found for each in names):
                for key, each in zip(_KEYS, names, strict=True):
                    yield each, torch.Size([]) if key == "step" else weight.shape
