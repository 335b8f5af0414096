"""Sizes and switches of the network, and the presets.

The paper publishes neither widths nor depths: every number here is our choice. The preset `base`
meets the one cost in the paper, 55.58 GMac at 3 x 256 x 256 over convolution and linear modules.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

Attention = Literal["none", "single", "pyramid"]
Normalization = Literal["instance", "batch", "region", "dynamic"]
MaskUpdate = Literal["soft", "binary"]
Statistics = Literal["own", "known", "whole"]


@dataclass(frozen=True)
class ModelConfig:
    """The sizes and switches of both networks.

    Attributes:
        widths: Channels at full, half and quarter resolution.
        blocks: Residual blocks at quarter resolution.
        attention_dim: Channels d of a query or key pixel, and d_v of a value pixel.
        guide: Channels of the projected encoder feature that steers dynamic normalization. The mask
            adds one channel, so a multiple of 8 minus 1 is fast.
        discriminator_widths: Channels of the discriminator's first four convolutions.
        pyramid: False replaces each pyramid by one 3x3 mask-aware convolution.
        attention: Keys from three encoder layers, from one, or no attention.
        normalization: See `dpnet.model.normalization`.
        statistics: Whose mean and variance dynamic normalization uses: each region its own, both
            those of the known region, or both those of the whole map.
        mask: Soft confidence, or the binary any-valid rule of partial convolution.
        discriminator_sees_mask: Give the discriminator the mask as a fourth input channel.
    """

    widths: tuple[int, int, int] = (64, 128, 256)
    blocks: int = 8
    attention_dim: int = 128
    guide: int = 63
    discriminator_widths: tuple[int, int, int, int] = (64, 128, 256, 512)
    pyramid: bool = True
    attention: Attention = "pyramid"
    normalization: Normalization = "dynamic"
    statistics: Statistics = "known"
    mask: MaskUpdate = "soft"
    discriminator_sees_mask: bool = True

    def to_json(self) -> dict[str, Any]:
        """Return the config as JSON values."""
        return asdict(self)

    @staticmethod
    def from_json(record: dict[str, Any]) -> ModelConfig:
        """Read a config from `to_json`'s values, of older versions too.

        Raises TypeError for unknown keys.
        """
        # Before version 0.3 each region had its own statistics, and no record said so.
        values: dict[str, Any] = {"statistics": "own"} | {
            k: tuple(v) if isinstance(v, list) else v for k, v in record.items()
        }
        return ModelConfig(**values)


PRESETS: dict[str, ModelConfig] = {
    "tiny": ModelConfig(
        widths=(8, 32, 64),
        blocks=2,
        attention_dim=16,
        guide=15,
        discriminator_widths=(16, 32, 64, 128),
    ),
    "base": ModelConfig(),
    "large": ModelConfig(widths=(128, 256, 512), blocks=8, attention_dim=192, guide=63),
}


def preset(name: str, **changes: Any) -> ModelConfig:
    """Return the preset `name` with some fields changed. Raises ValueError for an unknown name."""
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}: choose one of {', '.join(PRESETS)}.")
    return replace(PRESETS[name], **changes)
