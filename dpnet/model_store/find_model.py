"""Find the model that a reference names."""

from __future__ import annotations

import os

from data_prep.core.errors import ConfigError
from data_prep.core.paths import DEMO_ROOT, RUNS
from data_prep.core.storage.open import open_store
from data_prep.core.storage.store import Store
from dpnet.model_store.layout import find_layout, has_model
from dpnet.model_store.packaged import packaged_weights

PACKAGED = "the packaged weights"  # their name for messages
PRETRAINED = "pretrained"  # their reference


def find_model(reference: str, root: str | None) -> tuple[Store, str, str]:
    """Find a model. Return its store, its folder, and its name for messages.

    Args:
        reference: a run's folder, the folder of an exported model, a model reference such as
            models:/NAME@champion, "pretrained" for the packaged weights, or "" for the champion
            of the only model.
        root: the root of runs and model references. None means DPNET_ROOT, else ./dpnet-demo; if
            that has no model and none is named, the packaged weights are used.

    Raises:
        PipelineError: there is no such model.
    """
    if reference == PRETRAINED:
        packaged = find_packaged()
        if packaged is None:
            raise ConfigError(
                "this installation has no packaged weights: install the released package, or name"
                " another model."
            )
        return (*packaged, PACKAGED)
    given, root = is_given(root), the_root(root)
    if not reference or reference.startswith("models:/"):
        from dpnet.model_store.records import find_record

        store = open_store(root)
        try:
            record = find_record(store, reference)
        except ConfigError:
            packaged = None if given or reference else find_packaged()
            if packaged is None:
                raise
            return (*packaged, PACKAGED)
        return store, record["run"]["folder"], f"{record['model']} version {record['version']}"
    reference = reference.rstrip("/")
    if reference.startswith(f"{RUNS}/") and find_layout(open_store(root), reference):
        return open_store(root), reference, reference
    for path in dict.fromkeys((reference, reference.removesuffix("/model"))):
        top, _, folder = path.rpartition("/")
        store = open_store(top or ".")
        if find_layout(store, folder):
            return store, folder, reference
    raise ConfigError(
        f"{reference!r} holds no model: give a run's folder (ROOT/runs/NAME), the folder"
        " of an exported model, or models:/NAME@champion and the --root of its registry."
    )


def is_given(root: str | None) -> bool:
    """Return whether a root was named, by an option or by DPNET_ROOT."""
    return bool(root or os.environ.get("DPNET_ROOT"))


def the_root(given: str | None) -> str:
    """Return the root that a command reads: the given one, else DPNET_ROOT, else the demo's."""
    return given or os.environ.get("DPNET_ROOT") or DEMO_ROOT


def find_packaged() -> tuple[Store, str] | None:
    """Return the store and the folder of the packaged weights, or None if there are none."""
    file = packaged_weights()
    if file is None:
        return None
    store = open_store(str(file.parent.parent))
    return (store, file.parent.name) if has_model(store, file.parent.name) else None
