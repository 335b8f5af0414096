"""A trained generator on storage: safetensors weights with their config beside them."""

from __future__ import annotations

import json
from typing import Any

import torch
from safetensors.torch import load, save

from data_prep.digest import sha256_bytes
from data_prep.errors import PipelineError
from data_prep.stage import FileRecord
from data_prep.storage import Store
from dpnet.model import Generator, ModelConfig, build_generator

FORMAT = 1
WEIGHTS, CONFIG = "model/generator.safetensors", "model/model.json"


def save_generator(
    store: Store, folder: str, generator: Generator, facts: dict[str, Any]
) -> list[FileRecord]:
    """Write the weights, then the config with the weights' hash and `facts`."""
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
    for path, data in ((WEIGHTS, weights), (CONFIG, config)):
        store.write(f"{folder}/{path}", data)
        files.append(FileRecord(path, len(data), sha256_bytes(data)))
    return files


def load_generator(store: Store, folder: str) -> Generator:
    """The generator of a run's folder, in eval mode on the CPU, in channels_last.

    Raises PipelineError when files are missing, altered or of another version.
    """
    where = f"{store.uri}/{folder}/model"
    try:
        record = json.loads(store.read(f"{folder}/{CONFIG}"))
        weights = store.read(f"{folder}/{WEIGHTS}")
    except FileNotFoundError:
        raise PipelineError(f"{where} holds no model: train one first.") from None
    except ValueError:
        raise PipelineError(f"{where}/model.json is not JSON: it was altered.") from None
    if record.get("format") != FORMAT:
        raise PipelineError(
            f"{where} has format {record.get('format')!r}, this version reads {FORMAT}:"
            " use the version of dpnet that wrote it."
        )
    if sha256_bytes(weights) != record["weights_sha256"]:
        raise PipelineError(
            f"{where}/generator.safetensors was altered or cut short: its hash is not the one"
            " that model.json names; train again or restore the file."
        )
    try:
        generator = build_generator(ModelConfig.from_json(record["model"]))
        generator.load_state_dict(load(weights))
    except (TypeError, RuntimeError) as error:
        raise PipelineError(
            f"{where} does not fit this version of the network"
            f" ({str(error).splitlines()[0]}): use the version of dpnet that wrote it."
        ) from error
    return generator.to(memory_format=torch.channels_last).eval()  # type: ignore[call-overload,no-any-return]
