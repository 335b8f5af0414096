"""The paths of a model's files in a folder. Only storage is needed to find them."""

from __future__ import annotations

from typing import NamedTuple

from data_prep.core.storage.store import Store


class Layout(NamedTuple):
    """The paths of the weights and of their config in a folder."""

    weights: str
    config: str


RUN = Layout("model/generator.safetensors", "model/model.json")
EXPORTED = Layout("model.safetensors", "config.json")
TRAINING_STATE = "training_state.safetensors"  # in an exported folder, if it was asked for


def find_layout(store: Store, folder: str) -> Layout | None:
    """Return the layout of a folder with a model: a run's or an exported one. Otherwise None."""
    return next((each for each in (RUN, EXPORTED) if store.exists(f"{folder}/{each.config}")), None)


def has_model(store: Store, folder: str) -> bool:
    """Return whether a folder has the weights and the config of a model."""
    layout = find_layout(store, folder)
    return layout is not None and store.exists(f"{folder}/{layout.weights}")
