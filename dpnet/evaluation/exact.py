"""Run networks so that no value depends on the number of threads, or on other pairs.

On a CPU, torch splits sums by its number of threads, which changes their rounding. So each call
uses one thread, and takes one image; the images are filled on several threads at the same time. On
a GPU a call takes a whole batch, always of the same pairs.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Executor
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray

from dpnet.model import Generator

Array = NDArray[np.uint8]


@contextmanager
def one_thread_per_call() -> Iterator[None]:
    """Let torch use one thread in each call, also in threads that start in the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def exact_convolutions(device: torch.device) -> Iterator[None]:
    """Let a GPU's convolutions in float32 round as such, in a fixed order.

    TF32 would round their factors to 10 bits. The flags belong to the process, so this is for one
    thread at a time; on a CPU nothing changes.
    """
    if device.type == "cpu":
        yield
    else:
        with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
            yield


def fill_batch(generator: Generator, truths: Array, valid: Array, pool: Executor) -> Array:
    """Return the generator's composites of a batch, uint8 [N, H, W, 3].

    Args:
        generator: in eval mode.
        truths: uint8 [N, H, W, 3].
        valid: uint8 [N, H, W], 1 = known.
        pool: threads, which fill the images on a CPU.
    """
    from dpnet.inpainting.tiles import device_of, inpaint_arrays

    if device_of(generator).type != "cpu":
        return inpaint_arrays(generator, truths, valid)

    def fill(number: int) -> Array:
        own = slice(number, number + 1)
        alone: Array = inpaint_arrays(generator, truths[own], valid[own])[0]
        return alone

    return np.stack(list(pool.map(fill, range(len(truths)))))
