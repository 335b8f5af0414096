"""DPNet's network. It needs only torch."""

from dpnet.model.config import PRESETS, ModelConfig
from dpnet.model.discriminator import PatchDiscriminator, build_discriminator
from dpnet.model.generator import Generator, build_generator

__all__ = [
    "PRESETS",
    "Generator",
    "ModelConfig",
    "PatchDiscriminator",
    "build_discriminator",
    "build_generator",
]
