"""Files of formats that Pillow can read and this product must not."""

from __future__ import annotations

import io
import os
import struct
from pathlib import Path

import pytest
from PIL import Image

PHOTO = Image.radial_gradient("L").resize((64, 64)).convert("RGB")


def _saved(format: str, mode: str = "RGB") -> bytes:
    file = io.BytesIO()
    PHOTO.convert(mode).save(file, format)
    return file.getvalue()


def _fits() -> bytes:
    cards = (("SIMPLE", "T"), ("BITPIX", "8"), ("NAXIS", "2"), ("NAXIS1", "64"), ("NAXIS2", "64"))
    head = "".join(f"{name:8}= {value:>20}".ljust(80) for name, value in cards) + "END".ljust(80)
    return head.ljust(2880).encode() + bytes(range(256)) * 16


FILES = {
    "EPS": _saved("EPS"),
    "ICNS": _saved("ICNS"),
    "ICO": _saved("ICO"),
    "PCX": _saved("PCX"),
    "TGA": _saved("TGA"),
    "SGI": _saved("SGI"),
    "DDS": _saved("DDS"),
    "SPIDER": _saved("SPIDER", "F"),
    "XBM": _saved("XBM", "1"),
    "PSD": b"8BPS" + struct.pack(">H6xHIIHHIIIH", 1, 3, 64, 64, 8, 3, 0, 0, 0, 0)
    + bytes(range(256)) * 48,
    "FITS": _fits(),
    "WMF": b"\xd7\xcd\xc6\x9a\0\0" + struct.pack("<hhhhH", 0, 0, 64, 64, 96) + bytes(6)
    + b"\x01\0\x09\0" + bytes(40),
    "GRIB": b"GRIB" + bytes(3) + b"\x01" + bytes(100),
    "BUFR": b"BUFR" + bytes(100),
    "HDF5": b"\x89HDF\r\n\x1a\n" + bytes(100),
}  # fmt: skip
REASON = "it is not an image, or of an unknown format"


def write_all(folder: Path) -> list[str]:
    """Write each file into a folder as NAME.png; return their names."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in FILES.items():
        (folder / f"{name}.png").write_bytes(data)
    return [f"{name}.png" for name in FILES]


def trap_ghostscript(folder: Path, patch: pytest.MonkeyPatch) -> Path:
    """Put a `gs` first on PATH; return the file that it writes when it is started."""
    mark = folder / "started"
    folder.mkdir(parents=True, exist_ok=True)
    script = folder / "gs"
    script.write_text(f"#!/bin/sh\necho started >> '{mark}'\necho 10.0\n")
    script.chmod(0o755)
    patch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return mark
