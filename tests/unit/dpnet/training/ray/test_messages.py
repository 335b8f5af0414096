"""What workers log reaches the process that started training, over Ray's key-value store."""

from __future__ import annotations

import logging

import pytest

from data_prep.core.logs import Forward, add_handler, remove_handler
from dpnet.training.ray import workers


@pytest.fixture
def key_values(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """A dictionary in the place of Ray's key-value store."""
    values: dict[str, str] = {}

    def listed(prefix: str, namespace: str) -> list[str]:
        return [key for key in values if key.startswith(prefix)]

    def put(key: str, value: str, namespace: str) -> None:
        values[key] = value

    store = "ray.experimental.internal_kv._internal_kv"
    monkeypatch.setattr(f"{store}_put", put)
    monkeypatch.setattr(f"{store}_get", lambda key, namespace: values[key])
    monkeypatch.setattr(f"{store}_del", lambda key, namespace: values.pop(key))
    monkeypatch.setattr(f"{store}_list", listed)
    return values


def test_records_of_a_worker_keep_their_order_level_and_module(key_values: dict[str, str]) -> None:
    handler = Forward(lambda *record: workers._tell("7", "message", record[2], *record[:2]))
    add_handler(handler)
    logging.getLogger("dpnet.training.loop").info("train: step %d", 10)
    logging.getLogger("dpnet.loading.loader").warning("2 samples are broken")
    remove_handler(handler)
    workers._tell("8", "message", "of another attempt")
    assert list(workers._words("7")) == [
        ("message", "train: step 10", logging.INFO, "dpnet.training.loop"),
        ("message", "2 samples are broken", logging.WARNING, "dpnet.loading.loader"),
    ]
    assert list(workers._words("7")) == []
