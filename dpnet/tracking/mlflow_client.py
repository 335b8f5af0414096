"""How MLflow is reached."""

from __future__ import annotations

import logging
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from data_prep.core.errors import PipelineError
from data_prep.core.paths import MLFLOW_DATABASE
from data_prep.core.storage.local import LocalStore

_SQLITE = "sqlite:///"


_LONGEST = 300  # characters of an error's text that are shown


@contextmanager
def connect(uri: str) -> Iterator[Any]:
    """An MLflow client for tracking and registry at `uri`; its errors become PipelineError."""
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"  # read when mlflow is imported
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield new_client(uri)
    except (MlflowException, SQLAlchemyError) as error:
        raise PipelineError(
            f"MLflow at {without_credentials(uri)} refused the registration ({reason_of(error)}):"
            " check register.tracking_uri and its permissions, then run the same command again."
        ) from error


def new_client(uri: str) -> Any:
    """An MLflow client for tracking and registry at `uri`; its errors are MLflow's."""
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"  # read when mlflow is imported
    os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"  # that is for results
    # Servers other than AWS refuse or mangle boto3's newer default checksums.
    os.environ.setdefault("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
    from mlflow.tracking import MlflowClient

    # They would tell every migration of the schema, and tracebacks of what is raised anyway.
    for name in ("alembic", "mlflow"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    if uri.startswith(_SQLITE):
        _create_database(Path(uri.removeprefix(_SQLITE)))
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def reason_of(error: BaseException) -> str:
    """What an error of MLflow's says, in one line and without credentials."""
    # SQLAlchemy may begin with advice to programmers, in a line of its own.
    lines = [line for line in str(error).splitlines() if not line.startswith("(raised as")]
    if not lines:
        return type(error).__name__
    # Of a server that is not reached, the last of several errors within one another.
    cause = re.search(r"Caused by .*?: ([^\"]*)", lines[0])
    return without_credentials(cause[1] if cause else lines[0]).strip(" .")[:_LONGEST]


def _create_database(path: Path) -> None:
    """Make MLflow's SQLite file unless it is there, all at once.

    MLflow builds it by some hundred migrations, and killed among them it leaves a file that it
    refuses for ever after (seen with 3.17).
    """
    if path.exists():
        return
    from mlflow.tracking import MlflowClient

    with tempfile.TemporaryDirectory() as folder:
        new = Path(folder, MLFLOW_DATABASE)
        MlflowClient(tracking_uri=f"{_SQLITE}{new}").search_experiments(max_results=1)
        LocalStore(path.parent).create(path.name, new.read_bytes())


def without_credentials(text: str) -> str:
    """A URI, or a text with URIs in it, without users and passwords."""
    return re.sub(r"://\S*@", "://", text)
