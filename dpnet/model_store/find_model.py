"""Find the model that a reference names."""

from __future__ import annotations

from data_prep.core.errors import ConfigError
from data_prep.core.paths import RUNS
from data_prep.core.storage.open import open_store
from data_prep.core.storage.store import Store
from dpnet.model_store.layout import find_layout


def find_model(reference: str, root: str) -> tuple[Store, str, str]:
    """Find a model. Return its store, its folder, and its name for messages.

    Args:
        reference: a run's folder, the folder of an exported model, a model reference such as
            models:/NAME@champion, or "" for the champion of the only model.
        root: the root of runs and model references.

    Raises:
        PipelineError: there is no such model.
    """
    if not reference or reference.startswith("models:/"):
        from dpnet.model_store.records import find_record

        store = open_store(root)
        record = find_record(store, reference)
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
