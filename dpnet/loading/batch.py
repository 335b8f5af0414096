"""A training batch, and its transfer to the device that trains."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Batch:
    """Images and masks of a batch, in memory of the CPU.

    Attributes:
        image: uint8 [N, H, W, 3], RGB.
        valid: uint8 [N, H, W] in {0, 1}. 1 = known pixel, 0 = hole.
    """

    image: torch.Tensor
    valid: torch.Tensor


def to_device(batch: Batch, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the image N3HW in [0, 1] (channels_last) and the mask N1HW in {0, 1}, both float32."""
    # Training batches are in page-locked memory, so this copy does not wait for the device.
    image = batch.image.to(device, non_blocking=True)
    valid = batch.valid.to(device, non_blocking=True)
    return image.permute(0, 3, 1, 2).float() / 255, valid[:, None].float()
