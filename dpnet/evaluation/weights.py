"""Find the weights of LPIPS's network: a named file, a cached file, or a download.

This file needs no torch, because a finished evaluation is skipped without it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from data_prep.core.digest import sha256_file
from data_prep.core.errors import ConfigError, PipelineError
from data_prep.core.paths import cache_folder
from dpnet.evaluation.settings import EvaluateSettings
from dpnet.model_store.weights_file import holds_weights

FEATURES = "alexnet-features.safetensors"  # the convolutions alone
TORCHVISION = "alexnet-owt-7be5be79.pth"  # its name ends with the start of its SHA-256
URL = f"https://download.pytorch.org/models/{TORCHVISION}"
HASH_PREFIX = "7be5be79"


def find_weights(settings: EvaluateSettings) -> Path | None:
    """Return the file with AlexNet's weights, or None if there is none.

    Raises:
        ConfigError: `evaluate.lpips_weights` names a missing file.
        PipelineError: a download is allowed and fails.
    """
    check_weights_file(settings)
    if settings.lpips_weights is not None:
        return Path(settings.lpips_weights).expanduser()
    found = next((path for path in _known_places() if path.is_file()), None)
    if found is None and settings.allow_downloads:
        return _download()
    return found


def weights_source(file: Path | None) -> dict[str, str]:
    """Return the source of a request that uses the file: its hash by the name `lpips`."""
    return {"lpips": sha256_file(file)} if file else {}


def check_weights_file(settings: EvaluateSettings) -> None:
    """Raise ConfigError if `evaluate.lpips_weights` names a missing file, or one of other kind."""
    name = settings.lpips_weights
    if name is None:
        return
    if not Path(name).expanduser().is_file():
        raise ConfigError(
            f"evaluate.lpips_weights names {name!r}, which is not a file: check the path, or leave"
            " the option out."
        )
    if not holds_weights(Path(name).expanduser()):
        raise ConfigError(
            f"evaluate.lpips_weights names {name!r}, which is not a file of weights"
            " (.safetensors, or .pth of torch.save), or is cut short: save torchvision's AlexNet"
            " weights again, or leave the option out."
        )


def weights_folder() -> Path:
    """Return the folder of this user's weights."""
    return cache_folder() / "weights"


def _known_places() -> Iterator[Path]:
    try:
        yield weights_folder() / FEATURES
        yield weights_folder() / TORCHVISION
    except ConfigError:  # this user has no home folder
        return
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    yield Path(os.environ.get("TORCH_HOME") or Path(cache) / "torch") / (
        f"hub/checkpoints/{TORCHVISION}"
    )


def _download() -> Path:
    import torch

    path = weights_folder() / TORCHVISION
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        # It writes another file first, checks its hash, and renames it.
        torch.hub.download_url_to_file(URL, str(path), HASH_PREFIX, progress=False)
    except (OSError, RuntimeError) as error:  # URLError is an OSError
        reason = " ".join(str(error).split()).rstrip(".")
        raise PipelineError(
            f"evaluate.allow_downloads is true, but {URL} cannot be downloaded ({reason}): name a"
            " file in evaluate.lpips_weights, or set evaluate.allow_downloads to false."
        ) from error
    return path
