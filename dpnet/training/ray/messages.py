"""Messages from workers to the process that started them.

They go through Ray's control service, which works even if the root's storage does not.
"""

from __future__ import annotations

import json
import logging
import secrets
import time
from contextlib import suppress

from data_prep.core.errors import PipelineError
from data_prep.core.logs import Forward

_NAMESPACE = "dpnet"


def forward_logs(attempt: str) -> logging.Handler:
    """Return a handler that sends log records to the process that follows `attempt`."""
    return Forward(lambda level, name, text: _send(attempt, level, name, text))


def send_error(attempt: str, text: str) -> None:
    """Send the reason why training cannot continue."""
    _send(attempt, 0, "", text)


def _send(attempt: str, level: int, name: str, text: str) -> None:
    from ray.experimental.internal_kv import _internal_kv_put

    with suppress(Exception):  # Ray reports an error too, but later
        key = f"{attempt}/{time.time_ns():020d}-{secrets.token_hex(4)}"
        _internal_kv_put(key, json.dumps([level, name, text]), namespace=_NAMESPACE)


def receive(attempt: str) -> None:
    """Log the records sent since the last call, oldest first. Raises a sent error."""
    from ray.experimental.internal_kv import (
        _internal_kv_del,
        _internal_kv_get,
        _internal_kv_list,
    )

    for key in sorted(_internal_kv_list(f"{attempt}/", namespace=_NAMESPACE)):
        level, name, text = json.loads(_internal_kv_get(key, namespace=_NAMESPACE))
        _internal_kv_del(key, namespace=_NAMESPACE)
        if not level:
            raise PipelineError(text)
        logging.getLogger(name).log(level, "%s", text)
