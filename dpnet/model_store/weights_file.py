"""Check that a file can hold weights, by its first bytes; needs no torch.

So a wrong file is reported before hours are spent on the stages before the one that reads it.
"""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

_PICKLE = tuple(bytes([0x80, protocol]) for protocol in range(2, 6))  # files of older torch


def holds_weights(path: Path) -> bool:
    """Return whether a file begins as a .safetensors file or as one of `torch.save` does.

    Args:
        path: the file. Its ending says which of the two it is.
    """
    try:
        with path.open("rb") as file:
            start, size = file.read(9), os.fstat(file.fileno()).st_size
    except OSError:
        return False
    if path.suffix == ".safetensors":
        header = int.from_bytes(start[:8], "little")
        return start[8:] == b"{" and 8 + header <= size
    return start.startswith(_PICKLE) or zipfile.is_zipfile(path)
