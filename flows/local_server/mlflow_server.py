"""MLflow's server behind the guard.

    DPNET_SERVER_PASSWORD=user:password python -m flows.local_server.mlflow_server DATABASE FOLDER 3

DATABASE is the URI of the runs and the registry, FOLDER is the URI of the artifacts, and the last
word is the file descriptor of a socket that listens. `mlflow server` itself cannot be guarded: it
starts the application in processes of its own.
"""

from __future__ import annotations

import os
import socket
import sys

from flows.local_server.guard import Guard

PASSWORD_VARIABLE = "DPNET_SERVER_PASSWORD"
_PROXIED = "mlflow-artifacts:/"  # clients send artifacts to the server


def _serve(database: str, artifacts: str, listener: int) -> None:
    password = os.environ.pop(PASSWORD_VARIABLE)
    # What `mlflow server` sets for its application (mlflow/server/__init__.py, _run_server).
    os.environ |= {
        "_MLFLOW_SERVER_FILE_STORE": database,
        "_MLFLOW_SERVER_REGISTRY_STORE": database,
        "_MLFLOW_SERVER_ARTIFACT_ROOT": _PROXIED,
        "_MLFLOW_SERVER_ARTIFACT_DESTINATION": artifacts,
        "_MLFLOW_SERVER_SERVE_ARTIFACTS": "true",
        "_MLFLOW_SGI_NAME": "uvicorn",
        "_MLFLOW_IN_JOB_EXECUTOR": "false",
        "MLFLOW_ENABLE_WORKSPACES": "false",
    }
    import uvicorn
    from mlflow.server.fastapi_app import app
    from mlflow.server.handlers import initialize_backend_stores

    initialize_backend_stores(database, database, _PROXIED)
    with socket.socket(fileno=os.dup(listener)) as own:
        port = own.getsockname()[1]
    guarded = Guard(app, port, password=password, unguarded=["/health"])
    uvicorn.run(guarded, fd=listener, log_level="warning", timeout_graceful_shutdown=2)


if __name__ == "__main__":
    _serve(sys.argv[1], sys.argv[2], int(sys.argv[3]))
