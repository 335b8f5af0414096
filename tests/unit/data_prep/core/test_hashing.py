"""SplitMix64 against outputs that others have published."""

from __future__ import annotations

import numpy as np
import pytest

from data_prep.core.hashing import GAMMA, splitmix64

# Seed 0: the outputs of https://prng.di.unimi.it/splitmix64.c, the reference program.
# Seed 1234567: https://rosettacode.org/wiki/Pseudo-random_numbers/Splitmix64
PUBLISHED = {
    0: [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F, 0xF88BB8A8724C81EC],
    1234567: [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ],
}


@pytest.mark.parametrize("seed", sorted(PUBLISHED))
def test_the_outputs_are_the_published_ones(seed: int) -> None:
    steps = np.arange(len(PUBLISHED[seed]), dtype=np.uint64)
    states = np.uint64(seed) + steps * np.uint64(GAMMA)
    assert splitmix64(states).tolist() == PUBLISHED[seed]


def test_different_numbers_have_different_hashes() -> None:
    numbers = np.arange(100_000, dtype=np.uint64)
    assert len(np.unique(splitmix64(numbers))) == len(numbers)
    assert numbers[5] == 5  # the argument is not changed
