"""Duplicates: the copy that stays, and photos that are nearly the same."""

from __future__ import annotations

import hashlib
import itertools

import numpy as np
import pytest

from data_prep.images import duplicates
from data_prep.images.duplicates import NEAR, near_pairs, same_content


def digests(contents: str) -> np.ndarray:
    joined = b"".join(hashlib.sha256(c.encode()).digest() for c in contents)
    return np.frombuffer(joined, np.uint8).reshape(-1, 32)


def splits(codes: str) -> np.ndarray:
    return np.array(["tve".index(code) for code in codes], np.int8)


def test_of_the_same_bytes_in_one_split_the_lowest_key_stays() -> None:
    dropped, kept = same_content(digests("abacab"), np.ones(6, bool), splits("tttttt"))
    assert dropped.tolist() == [2, 4, 5]
    assert kept.tolist() == [0, 0, 1]


def test_a_copy_in_two_splits_leaves_the_split_of_lower_rank() -> None:
    dropped, kept = same_content(digests("aabbccc"), np.ones(7, bool), splits("tvvetve"))
    assert dict(zip(dropped.tolist(), kept.tolist(), strict=True)) == {0: 1, 2: 3, 4: 6, 5: 6}


def test_unusable_rows_neither_stay_nor_remove_others() -> None:
    dropped, _ = same_content(digests("aaa"), np.array([False, True, True]), splits("ttt"))
    assert dropped.tolist() == [2]


def brute_force(phash: np.ndarray, split: np.ndarray) -> list[tuple[int, int]]:
    """Return (row, distance) of every row with a near one in a split of higher rank."""
    found = []
    for row in range(len(phash)):
        apart = [
            (int(phash[row]) ^ int(phash[other])).bit_count()
            for other in range(len(phash))
            if split[other] > split[row]
        ]
        if apart and min(apart) <= NEAR:
            found.append((row, min(apart)))
    return found


@pytest.mark.parametrize("chunk", [1 << 20, 5])
def test_near_pairs_equal_the_result_of_comparing_all_pairs(
    chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(duplicates, "_PAIRS", chunk)
    rng = np.random.default_rng(1)
    base = rng.integers(0, 2**63, 60, dtype=np.uint64)
    flips = [sum(1 << int(b) for b in rng.choice(64, k, replace=False)) for k in range(8)] * 8
    near = base ^ np.array(flips[:60], np.uint64)
    phash = np.concatenate([base, near, near[:20]])
    split = rng.integers(0, 3, len(phash)).astype(np.int8)
    pairs = near_pairs(phash, np.ones(len(phash), bool), split)
    assert [(pair.row, pair.distance) for pair in pairs] == brute_force(phash, split)
    for pair in pairs:
        assert split[pair.other] > split[pair.row]
        assert int(phash[pair.row] ^ phash[pair.other]).bit_count() == pair.distance
    assert len(pairs) > 20


def test_contents_with_nearly_the_same_hash_are_not_the_same() -> None:
    for byte in (0, 7, 8, 15, 16, 23, 24, 31):
        sha256 = np.zeros((2, 32), np.uint8)
        sha256[1, byte] = 1
        assert len(same_content(sha256, np.ones(2, bool), splits("te"))[0]) == 0


@pytest.mark.parametrize(("apart", "near"), [(4, True), (5, False)])
def test_photos_are_near_up_to_four_bits_wherever_these_are(apart: int, near: bool) -> None:
    # One bit in all but one of the five bands, so that only that band is equal.
    for bits in itertools.combinations((5, 20, 30, 45, 60), apart):
        phash = np.array([0, sum(1 << bit for bit in bits)], np.uint64)
        assert bool(near_pairs(phash, np.ones(2, bool), splits("te"))) == near


def test_without_another_split_nothing_is_near() -> None:
    assert near_pairs(np.zeros(5, np.uint64), np.ones(5, bool), splits("ttttt")) == []
