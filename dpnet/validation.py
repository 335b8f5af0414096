"""Validation during training: hole PSNR on frozen pairs, and how batches become tensors."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dpnet.data import Batch, Samples, validation_pairs
from dpnet.model import Generator
from dpnet.model.generator import known_mean
from dpnet.train import TrainJob

BATCH = 32
PSNR_CAP = 100.0


class Validation:
    """Hole PSNR of the averaged generator on frozen pairs of the val split."""

    def __init__(self, images: Samples, masks: Samples, job: TrainJob) -> None:
        self.images, self.masks = images, masks
        digests = (job.images.content_digest, job.masks.content_digest)
        self.pairs = validation_pairs(
            images, masks, digests, seed=job.settings.seed, count=job.settings.validation_pairs
        )

    @torch.no_grad()
    def measure(self, generator: Generator, step: int, rank: int, world: int) -> dict[str, Any]:
        """Log record: mean hole PSNR in dB of the network and of mean fill."""
        device = next(generator.parameters()).device
        sums = torch.zeros(3, dtype=torch.float64)
        mine = self.pairs[rank::world]
        for start in range(0, len(mine), BATCH):
            image, valid = to_device(self._batch(mine[start : start + BATCH]), device)
            mean = known_mean(image * valid, valid).expand_as(image)
            predicted = generator(image, valid)
            sums += torch.tensor(
                [
                    float(hole_psnr(predicted, image, valid).sum()),
                    float(hole_psnr(mean, image, valid).sum()),
                    len(image),
                ]
            )
        if world > 1:
            sums = sums.to(device)
            torch.distributed.all_reduce(sums)
        ours, mean_fill = (sums[:2] / sums[2]).tolist()
        return {
            "kind": "validation",
            "step": step,
            "hole_psnr": round(ours, 4),
            "mean_fill_psnr": round(mean_fill, 4),
            "pairs": len(self.pairs),
            "parameters": sum(p.numel() for p in generator.parameters()),
        }

    def _batch(self, pairs: Iterable[tuple[int, int]]) -> Batch:
        both = [(self.images.image(i), self.masks.valid(m)) for i, m in pairs]
        return Batch(np.stack([i for i, _ in both]), np.stack([v for _, v in both]))


def hole_psnr(predicted: Tensor, truth: Tensor, valid: Tensor) -> Tensor:
    """PSNR in dB over the hole's pixels after rounding to 8 bits, one value per sample.

    A sample without a hole has a perfect prediction; perfect is capped at 100 dB.
    """
    hole = 1 - valid
    levels = (predicted.float() * 255).round() - (truth.float() * 255).round()
    squared = (levels.square() * hole).sum(dim=(1, 2, 3)) / (3 * hole.sum(dim=(1, 2, 3))).clamp(
        min=1
    )
    psnr: Tensor = 10 * torch.log10(255**2 / squared)
    return psnr.clamp(max=PSNR_CAP)


def to_device(batch: Batch, device: torch.device) -> tuple[Tensor, Tensor]:
    """N3HW in [0, 1] (channels_last) and N1HW in {0, 1}, both float32."""
    image, valid = torch.from_numpy(batch.image), torch.from_numpy(batch.valid)
    if device.type == "cuda":
        # A copy from memory that is not pinned would wait for all that the device has yet to do.
        image, valid = image.pin_memory(), valid.pin_memory()
    image, valid = image.to(device, non_blocking=True), valid.to(device, non_blocking=True)
    return image.permute(0, 3, 1, 2).float() / 255, valid[:, None].float()
