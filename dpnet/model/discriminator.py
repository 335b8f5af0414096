"""The spectral-norm patch discriminator.

The paper gives blocks of 64, 128, 256 and 512 channels at H/2 to H/16, and a map of H/32 x W/32.
Kernel, activation, mask input and loss are our choice.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm

from dpnet.model.config import ModelConfig, preset
from dpnet.model.dtype import without_autocast


class PatchDiscriminator(nn.Module):
    """The discriminator: `forward(image_N3HW in [0, 1], valid_N1HW) -> N1(H/32)(W/32)` logits."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.sees_mask = config.discriminator_sees_mask
        widths = [3 + self.sees_mask, *config.discriminator_widths, 1]
        self.convs = nn.ModuleList(
            spectral_norm(nn.Conv2d(a, b, 4, stride=2, padding=1)) for a, b in pairwise(widths)
        )

    def forward(self, image: Tensor, valid: Tensor) -> Tensor:
        x = 2 * image - 1
        if self.sees_mask:
            x = torch.cat([x, valid.to(x.dtype)], dim=1)
        last = len(self.convs) - 1
        for i, conv in enumerate(self.convs):
            assert isinstance(conv, nn.Conv2d)
            with without_autocast(x):  # the power iteration needs full precision
                weight = conv.weight
            x = F.conv2d(x, weight, conv.bias, stride=2, padding=1)
            if i < last:
                x = F.leaky_relu(x, 0.2)
        return x


def build_discriminator(config: ModelConfig | str) -> PatchDiscriminator:
    """Build the discriminator of a config or of a preset's name."""
    return PatchDiscriminator(preset(config) if isinstance(config, str) else config)
