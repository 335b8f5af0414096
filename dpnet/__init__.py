"""DPNet from raw photos to a registered model. In Python: `dpnet.inpaint(image, mask)`."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dpnet.inpainting.api import inpaint, load_model

    __version__: str

__all__ = ["__version__", "inpaint", "load_model"]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that the command starts at once."""
    if name == "__version__":
        return _version()
    if name not in __all__:
        raise AttributeError(f"module 'dpnet' has no attribute {name!r}")
    return getattr(import_module("dpnet.inpainting.api"), name)


def _version() -> str:
    """Return the version in pyproject.toml at the time of the installation."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("dpnet-pipeline")
    except PackageNotFoundError:  # a source tree on the path
        return "0+not.installed"
