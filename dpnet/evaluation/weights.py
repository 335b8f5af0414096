"""Find the weights of the networks of LPIPS and FID.

Those of LPIPS are a named file, a cached file, or a download. Those of FID are a named file only.

This file needs no torch, because a finished evaluation is skipped without it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from data_prep.core.digest import sha256_file
from data_prep.core.errors import ConfigError, PipelineError
from data_prep.core.paths import cache_folder
from dpnet.evaluation.settings import EvaluateSettings
from dpnet.model_store.weights_file import holds_weights

FEATURES = "alexnet-features.safetensors"  # the convolutions alone
TORCHVISION = "alexnet-owt-7be5be79.pth"  # its name ends with the start of its SHA-256
URL = f"https://download.pytorch.org/models/{TORCHVISION}"
HASH_PREFIX = "7be5be79"
# The start of the SHA-256 of pt_inception-2015-12-05-6726825d.pth, which defines FID.
INCEPTION_PREFIX = "6726825d"


class WeightsFile(NamedTuple):
    """A file of weights, with its digest when the evaluation was requested."""

    path: Path
    sha256: str


class Weights(NamedTuple):
    """The files of weights that an evaluation uses; None: the metric is not computed."""

    lpips: WeightsFile | None
    inception: WeightsFile | None

    @property
    def sources(self) -> dict[str, str]:
        """Return the sources of a request that uses the files: their hashes by role."""
        return {role: file.sha256 for role, file in self._asdict().items() if file}


def weights_of(settings: EvaluateSettings) -> Weights:
    """Return the files that the settings name or allow, with their hashes.

    Raises:
        ConfigError: an option names a missing file.
        PipelineError: a download is allowed and fails.
    """
    lpips = find_weights(settings)
    named = settings.inception_weights
    inception = None if named is None else Path(named).expanduser()
    return Weights(_hashed(lpips), _hashed(inception))


def _hashed(path: Path | None) -> WeightsFile | None:
    return None if path is None else WeightsFile(path.absolute(), sha256_file(path))


def is_official(inception_sha256: str) -> bool:
    """Return whether the hash is that of the published Inception weights."""
    return inception_sha256.startswith(INCEPTION_PREFIX)


def find_weights(settings: EvaluateSettings) -> Path | None:
    """Return the file with AlexNet's weights, or None if there is none.

    Raises:
        ConfigError: an option names a missing file.
        PipelineError: a download is allowed and fails.
    """
    check_weights_file(settings)
    if settings.lpips_weights is not None:
        return Path(settings.lpips_weights).expanduser()
    found = next((path for path in _known_places() if path.is_file()), None)
    if found is None and settings.allow_downloads:
        return _download()
    return found


def check_weights_file(settings: EvaluateSettings) -> None:
    """Raise ConfigError if an option names a missing file, or one of another kind."""
    for option, network in (("lpips_weights", "AlexNet"), ("inception_weights", "Inception")):
        name = getattr(settings, option)
        if name is None:
            continue
        if not Path(name).expanduser().is_file():
            raise ConfigError(
                f"evaluate.{option} names {name!r}, which is not a file: check the path, or leave"
                " the option out."
            )
        if not holds_weights(Path(name).expanduser()):
            raise ConfigError(
                f"evaluate.{option} names {name!r}, which is not a file of weights"
                f" (.safetensors, or .pth of torch.save), or is cut short: save the {network}"
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
