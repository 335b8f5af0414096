"""The tar format has one home, and it agrees with `tarfile`."""

from __future__ import annotations

import re
import tarfile
from pathlib import Path

import pytest

from data_prep.core.tar_format import BLOCK, END, checksum_fits, file_header, padded, padding

REPOSITORY = Path(__file__).parents[4]


@pytest.mark.parametrize(
    ("size", "fill", "whole"),
    [(0, 0, 0), (1, 511, 512), (511, 1, 512), (512, 0, 512), (513, 511, 1024)],
)
def test_data_is_filled_up_to_whole_blocks(size: int, fill: int, whole: int) -> None:
    assert (padding(size), padded(size)) == (fill, whole)


@pytest.mark.parametrize("size", [0, 1, 511, 512, 8**8 + 3])
def test_a_header_equals_the_header_that_tarfile_writes(size: int) -> None:
    info = tarfile.TarInfo("some-name_1.jpg")
    info.size = size
    assert file_header(info.name, size) == info.tobuf(tarfile.USTAR_FORMAT, "ascii", "strict")


def test_a_header_with_one_changed_byte_has_another_checksum() -> None:
    header = bytearray(file_header("a.jpg", 1000))
    assert checksum_fits(header)
    for at in range(BLOCK):
        header[at] ^= 1
        assert not checksum_fits(header), at
        header[at] ^= 1


def test_the_end_is_the_one_that_tarfile_reads() -> None:
    assert len(END) == 2 * BLOCK
    assert not any(END)


def test_no_other_module_defines_the_size_of_a_tar_block() -> None:
    home = REPOSITORY / "data_prep" / "core" / "tar_format.py"
    modules = [path for path in (REPOSITORY / "data_prep").rglob("*.py") if path != home]
    assert len(modules) > 50
    again = [path for path in modules if re.search(r"BLOCK = 512\b", path.read_text("utf-8"))]
    assert again == []
