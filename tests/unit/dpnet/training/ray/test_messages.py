"""Messages of workers reach the process that started training, through Ray's key-value store."""

from __future__ import annotations

import logging

import pytest

from data_prep.core.errors import PipelineError
from data_prep.core.logs import add_handler, remove_handler
from dpnet.training.ray import messages


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


def test_records_of_a_worker_keep_their_order_level_and_module(
    key_values: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    handler = messages.forward_logs("7")
    add_handler(handler)
    logging.getLogger("dpnet.training.loop").info("train: step %d", 10)
    logging.getLogger("dpnet.loading.loader").warning("2 samples are broken")
    remove_handler(handler)
    messages.send_error("8", "an error of another attempt")
    caplog.clear()
    messages.receive("7")
    sent = [
        ("dpnet.training.loop", logging.INFO, "train: step 10"),
        ("dpnet.loading.loader", logging.WARNING, "2 samples are broken"),
    ]
    assert caplog.record_tuples == sent
    messages.receive("7")
    assert caplog.record_tuples == sent


def test_an_error_of_a_worker_is_raised_after_the_records_before_it(
    key_values: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    handler = messages.forward_logs("7")
    handler.emit(logging.makeLogRecord({"name": "dpnet", "levelno": logging.INFO, "msg": "before"}))
    messages.send_error("7", "the disk is full.")
    with pytest.raises(PipelineError, match=r"^the disk is full\.$"):
        messages.receive("7")
    assert caplog.record_tuples == [("dpnet", logging.INFO, "before")]
