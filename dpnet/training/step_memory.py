"""Estimate the memory of a training step, and say what to change if a GPU has too little.

Needs only torch.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from data_prep.core.errors import PipelineError
from dpnet.model import ModelConfig, build_discriminator, build_generator
from dpnet.model.losses import VGGFeatures
from dpnet.training.step import Inpaint, Likeness, Persuade

if TYPE_CHECKING:  # pydantic is not needed at run time
    from dpnet.training.settings import LossSettings

log = logging.getLogger(__name__)

# In fp32: a weight, its gradient and two averages of Adam; the generator has an averaged copy too.
GENERATOR_BYTES, DISCRIMINATOR_BYTES = 20, 16
USABLE = 0.9  # of a GPU; the rest is for results between layers and for torch itself. Ours.


class StepMemory(NamedTuple):
    """The memory of a training step in bytes.

    Attributes:
        fixed: For the networks and their optimisers.
        image: For each image that is computed at once: what the backward pass needs again.
    """

    fixed: int
    image: int

    def fits(self, total: int) -> int:
        """Return how many images can be computed at once with `total` bytes of memory."""
        return max(0, int(USABLE * total - self.fixed) // self.image)


def step_memory(
    config: ModelConfig,
    losses: LossSettings,
    size: int,
    *,
    vgg: VGGFeatures | None = None,
    bf16: bool = False,
    checkpointing: bool = False,
) -> StepMemory:
    """Estimate the memory of a step without computing one.

    All operations run on tensors without contents. Compiled code keeps less, so this is more than a
    compiled step needs.

    Args:
        config: Of the networks.
        losses: Weights of the loss terms.
        size: Side of the images in pixels.
        vgg: Feature network of the perceptual and style losses.
        bf16: Autocast to bfloat16.
        checkpointing: The backward pass computes the residual blocks again.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode  # seconds to import

    with FakeTensorMode(allow_non_fake_inputs=True):
        generator, discriminator = build_generator(config), build_discriminator(config)
        generator.checkpointing = checkpointing
        own: list[nn.Module] = [generator, discriminator, *([vgg] if vgg is not None else [])]
        weights = {p.untyped_storage()._cdata for each in own for p in each.parameters()}
        kept: dict[int, torch.UntypedStorage] = {}

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in weights:
                kept[storage._cdata] = storage
            return tensor

        image, valid = torch.empty(1, 3, size, size), torch.empty(1, 1, size, size)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            raw, composite = Inpaint(generator, bf16)(image, valid)
            total = Likeness(losses, vgg, bf16)(raw, composite, image, valid)[0]
            if losses.adversarial:
                total = total + Persuade(discriminator, losses.gan, bf16)(composite, valid)
        needed = sum(storage.nbytes() for storage in kept.values())
        del total  # it kept them
        sizes = [sum(p.numel() for p in each.parameters()) for each in own]
    fixed = GENERATOR_BYTES * sizes[0] + DISCRIMINATOR_BYTES * sizes[1] + 4 * sum(sizes[2:])
    return StepMemory(fixed, needed)


def gpu_memory() -> int:
    """Return the memory of this rank's GPU in bytes."""
    return torch.cuda.mem_get_info()[1]


@contextmanager
def explained_out_of_memory(
    advise: Callable[[int], str], memory: Callable[[], int] = gpu_memory
) -> Iterator[None]:
    """Say what to change if the GPU's memory ends in the block.

    Args:
        advise: Gets the GPU's memory in bytes, and returns what to change.
        memory: Returns the GPU's memory in bytes.

    Raises:
        PipelineError: It ended.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise PipelineError(advise(memory())) from error


def advice(needs: StepMemory, total: int, own: int, accumulate: int) -> str:
    """Return what to change so that a step fits into `total` bytes.

    Args:
        needs: Of the step.
        total: The GPU's memory.
        own: Samples of this rank in a batch.
        accumulate: Parts in which they are computed now.
    """
    part = -(-own // accumulate)
    wanted = needs.fixed + part * needs.image
    said = (
        f"the GPU's memory of {total / 1e9:.0f} GB is too small: a part of {part} needs about"
        f" {wanted / 1e9:.1f} GB"
    )
    fits = min(needs.fits(total), part - 1)
    if fits < 1:
        return f"{said}. Choose a smaller model (model.preset) or smaller images (images.size)."
    return (
        f"{said}. Set train.accumulate to {-(-own // fits)}: it computes {fits} images at once and"
        " changes nothing else."
    )


def room(before: int, peak: int, part: int, total: int) -> str:
    """Return how many images fit at once, by a pass that was measured.

    Args:
        before: Bytes in use before the pass.
        peak: The most bytes in use in it.
        part: Images in it.
        total: The GPU's memory in bytes.
    """
    fits = StepMemory(before, max(1, (peak - before) // part)).fits(total)
    return (
        f"a part of {part} needs {peak / 1e9:.1f} GB of the GPU's {total / 1e9:.0f} GB: up to"
        f" {fits} images would fit"
    )


@contextmanager
def room_logged(part: int, device: torch.device) -> Iterator[None]:
    """Log how many images fit at once, by the pass in the block. Only on a GPU.

    Args:
        part: Images in the pass.
        device: Device of this rank.
    """
    if device.type != "cuda":
        yield
        return
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    yield
    log.info("train: %s", room(before, torch.cuda.max_memory_allocated(), part, gpu_memory()))
