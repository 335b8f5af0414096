"""MLflow's server behind the guard.

    DPNET_SERVER_PASSWORD=user:password python -m flows.local_server.mlflow_server DATABASE FOLDER 3

DATABASE is the URI of the runs and the registry, FOLDER is the URI of the artifacts, and the last
word is the file descriptor of a socket that listens. `mlflow server` itself cannot be guarded: it
starts the application in processes of its own.

On Kubernetes the last word is HOST:PORT, such as 0.0.0.0:5000. DATABASE is `-`, which means the
value of MLFLOW_BACKEND_STORE_URI: it has a password, and other processes can see the words of a
command. DPNET_SERVER_NAMES has the names of the server, with commas between them.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Collection

from data_prep.core.asgi_guard import Guard
from data_prep.core.web_guard import SERVER_NAMES, has_password

PASSWORD_VARIABLE = "DPNET_SERVER_PASSWORD"
DATABASE_VARIABLE = "MLFLOW_BACKEND_STORE_URI"
_PROXIED = "mlflow-artifacts:/"  # clients send artifacts to the server


def main(database: str, artifacts: str, where: str) -> int:
    """Serve until a signal. Return the exit status.

    Args:
        database: URI of the database, or `-`.
        artifacts: URI of the folder of the artifacts.
        where: File descriptor, or HOST:PORT.
    """
    missing = [] if os.environ.get(PASSWORD_VARIABLE) else [PASSWORD_VARIABLE]
    if database == "-":
        database = os.environ.pop(DATABASE_VARIABLE, "")
        missing += [] if database else [DATABASE_VARIABLE]
    if missing:
        print(f"dpnet: {' and '.join(missing)} must be set.", file=sys.stderr)
        return 1
    names = tuple(filter(None, os.environ.get(SERVER_NAMES, "").split(",")))
    if where.isdigit():
        _serve(database, artifacts, socket.socket(fileno=int(where)), names)
    else:
        host, _, port = where.rpartition(":")
        with socket.create_server((host, int(port))) as listener:
            _serve(database, artifacts, listener, names)
    return 0


def _serve(database: str, artifacts: str, listener: socket.socket, names: Collection[str]) -> None:
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
    if names:
        # The guard checks the host. MLflow's own check knows no names of a cluster's services.
        os.environ["MLFLOW_SERVER_ALLOWED_HOSTS"] = "*"
    import uvicorn
    from mlflow.server.fastapi_app import app
    from mlflow.server.handlers import initialize_backend_stores

    initialize_backend_stores(database, database, _PROXIED)
    port = listener.getsockname()[1]
    guarded = Guard(
        app,
        port,
        may_enter=lambda headers: has_password(headers, password),
        unguarded=["/health"],
        names=names,
    )
    uvicorn.run(guarded, fd=listener.fileno(), log_level="warning", timeout_graceful_shutdown=2)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
