"""Connect to MLflow."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from data_prep.core.errors import PipelineError, storage_error
from data_prep.core.paths import MLFLOW_DATABASE
from data_prep.core.private_files import create_private, make_private
from data_prep.core.redact import redact
from data_prep.core.scratch import scratch_folder

_SQLITE = "sqlite:///"
_LONGEST = 300  # characters of an error text, at most


@contextmanager
def connect(uri: str) -> Iterator[Any]:
    """Connect to tracking and registry at `uri`. MLflow's errors become PipelineError."""
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"  # mlflow reads this at its import
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield new_client(uri)
    except (MlflowException, SQLAlchemyError) as error:
        raise PipelineError(
            f"MLflow at {uri} cannot be used ({reason_of(error)}): check that it runs there"
            " (register.tracking_uri) and that you may write, then run the same command again."
        ) from error


def new_client(uri: str) -> Any:
    """Return an MLflow client for tracking and registry at `uri`. It raises MLflow's errors."""
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"  # mlflow reads this at its import
    os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"  # standard output is for results
    # Servers other than AWS refuse or mangle boto3's newer default checksums.
    os.environ.setdefault("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
    from mlflow.tracking import MlflowClient

    # They log each migration of the schema, and tracebacks of errors that are raised anyway.
    for name in ("alembic", "mlflow"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    if uri.startswith(_SQLITE):
        _create_database(Path(uri.removeprefix(_SQLITE)))
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def reason_of(error: BaseException) -> str:
    """Return the text of an MLflow error in one line, without credentials."""
    # The first line of SQLAlchemy's errors can be advice to programmers.
    lines = [line for line in str(error).splitlines() if not line.startswith("(raised as")]
    if not lines:
        return type(error).__name__
    # If the server cannot be reached, the innermost of several nested errors is the cause.
    cause = re.search(r"Caused by .*?: ([^\"]*)", lines[0])
    return redact(cause[1] if cause else lines[0]).strip(" .")[:_LONGEST]


def _create_database(path: Path) -> None:
    """Create MLflow's SQLite file in one step, if it does not exist, and make it private.

    MLflow creates it with a hundred migrations. If it is killed between two of them, it refuses
    the file from then on (seen with 3.17).
    """
    if path.exists():
        make_private(path)  # an older version made it with the rights of the umask
        return
    from mlflow.tracking import MlflowClient

    with scratch_folder("mlflow-") as folder:
        new = folder / MLFLOW_DATABASE
        MlflowClient(tracking_uri=f"{_SQLITE}{new}").search_experiments(max_results=1)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            create_private(path, new.read_bytes())
        except OSError as error:
            raise storage_error(error, str(path)) from error
