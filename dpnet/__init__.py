"""DPNet from raw photographs to a registered model. In Python: `dpnet.inpaint(image, mask)`."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dpnet.inpainting.api import inpaint, load_model

__all__ = ["inpaint", "load_model"]


def __getattr__(name: str) -> Any:
    """Import what is asked for when it is asked for: the command must start at once."""
    if name not in __all__:
        raise AttributeError(f"module 'dpnet' has no attribute {name!r}")
    return getattr(import_module("dpnet.inpainting.api"), name)
