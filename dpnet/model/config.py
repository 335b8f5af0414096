"""Sizes and switches of the network, and the presets.

The paper publishes neither widths nor depths: every number here is our choice. `base` is chosen to
meet the one cost that the paper states, 55.58 GMac at 3 x 256 x 256 over convolution and linear
modules.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

Attention = Literal["none", "single", "pyramid"]
Normalization = Literal["instance", "batch", "region", "dynamic"]
MaskUpdate = Literal["soft", "binary"]


@dataclass(frozen=True)
class ModelConfig:
    """Everything that decides the shape of both networks.

    Attributes:
        widths: channels at full, half and quarter resolution.
        blocks: residual blocks at quarter resolution.
        attention_dim: channels d of a query or key pixel, and d_v of a value pixel.
        guide: channels of the projected encoder feature that steers dynamic normalization; the
            mask makes one more, so a multiple of 8 minus 1 is fast.
        discriminator_widths: channels of the discriminator's first four convolutions.
        pyramid: False takes one 3x3 mask-aware convolution in the place of each pyramid.
        attention: keys from three encoder layers, from one, or no attention.
        normalization: see `dpnet.model.normalization`.
        mask: soft confidence, or the binary any-valid rule of partial convolution.
        discriminator_sees_mask: the mask is the discriminator's fourth input channel.
    """

    widths: tuple[int, int, int] = (64, 128, 256)
    blocks: int = 8
    attention_dim: int = 128
    guide: int = 63
    discriminator_widths: tuple[int, int, int, int] = (64, 128, 256, 512)
    pyramid: bool = True
    attention: Attention = "pyramid"
    normalization: Normalization = "dynamic"
    mask: MaskUpdate = "soft"
    discriminator_sees_mask: bool = True

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(record: dict[str, Any]) -> ModelConfig:
        """The config that `to_json` wrote. Raises TypeError on unknown keys."""
        values: dict[str, Any] = {
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
    """The preset `name` with some fields changed. Raises ValueError on an unknown name."""
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}: choose one of {', '.join(PRESETS)}.")
    return replace(PRESETS[name], **changes)
