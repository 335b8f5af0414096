"""The weights that a release may bring in the package itself."""

from __future__ import annotations

from pathlib import Path

# In the package `dpnet`, with the layout of an exported model.
_FOLDER = Path(__file__).parents[1] / "weights"


def packaged_weights() -> Path | None:
    """Return the file of the packaged weights, or None if this release has none."""
    return next(iter(sorted(_FOLDER.glob("*.safetensors"))), None)
