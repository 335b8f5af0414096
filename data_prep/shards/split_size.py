"""The size of a split: its samples, its shards, and the bytes of its tars."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from data_prep.core.tar_format import BLOCK, END, padded


@dataclass(frozen=True)
class SplitSize:
    """The size of one split, counted or estimated.

    Attributes:
        samples: number of samples.
        shards: number of shards.
        bytes: bytes of the tars, without their indexes.
    """

    samples: int
    shards: int
    bytes: int


def sample_bytes(files: Mapping[str, bytes]) -> int:
    """Return the bytes that a sample takes in a tar: a header, and data in whole blocks, each."""
    return sum(BLOCK + padded(len(data)) for data in files.values())


def tar_bytes(samples: float, shards: int) -> int:
    """Return the bytes of tars.

    Args:
        samples: bytes of all samples, as `sample_bytes` counts them.
        shards: number of tars.
    """
    return round(samples) + shards * len(END)
