"""The learning rate and the weight of the adversarial loss at each step. Our choice."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # pydantic is not needed at run time
    from dpnet.training.settings import LossSettings, TrainSettings

FINETUNE_RATE = 0.5  # share of the peak at which fine-tuning begins


def rate(step: int, settings: TrainSettings) -> float:
    """Return the learning rate at `step`, counted from 0, as a share of its peak.

    It rises linearly in the warm-up and is then constant. In the last `finetune_share` of the steps
    it follows a cosine from half of the peak to `final_rate`.
    """
    warm = min(1.0, (step + 1) / max(settings.warmup_steps, 1))
    start = settings.steps * (1 - settings.finetune_share)
    if step < start:
        return warm
    done = (step - start) / (settings.steps - start)
    cosine = (1 + math.cos(math.pi * done)) / 2
    return warm * (settings.final_rate + (FINETUNE_RATE - settings.final_rate) * cosine)


def adversarial_weight(step: int, losses: LossSettings, settings: TrainSettings) -> float:
    """Return the weight of the adversarial loss at `step`, counted from 0.

    It is 0 before `adversarial_from`, then rises linearly over `warmup_steps`. Meanwhile the
    discriminator learns enough to be useful.
    """
    since = step - settings.adversarial_from + 1
    return losses.adversarial * min(1.0, max(0, since) / max(settings.warmup_steps, 1))
