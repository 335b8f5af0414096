"""Validation during training on fixed pairs of image and mask: hole PSNR and images."""

from __future__ import annotations

import io
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data_prep.core.manifest import read_manifest
from data_prep.core.storage.store import Store
from dpnet.loading.batch import Batch, to_device
from dpnet.loading.pairs import validation_pairs
from dpnet.loading.samples import Samples
from dpnet.model import Generator
from dpnet.model.fill import pull_push
from dpnet.model.generator import known_mean
from dpnet.training.job import TrainJob

BATCH = 32
PSNR_CAP = 100.0
PAIRS = 6  # pairs in a strip
GAP = 2  # pixels between images


class Validation:
    """Hole PSNR of the averaged generator on fixed pairs of the val split."""

    def __init__(self, store: Store, job: TrainJob) -> None:
        size = mask_size(store, job.masks.folder)
        self.images = images = Samples(store, job.images, "val", size)
        self.masks = masks = Samples(store, job.masks, "eval")
        digests = (job.images.content_digest, job.masks.content_digest)
        self.pairs = validation_pairs(
            images, masks, digests, seed=job.settings.seed, count=job.settings.validation_pairs
        )

    @torch.no_grad()
    def measure(self, generator: Generator, step: int, rank: int, world: int) -> dict[str, Any]:
        """Return a log record with the mean hole PSNR in dB of network, mean fill and smooth fill.

        Args:
            generator: The averaged generator.
            step: Steps done so far.
            rank: This rank. Each rank measures its share of the pairs.
            world: Number of ranks. Every rank must call this.
        """
        device = next(generator.parameters()).device
        sums = torch.zeros(4, dtype=torch.float64)
        mine = self.pairs[rank::world]
        for start in range(0, len(mine), BATCH):
            image, valid = to_device(self._batch(mine[start : start + BATCH]), device)
            known = image * valid
            mean = known_mean(known, valid)
            smooth = pull_push(known, valid, mean)
            predicted = generator(image, valid)
            sums += torch.tensor(
                [
                    float(hole_psnr(predicted, image, valid).sum()),
                    float(hole_psnr(mean.expand_as(image), image, valid).sum()),
                    len(image),
                    float(hole_psnr(smooth, image, valid).sum()),
                ]
            )
        if world > 1:
            sums = sums.to(device)
            torch.distributed.all_reduce(sums)
        ours, mean_fill, _, smooth_fill = (sums / sums[2]).tolist()
        return {
            "kind": "validation",
            "step": step,
            "hole_psnr": round(ours, 4),
            "mean_fill_psnr": round(mean_fill, 4),
            "smooth_fill_psnr": round(smooth_fill, 4),
            "pairs": len(self.pairs),
            "parameters": sum(p.numel() for p in generator.parameters()),
        }

    @torch.no_grad()
    def strip(self, generator: Generator) -> bytes:
        """Draw a PNG with one row for each of a few pairs: truth, masked image, prediction."""
        from PIL import Image

        count = min(PAIRS, len(self.pairs))
        chosen = [self.pairs[i * len(self.pairs) // count] for i in range(count)]
        batch = self._batch(chosen)
        image, valid = to_device(batch, next(generator.parameters()).device)
        raw = torch.where(valid > 0, image, generator(image, valid).float())
        output = (raw.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        truth, known = batch.image.numpy(), batch.valid.numpy()[..., None]
        masked = np.where(known > 0, truth, 255).astype(np.uint8)
        side = truth.shape[1]
        sheet = Image.new("RGB", (3 * (side + GAP) - GAP, count * (side + GAP) - GAP), "white")
        for column, images in enumerate((truth, masked, output)):
            for row, pixels in enumerate(images):
                at = (column * (side + GAP), row * (side + GAP))
                sheet.paste(Image.fromarray(pixels), at)
        file = io.BytesIO()
        sheet.save(file, "PNG")
        return file.getvalue()

    def _batch(self, pairs: Iterable[tuple[int, int]]) -> Batch:
        both = [(self.images.image(i), self.masks.valid(m)) for i, m in pairs]
        image, valid = np.stack([i for i, _ in both]), np.stack([v for _, v in both])
        return Batch(torch.from_numpy(image), torch.from_numpy(valid))


def mask_size(store: Store, folder: str) -> int:
    """Return the side of a stage's masks in pixels. Training and validation use this size."""
    return int(read_manifest(store, folder).settings["size"])


def hole_psnr(predicted: Tensor, truth: Tensor, valid: Tensor) -> Tensor:
    """Return the PSNR in dB over the hole's pixels after rounding to 8 bits, for each sample.

    It is the figure of `dpnet.evaluation.metrics.hole_psnr` for tensors on the training device; a
    test compares both. A sample without a hole counts as perfect, and perfect is capped at 100 dB.
    """
    hole = 1 - valid
    levels = (predicted.float() * 255).round() - (truth.float() * 255).round()
    squared = (levels.square() * hole).sum(dim=(1, 2, 3)) / (3 * hole.sum(dim=(1, 2, 3))).clamp(
        min=1
    )
    psnr: Tensor = 10 * torch.log10(255**2 / squared)
    return psnr.clamp(max=PSNR_CAP)
