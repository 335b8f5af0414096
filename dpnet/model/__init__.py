"""DPNet's network. It needs only torch."""

from dpnet.model.compile_cache import use_private_cache
from dpnet.model.config import PRESETS, ModelConfig
from dpnet.model.discriminator import PatchDiscriminator, build_discriminator
from dpnet.model.generator import Generator, build_generator

use_private_cache()  # torch chooses the folder as soon as its compiler is imported

__all__ = [
    "PRESETS",
    "Generator",
    "ModelConfig",
    "PatchDiscriminator",
    "build_discriminator",
    "build_generator",
]
