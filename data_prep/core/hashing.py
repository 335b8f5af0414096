"""SplitMix64: a cheap hash of 64-bit numbers, also used as a random number generator."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

GAMMA = 0x9E3779B97F4A7C15  # the state grows by this number from one output to the next


def splitmix64(states: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return the output of SplitMix64 that follows each state (Steele, Lea and Flood 2014).

    Different states give different outputs, so the function is also a hash without collisions.
    Output `n` (from 0) of a generator with seed `s` is that of state `s + n * GAMMA` modulo 2^64.
    """
    import numpy as np

    z = states + np.uint64(GAMMA)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
