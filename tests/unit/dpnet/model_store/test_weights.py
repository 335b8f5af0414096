"""Weights in storage: both layouts, and one clear error for each kind of damage."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save

from data_prep.core.digest import sha256_bytes
from data_prep.core.errors import PipelineError
from data_prep.core.storage.local import LocalStore
from dpnet.model import ModelConfig, build_generator
from dpnet.model_store.layout import EXPORTED, RUN, Layout
from dpnet.model_store.weights import load_generator, save_generator

SMALL = ModelConfig(
    widths=(8, 16, 16), blocks=1, attention_dim=8, guide=7, discriminator_widths=(8, 8, 8, 8)
)
Tensors = dict[str, torch.Tensor]


@pytest.fixture(params=[RUN, EXPORTED], ids=["run", "exported"])
def layout(request: pytest.FixtureRequest) -> Layout:
    found: Layout = request.param
    return found


@pytest.fixture
def store(tmp_path: Path, layout: Layout) -> LocalStore:
    store = LocalStore(tmp_path)
    torch.manual_seed(0)
    generator = build_generator(SMALL)
    torch.nn.init.normal_(generator.out.weight)
    save_generator(store, "m", generator, {"step": 3}, layout)
    return store


def refused(store: LocalStore) -> str:
    """Load the model, which must fail, and return the error's sentence."""
    with pytest.raises(PipelineError) as caught:
        load_generator(store, "m")
    sentence = str(caught.value)
    assert sentence.endswith(".")
    assert "\n" not in sentence
    return sentence


def change_config(store: LocalStore, layout: Layout, **changes: Any) -> None:
    record = json.loads(store.read(f"m/{layout.config}"))
    store.write(f"m/{layout.config}", json.dumps({**record, **changes}).encode())


def change_weights(store: LocalStore, layout: Layout, change: Callable[[Tensors], object]) -> None:
    """Change the tensors, and their hash in the config too."""
    state = load(store.read(f"m/{layout.weights}"))
    change(state)
    weights = save(state)
    store.write(f"m/{layout.weights}", weights)
    change_config(store, layout, weights_sha256=sha256_bytes(weights))


def test_a_generator_is_loaded_as_it_was_saved(store: LocalStore, layout: Layout) -> None:
    torch.manual_seed(0)
    generator = build_generator(SMALL)
    torch.nn.init.normal_(generator.out.weight)
    loaded = load_generator(store, "m")
    assert loaded.config == SMALL
    assert not loaded.training
    state = loaded.state_dict()
    assert state.keys() == generator.state_dict().keys()
    assert all(torch.equal(state[name], t) for name, t in generator.state_dict().items())


@pytest.mark.parametrize("keep", [0, 7, 5000, -1])
def test_weights_cut_short_are_refused(store: LocalStore, layout: Layout, keep: int) -> None:
    store.write(f"m/{layout.weights}", store.read(f"m/{layout.weights}")[:keep])
    sentence = refused(store)
    assert (
        f"{layout.weights} was altered or cut short: it is not a complete safetensors file"
        in sentence
    )


def test_weights_with_another_hash_are_refused(store: LocalStore, layout: Layout) -> None:
    weights = bytearray(store.read(f"m/{layout.weights}"))
    weights[-1] ^= 1
    store.write(f"m/{layout.weights}", bytes(weights))
    assert f"its hash is not the one in {layout.config}" in refused(store)


def test_missing_weights_are_an_error(store: LocalStore, layout: Layout) -> None:
    store.delete(f"m/{layout.weights}")
    assert f"{layout.weights} is missing: restore the file" in refused(store)


def test_a_folder_without_a_model_is_an_error(store: LocalStore, layout: Layout) -> None:
    store.delete(f"m/{layout.config}")
    assert "m holds no model: train one first" in refused(store)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe"])
def test_a_config_that_is_not_json_is_refused(
    store: LocalStore, layout: Layout, content: bytes
) -> None:
    store.write(f"m/{layout.config}", content)
    assert f"{layout.config} is not JSON: it was altered, restore it" in refused(store)


@pytest.mark.parametrize(
    "content", [b"[]", b"null", b"{}", b'{"format": 1}', b'{"format": 1, "model": {}}']
)
def test_a_config_of_something_else_is_refused(
    store: LocalStore, layout: Layout, content: bytes
) -> None:
    store.write(f"m/{layout.config}", content)
    assert f"{layout.config} is not the config of a dpnet model" in refused(store)


def test_a_model_of_another_format_is_refused(store: LocalStore, layout: Layout) -> None:
    change_config(store, layout, format=2)
    assert "has format 2, this version reads 1: use the version" in refused(store)


@pytest.mark.parametrize(
    "model",
    [
        {"depth": 3},  # an option that this version does not know
        {"widths": "wide"},
        {"widths": [8, 16]},
        {"blocks": -1.5},
        {"normalization": "layer"},
        {"guide": None},
    ],
    ids=str,
)
def test_a_config_of_another_version_is_refused(
    store: LocalStore, layout: Layout, model: dict[str, Any]
) -> None:
    change_config(store, layout, model={**SMALL.to_json(), **model})
    said = refused(store)
    assert "does not fit this version of the network (" in said
    assert not re.search(r"NoneType|unsupported|argument|object|__", said)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda state: state.pop("out.bias"), "(lacks out.bias)"),
        (lambda state: [state.pop(n) for n in ("out.bias", "out.weight")], "(lacks out.bias and 1"),
        (lambda state: state.update(new=torch.zeros(1)), "(has new, unknown to its config)"),
        (
            lambda state: state.update({"out.bias": torch.zeros(4)}),
            "(has out.bias in (4,) where its config asks for (3,))",
        ),
    ],
)
def test_tensors_that_do_not_fit_the_config_are_named(
    store: LocalStore, layout: Layout, change: Callable[[Tensors], object], sentence: str
) -> None:
    change_weights(store, layout, change)
    assert sentence in refused(store)


def test_a_checkpoint_of_another_config_is_refused(store: LocalStore, layout: Layout) -> None:
    change_config(store, layout, model={**SMALL.to_json(), "blocks": 2})
    assert "(lacks blocks.1." in refused(store)
