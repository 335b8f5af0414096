"""Names under a root, the root of the demo, and this user's cache folder."""

from __future__ import annotations

from pathlib import Path

# Folders right under a root.
IMAGES, MASKS, RUNS = "images", "masks", "runs"
EVALUATIONS, REGISTRY, RETRAINS = "evaluations", "registry", "retrains"
PHOTOS = "photos"  # the sample photos, as files
PREFECT = "prefect"  # the embedded Prefect server of a command
UP = "up"  # what `dpnet up` keeps
MLFLOW_ARTIFACTS = "mlflow-artifacts"
# Files right under a root.
MLFLOW_DATABASE = "mlflow.db"
# Files of every stage's folder.
MANIFEST = "manifest.json"
LEASE = "lease.json"

DEMO_ROOT = "./dpnet-demo"


def cache_folder() -> Path:
    """Return the folder of this user that keeps what a root on S3 cannot: `~/.cache/dpnet`."""
    return Path.home() / ".cache" / "dpnet"
