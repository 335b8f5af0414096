"""Check environment variables, which secrets of Kubernetes and shells often end with a line break.

The libraries that read such a variable give errors that do not name it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping

S3 = (
    "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE",
    "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_DEFAULT_REGION", "AWS_REGION",
    "AWS_CA_BUNDLE",
)  # fmt: skip
ALL = (
    *S3,
    "DPNET_ROOT", "DPNET_ALERT_URL", "DPNET_REPORTS_URL", "DPNET_REPORTS_PASSWORD",
    "PREFECT_API_URL", "PREFECT_API_KEY", "PREFECT_API_AUTH_STRING",
    "PREFECT_SERVER_API_AUTH_STRING", "PREFECT_SERVER_DATABASE_CONNECTION_URL",
    "MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_TOKEN",
    "RAY_ADDRESS", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH",
)  # fmt: skip
# A thread of OpenMP that waits by spinning takes the core from the thread that it waits for, as
# soon as the machine has other work: a step of training was 10 to 50 times slower. It must be set
# before torch is loaded. A user's own value stays.
THREADS = {"OMP_WAIT_POLICY": "PASSIVE"}
_STRAY = re.compile(r"^\s|\s$|[\x00-\x1f\x7f]")


def has_stray_character(text: str) -> bool:
    """Return whether a text begins or ends with a blank, or has a line break or a control."""
    return _STRAY.search(text) is not None


def wrong_variable(names: Iterable[str], environ: Mapping[str, str] = os.environ) -> str:
    """Return a sentence about the first of these variables with a stray character, or "".

    The sentence never has the value, which may be a secret.
    """
    for name in names:
        if has_stray_character(environ.get(name, "")):
            return (
                f"{name} has a line break, or a blank at an end, and cannot be used. Set it again:"
                " for a secret use `printf %s`, because `echo` adds a line break."
            )
    return ""
