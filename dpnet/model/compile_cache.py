"""The folder of torch's compiled code: one that only this user can write."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from pathlib import Path

VARIABLE = "TORCHINDUCTOR_CACHE_DIR"


def use_private_cache() -> None:
    """Keep compiled code in `~/.cache/dpnet`, unless the user has chosen another folder.

    torch's own choice has a name in /tmp that another user can take first. torch runs the code
    that it finds there.
    """
    if VARIABLE in os.environ:
        return
    try:
        folder = Path.home() / ".cache" / "dpnet" / "compiled"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except (OSError, RuntimeError):  # without a home, or without the right to write there
        folder = Path(tempfile.mkdtemp(prefix="dpnet-compiled-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ[VARIABLE] = str(folder)
    # Headers would be kept in torch's own folder, whatever the variable says (seen with 2.15).
    os.environ.setdefault("TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS", "0")
