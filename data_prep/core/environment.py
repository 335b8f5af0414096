"""Check environment variables: stray characters, and the form of addresses.

Secrets of Kubernetes and shells often end with a line break. The libraries that read such a
variable give errors that do not name it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

S3 = (
    "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE",
    "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_DEFAULT_REGION", "AWS_REGION",
    "AWS_CA_BUNDLE",
)  # fmt: skip
ALL = (
    *S3,
    "DPNET_ROOT", "DPNET_ALERT_URL", "DPNET_REPORTS_URL", "DPNET_REPORTS_PASSWORD",
    "DPNET_SERVE_URL", "DPNET_SERVE_TOKEN",
    "PREFECT_API_URL", "PREFECT_API_KEY", "PREFECT_API_AUTH_STRING",
    "PREFECT_SERVER_API_AUTH_STRING", "PREFECT_SERVER_DATABASE_CONNECTION_URL",
    "MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_TOKEN",
    "RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH",
)  # fmt: skip
# A thread of OpenMP that waits by spinning takes the core from the thread that it waits for, as
# soon as the machine has other work: a step of training was 10 to 50 times slower. It must be set
# before torch is loaded. A user's own value stays.
THREADS = {"OMP_WAIT_POLICY": "PASSIVE"}
_STRAY = re.compile(r"^\s|\s$|[\x00-\x1f\x7f]")
# Schemes of MLflow's servers and databases. An address without a scheme is a folder.
_MLFLOW = {
    "http", "https", "sqlite", "postgresql", "mysql", "mssql", "file", "databricks",
    "databricks-uc", "uc",
}  # fmt: skip


def is_web_address(text: str) -> bool:
    """Return whether a text begins with http:// or https:// and names a host."""
    return re.match(r"https?://[^\s/?#:@]", text, re.IGNORECASE) is not None


def is_mlflow_address(text: str) -> bool:
    """Return whether MLflow can use an address: a server, a database or a folder."""
    scheme, sign, rest = text.partition("://")
    if sign:
        return scheme.lower().partition("+")[0] in _MLFLOW and bool(rest)
    return re.fullmatch(r"[\w.-]+:\d+(/.*)?", text) is None  # a server without http://


def _is_ray_address(text: str) -> bool:
    """Return whether Ray can use an address: auto, local, HOST:PORT or ray://, or a dashboard's."""
    return is_web_address(text) or bool(re.fullmatch(r"auto|local|(ray://)?[^\s/]+:\d+", text))


class _Form(NamedTuple):
    """The form that the value of a variable must have."""

    fits: Callable[[str], bool]
    words: str


WEB_ADDRESS = "an address that begins with http:// or https://"
MLFLOW_ADDRESS = (
    "an MLflow server, such as http://127.0.0.1:5000, or a database, such as"
    " sqlite:////path/mlflow.db"
)
_FORMS = {
    "AWS_ENDPOINT_URL": _Form(is_web_address, f"{WEB_ADDRESS}, such as http://127.0.0.1:9000"),
    "AWS_ENDPOINT_URL_S3": _Form(is_web_address, f"{WEB_ADDRESS}, such as http://127.0.0.1:9000"),
    "DPNET_ALERT_URL": _Form(
        lambda text: re.match(r"[\w+.-]+://.", text) is not None,
        "an Apprise URL, such as https://hooks.example.com/… or mailto://…",
    ),
    "DPNET_REPORTS_URL": _Form(is_web_address, f"{WEB_ADDRESS}, such as http://127.0.0.1:8000"),
    "DPNET_SERVE_URL": _Form(is_web_address, f"{WEB_ADDRESS}, such as http://127.0.0.1:8400"),
    "PREFECT_API_URL": _Form(is_web_address, f"{WEB_ADDRESS}, such as http://127.0.0.1:4200/api"),
    "MLFLOW_TRACKING_URI": _Form(is_mlflow_address, MLFLOW_ADDRESS),
    "RAY_ADDRESS": _Form(
        _is_ray_address, "auto, local, HOST:PORT, ray://HOST:PORT or a dashboard's http://HOST:PORT"
    ),
    "RAY_API_SERVER_ADDRESS": _Form(is_web_address, f"{WEB_ADDRESS}, such as http://head:8265"),
}


def has_stray_character(text: str) -> bool:
    """Return whether a text begins or ends with a blank, or has a line break or a control."""
    return _STRAY.search(text) is not None


def wrong_variable(names: Iterable[str], environ: Mapping[str, str] = os.environ) -> str:
    """Return a sentence about the first of these variables that cannot be used, or "".

    It has a stray character, or the form of an address is wrong. The sentence never has the
    value, which may be a secret.
    """
    for name in names:
        value = environ.get(name, "")
        if has_stray_character(value):
            return (
                f"{name} has a line break, or a blank at an end, and cannot be used. Set it again:"
                " for a secret use `printf %s`, because `echo` adds a line break."
            )
        form = _FORMS.get(name)
        if value and form is not None and not form.fits(value):
            return f"{name} cannot be used: set it to {form.words}, or unset it."
    return ""
