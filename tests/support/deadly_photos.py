"""Photos whose decoder crashes or runs without end, in every process that tests start.

No known file does that to today's decoders. So Python itself loads a module at the start of each
process (`sitecustomize`), which wraps the real decoder. The product knows nothing of it.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from image_sets import picture
from PIL import PngImagePlugin

CRASH, HANG, KILL = "CRASH-HERE", "HANG-HERE", "KILL-HERE"
_CODE = f'''
import ctypes, os, re, signal
import PIL.Image

_open = PIL.Image.open

def _deadly(file, *rest, **options):
    data = bytes(file.getbuffer()) if hasattr(file, "getbuffer") else b""
    if b"{CRASH}" in data:
        ctypes.string_at(0)  # a real segmentation fault
    if b"{HANG}" in data:
        re.match(r"(a+)+$", "a" * 64 + "b")  # C code that never returns to Python
    if b"{KILL}" in data:
        os.kill(os.getpid(), signal.SIGKILL)  # as the system does when memory is short
    return _open(file, *rest, **options)

PIL.Image.open = _deadly
'''


def deadly_decoders(folder: Path, patch: pytest.MonkeyPatch) -> None:
    """Make the decoders of all processes that are started from now on deadly."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(_CODE)
    path = os.environ.get("PYTHONPATH", "")
    patch.setenv("PYTHONPATH", os.pathsep.join([str(folder), *([path] if path else [])]))


def deadly_photo(path: Path, what: str) -> None:
    """Write a sound PNG file that is deadly for such decoders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    comment = PngImagePlugin.PngInfo()
    comment.add_text("comment", what)
    picture(900).save(path, pnginfo=comment)
