"""A trained generator in storage: safetensors weights, and their config next to them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from data_prep.core.digest import sha256_bytes
from data_prep.core.errors import PipelineError
from data_prep.core.manifest import FileRecord
from data_prep.core.record import parse_json
from data_prep.core.storage.store import Store
from dpnet.model import Generator, ModelConfig, build_generator
from dpnet.model_store.layout import EXPORTED, RUN, TRAINING_STATE, Layout, find_layout

FORMAT = 1


def save_generator(
    store: Store, folder: str, generator: Generator, facts: Mapping[str, Any], layout: Layout = RUN
) -> list[FileRecord]:
    """Write the weights, then the config with the hash of the weights.

    Args:
        store: the store to write to.
        folder: key of the folder.
        generator: the generator to save.
        facts: further entries of the config.
        layout: paths in the folder.

    Returns:
        The records of both files.
    """
    state = {name: t.detach().cpu().contiguous() for name, t in generator.state_dict().items()}
    weights = save(state)
    record = {
        "format": FORMAT,
        "model": generator.config.to_json(),
        "weights_sha256": sha256_bytes(weights),
        **facts,
    }
    config = json.dumps(record, indent=1, sort_keys=True).encode()
    files = []
    for path, data in ((layout.weights, weights), (layout.config, config)):
        store.write(f"{folder}/{path}", data)
        files.append(FileRecord(path, len(data), sha256_bytes(data)))
    return files


def load_generator(store: Store, folder: str) -> Generator:
    """Load the generator of a run or of an exported model, in eval mode on the CPU.

    Its memory format is channels_last.

    Raises:
        PipelineError: a file is missing, was altered, or is of another version.
    """
    record, layout = read_config(store, folder)
    where = f"{store.label}/{folder}/{layout.weights}"
    try:
        weights = store.read(f"{folder}/{layout.weights}")
    except FileNotFoundError:
        raise PipelineError(f"{where} is missing: restore the file, or train again.") from None
    state = _state(weights, record["weights_sha256"], where, layout)
    try:
        generator = build_generator(ModelConfig.from_json(record["model"]))
    except (TypeError, ValueError, ArithmeticError, RuntimeError, MemoryError) as error:
        # The others have words of Python and torch, which say nothing to a user.
        reason = str(error) if isinstance(error, ValueError) else "an option of it is wrong"
        raise _other_version(f"{store.label}/{folder}/{layout.config}", reason) from error
    if differences := _differences(generator.state_dict(), state):
        raise _other_version(where, differences)
    generator.load_state_dict(state)
    return generator.to(memory_format=torch.channels_last).eval()  # type: ignore[call-overload,no-any-return]


def read_config(store: Store, folder: str) -> tuple[dict[str, Any], Layout]:
    """Read the config next to a folder's weights. Return it and the folder's layout.

    Raises:
        PipelineError: there is no config, or it was altered, or it is of another version.
    """
    layout = find_layout(store, folder)
    if layout is None:
        raise PipelineError(f"{store.label}/{folder} holds no model: train one first.")
    where = f"{store.label}/{folder}/{layout.config}"
    try:
        record = parse_json(store.read(f"{folder}/{layout.config}"))
    except ValueError:
        raise PipelineError(f"{where} is not JSON: it was altered, restore it.") from None
    version = record.get("format") if isinstance(record, dict) else None
    if isinstance(version, int) and version != FORMAT:
        raise PipelineError(
            f"{where} has format {version}, this version reads {FORMAT}: use the version of dpnet"
            " that wrote it."
        )
    if (
        version != FORMAT
        or not isinstance(record.get("model"), dict)
        or not isinstance(record.get("weights_sha256"), str)
    ):
        raise PipelineError(
            f"{where} is not the config of a dpnet model: it was altered, restore it."
        )
    return record, layout


def training_state_sha256(record: Mapping[str, Any], where: str) -> str:
    """Return the hash of the training state that the config of an exported model names.

    Args:
        record: the config.
        where: the folder, for messages.

    Raises:
        PipelineError: the config does not name it, so the file beside it is not checked by it.
    """
    entry = record.get("training_state")
    sha256 = entry.get("sha256") if isinstance(entry, dict) else None
    if not isinstance(sha256, str):
        raise PipelineError(
            f"{where} has a {TRAINING_STATE}, but its {EXPORTED.config} has no hash of it: export"
            " the model again, or remove that file to start from the generator alone."
        )
    return sha256


def _state(weights: bytes, sha256: str, where: str, layout: Layout) -> dict[str, Tensor]:
    """Decode the weights, and check their hash."""
    try:
        state = load(weights)
    except (SafetensorError, KeyError, ValueError, RuntimeError, TypeError):  # also odd types
        why = "it is not a complete safetensors file"
    else:
        if sha256_bytes(weights) == sha256:
            return state
        why = f"its hash is not the one in {layout.config}"
    raise PipelineError(
        f"{where} was altered or cut short: {why}. Restore the file, or train again."
    )


def _differences(wanted: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> str:
    """Describe the differences of two sets of tensors in a few words. Return "" if they match."""
    differences = []
    for what, names in (("lacks", wanted.keys() - found.keys()), ("has", found.keys() - wanted)):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            extra = "" if what == "lacks" else ", unknown to its config"
            differences.append(f"{what} {min(names)}{more}{extra}")
    for name in sorted(wanted.keys() & found.keys()):
        if wanted[name].shape != found[name].shape:
            shapes = tuple(found[name].shape), tuple(wanted[name].shape)
            differences.append(f"has {name} in {shapes[0]} where its config asks for {shapes[1]}")
            break
    return "; ".join(differences)


def _other_version(where: str, reason: str) -> PipelineError:
    return PipelineError(
        f"{where} does not fit this version of the network ({reason.splitlines()[0]}): use the"
        " version of dpnet that wrote it."
    )
