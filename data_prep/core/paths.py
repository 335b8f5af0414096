"""Names under a root, the root of the demo, and this user's cache folder.

Every file of the packages takes these names from here; a test reads the sources for copies.
"""

from __future__ import annotations

import re
from pathlib import Path

from data_prep.core.errors import ConfigError

# Folders directly under a root.
IMAGES, MASKS, RUNS = "images", "masks", "runs"
EVALUATIONS, REGISTRY, RETRAINS = "evaluations", "registry", "retrains"
PHOTOS = "photos"  # the sample photos, as files
PREFECT = "prefect"  # the embedded Prefect server of a command
UP = "up"  # the files of `dpnet up`
MLFLOW_ARTIFACTS = "mlflow-artifacts"
# Files directly under a root.
MLFLOW_DATABASE = "mlflow.db"
# Files in the folder of every stage.
MANIFEST = "manifest.json"
LEASE = "lease.json"
TRAINING_LEASE = "lease-training.json"  # in a run's folder: of the process that trains

# What the name of a dataset, a set of masks, a run or a model may hold: each is part of a path.
NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
NAME_IN_WORDS = "letters (a-z), digits, '.', '_' and '-', beginning with a letter or a digit"

DEMO_ROOT = "./dpnet-demo"
_HISTORY_KEY = re.compile(rf"{REGISTRY}/([^/]+)/history/(\d{{6}})\.json")
_VOTE_KEY = re.compile(rf"{REGISTRY}/([^/]+)/votes/(\d{{8}}T\d{{6}}Z-[0-9a-f]{{8}})\.json")
_RECORD_KEY = re.compile(rf"{REGISTRY}/([^/]+)/(?:champion|v(\d+))\.json")


def manifest_key(folder: str) -> str:
    """Return the key of the manifest of the stage in `folder`."""
    return f"{folder}/{MANIFEST}"


def lease_key(folder: str) -> str:
    """Return the key of the lease that protects `folder`."""
    return f"{folder}/{LEASE}"


def images_folder(name: str) -> str:
    """Return the folder that contains the versions of an image dataset."""
    return f"{IMAGES}/{name}"


def masks_folder(name: str) -> str:
    """Return the folder that contains the versions of a set of masks."""
    return f"{MASKS}/{name}"


def registry_folder(model: str) -> str:
    """Return the folder that contains the registrations and records of a model."""
    return f"{REGISTRY}/{model}"


def champion_key(model: str) -> str:
    """Return the key of the record of a model's champion."""
    return f"{REGISTRY}/{model}/champion.json"


def version_key(model: str, version: int) -> str:
    """Return the key of the record of a model's version."""
    return f"{REGISTRY}/{model}/v{version}.json"


def history_folder(model: str) -> str:
    """Return the folder of the records that say who was champion when."""
    return f"{REGISTRY}/{model}/history"


def history_key(model: str, number: int) -> str:
    """Return the key of a record of the history, numbered from 1."""
    return f"{history_folder(model)}/{number:06d}.json"


def parse_history_key(key: str) -> tuple[str, int] | None:
    """Return the model and the number of a record of the history, or None for another file."""
    match = _HISTORY_KEY.fullmatch(key)
    return (match[1], int(match[2])) if match else None


def votes_folder(model: str) -> str:
    """Return the folder of the votes on versions of a model."""
    return f"{REGISTRY}/{model}/votes"


def vote_key(model: str, name: str) -> str:
    """Return the key of a vote; the name has its time and random digits."""
    return f"{votes_folder(model)}/{name}.json"


def parse_vote_key(key: str) -> tuple[str, str] | None:
    """Return the model and the name of a vote, or None for another file."""
    match = _VOTE_KEY.fullmatch(key)
    return (match[1], match[2]) if match else None


def parse_record_key(key: str) -> tuple[str, int | None] | None:
    """Return the model and version of a registry record, or None if `key` is another file.

    The version is None for the record of the champion.
    """
    match = _RECORD_KEY.fullmatch(key)
    return (match[1], int(match[2]) if match[2] else None) if match else None


def mlflow_uri(folder: str | Path) -> str:
    """Return the address of the MLflow database in a local folder."""
    return f"sqlite:///{folder}/{MLFLOW_DATABASE}"


def cache_folder() -> Path:
    """Return this user's folder for files that a root on S3 cannot hold: `~/.cache/dpnet`."""
    try:
        return Path.home() / ".cache" / "dpnet"
    except RuntimeError:  # in a container, a user may have no entry in the list of users
        raise ConfigError(
            "this user has no home folder, and a root on S3 needs ~/.cache/dpnet for databases:"
            " set HOME to a folder that this user can write."
        ) from None
