"""DPNet's generator: a mask-aware pyramidal encoder and a decoder with pyramidal attention.

Resolutions for an input of side S: the encoder has S, S/2 and S/4, and two more layers at S/8 and
S/16 as keys of the attention. The decoder has S/4 (attention), S/2 and S.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from dpnet.model.attention import PyramidAttention, key_layers
from dpnet.model.config import ModelConfig, preset
from dpnet.model.dtype import full, is_traced
from dpnet.model.fill import pull_push
from dpnet.model.normalization import DecoderNorm, EncoderNorm
from dpnet.model.pyramid import Level, MaskAwareConv, pyramid_levels

MULTIPLE = 16  # the coarsest layer's stride
SLOPE = 0.2
FOLLOW = 50.0  # the share of the smooth fill learns this much faster than the weights
FLAT = 0.02  # smallest deviation, so that an image of one colour is not divided by 0


def activate(x: Tensor) -> Tensor:
    """Apply the network's activation."""
    return F.leaky_relu(x, SLOPE)


class Units(NamedTuple):
    """The units of a sample's colours, and the smooth fill of its hole.

    The tiles of one image share them, so that no seams are visible.

    Attributes:
        centre: N311, l of the mean known colour.
        scale: N111, the deviation of the known l from the centre.
        smooth: N3HW, the smooth fill in these units.
    """

    centre: Tensor
    scale: Tensor
    smooth: Tensor


class EncoderLayer(nn.Module):
    """A mask-aware convolution, a normalization by the new mask, and the activation."""

    def __init__(
        self, channels_in: int, channels_out: int, levels: list[Level], stride: int, c: ModelConfig
    ) -> None:
        super().__init__()
        self.conv = MaskAwareConv(channels_in, levels, stride=stride, mask=c.mask)
        self.norm = EncoderNorm(channels_out, c.normalization, c.statistics)

    def forward(self, x: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
        x, m = self.conv(x, m)
        return activate(self.norm(x, m)), m


class ResidualBlock(nn.Module):
    """A residual block y = F + f(F) with two mask-aware pyramids; its mask is max(m, m')."""

    def __init__(self, channels: int, c: ModelConfig) -> None:
        super().__init__()
        levels = pyramid_levels(channels, channels, pyramid=c.pyramid)
        self.first = EncoderLayer(channels, channels, levels, 1, c)
        self.second = MaskAwareConv(channels, levels, mask=c.mask)
        self.norm = EncoderNorm(channels, c.normalization, c.statistics)
        if c.normalization in ("dynamic", "region"):
            # Start near the identity, so that the signal passes through all blocks.
            nn.init.constant_(self.norm.gamma, 0.2)

    def forward(self, x: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
        y, m1 = self.first(x, m)
        y, m2 = self.second(y, m1)
        return x + self.norm(y, m2), torch.maximum(m, m2)


class DecoderLayer(nn.Module):
    """Upsampling, joining the encoder's feature, 3x3 convolution, normalization, activation."""

    def __init__(
        self, below: int, skip: int, channels: int, c: ModelConfig, colours: int = 0
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(below + skip + colours, channels, 3, padding=1)
        nn.init.kaiming_normal_(self.conv.weight, a=SLOPE)
        self.norm = DecoderNorm(channels, skip, c.guide, c.normalization, c.statistics)

    def forward(self, x: Tensor, feature: Tensor, m: Tensor, *extra: Tensor) -> Tensor:
        x = F.interpolate(x, scale_factor=2, mode="nearest")
        x = self.conv(torch.cat([x, feature, *extra], dim=1))
        return activate(self.norm(x, m, feature))


class Generator(nn.Module):
    """The generator: `forward(image_N3HW in [0, 1], valid_N1HW) -> N3HW in [0, 1]`, the prediction.

    `valid` is 1 for a known pixel and 0 in the hole. Values of the image in the hole, NaN included,
    have no influence. The image may have any size: it is padded to a multiple of 16, and the result
    is cropped.

    Colours have units of their own, which is our choice. Other networks need about a thousand steps
    only to find the colours. Let l = atanh(2 colour - 1), mu the mean of a sample's known colours,
    and s the deviation of its known l from l(mu). The network sees (l - l(mu)) / s and returns
    (tanh(l(mu) + s y) + 1) / 2, so errors are small if the image has little contrast. y is the
    output of the last convolution plus a learned share of a smooth fill of the hole. The last
    decoder layer sees this fill too. Both terms start at 0, so training starts from mean fill.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.checkpointing = False  # whether the backward pass computes the blocks again
        full, half, quarter = config.widths
        self.stem = EncoderLayer(3, full, [Level(7, 1, full)], 1, config)
        self.down1 = self._down(full, half)
        self.down2 = self._down(half, quarter)
        self.blocks = nn.ModuleList(ResidualBlock(quarter, config) for _ in range(config.blocks))
        self.attention: PyramidAttention | None = None
        if config.attention == "pyramid":
            self.down3 = self._down(quarter, quarter)
            self.down4 = self._down(quarter, quarter)
        if config.attention != "none":
            layers = key_layers(config.attention, [quarter] * 3)
            self.attention = PyramidAttention(quarter, layers, config.attention_dim)
        self.middle = DecoderNorm(
            quarter, quarter, config.guide, config.normalization, config.statistics
        )
        self.up1 = DecoderLayer(quarter, half, half, config)
        self.up2 = DecoderLayer(half, full, full, config, colours=3)
        self.follow = nn.Parameter(torch.zeros(3, 1, 1))  # share of the smooth fill, see FOLLOW
        self.out = nn.Conv2d(full, 3, 3, padding=1)
        nn.init.zeros_(self.out.weight)
        assert self.out.bias is not None
        nn.init.zeros_(self.out.bias)

    def _down(self, channels_in: int, channels_out: int) -> EncoderLayer:
        levels = pyramid_levels(channels_in, channels_out, pyramid=self.config.pyramid)
        return EncoderLayer(channels_in, channels_out, levels, 2, self.config)

    def forward(self, image: Tensor, valid: Tensor, units: Units | None = None) -> Tensor:
        """Check the input and return the prediction. Raises ValueError for an invalid input.

        Args:
            image: N3HW in [0, 1].
            valid: N1HW in {0, 1}.
            units: Units of a whole image, for its tiles. By default those of `image`.
        """
        if not (torch.compiler.is_compiling() or is_traced()):
            check_input(image, valid)
        return self.paint(image, valid, units)

    def paint(self, image: Tensor, valid: Tensor, units: Units | None = None) -> Tensor:
        """Return the prediction without a check of the input, which would wait for a GPU."""
        height, width = image.shape[2:]
        # Padding counts as unknown, so it changes only the size of the grid.
        pad = (0, -width % MULTIPLE, 0, -height % MULTIPLE)
        image, valid = F.pad(full(image), pad), F.pad(full(valid), pad)
        if units is None:
            centre, scale, smooth = self.units(image, valid)
        else:
            centre, scale, smooth = units.centre, units.scale, F.pad(units.smooth, pad)
        away = torch.where(valid > 0, to_logit(image) - centre, 0.0)

        f1, m_stem = self.stem(away / scale, valid)
        m1 = valid
        f2, m2 = self.down1(f1, m_stem)
        f4, m4 = self.down2(f2, m2)
        m = m4
        for block in self.blocks:
            if self.checkpointing and torch.is_grad_enabled():
                # The blocks draw no random numbers.
                f4, m = checkpoint(block, f4, m, use_reentrant=False, preserve_rng_state=False)
            else:
                f4, m = block(f4, m)
        x = f4
        if self.attention is not None:
            layers = [f4]
            if self.config.attention == "pyramid":
                f8, m8 = self.down3(f4, m)
                f16, _m16 = self.down4(f8, m8)
                layers += [f8, f16]
            x = self.attention(x, layers, valid)
        x = activate(self.middle(x, m4, f4))
        x = self.up1(x, f2, m2)
        x = self.up2(x, f1, m1, smooth.to(x.dtype))
        y = full(self.out(x)) + FOLLOW * self.follow * smooth
        y = (torch.tanh(centre + scale * y) + 1) / 2
        return y[:, :, :height, :width]

    @staticmethod
    def units(image: Tensor, valid: Tensor) -> Units:
        """Return the units of N3HW images with N1HW masks. The hole may hold any values."""
        valid = full(valid)
        # Selected, not multiplied: NaN times 0 is NaN.
        image = torch.where(valid > 0, full(image), 0.0)
        mean = known_mean(image, valid)
        centre = to_logit(mean)
        away = torch.where(valid > 0, to_logit(image) - centre, 0.0)
        scale = torch.sqrt(known_mean(away.square().mean(1, keepdim=True), valid, 1.0) + FLAT**2)
        smooth = (to_logit(pull_push(image, valid, mean)) - centre) / scale
        return Units(centre, scale, smooth)


def check_input(image: Tensor, valid: Tensor) -> None:
    """Raise ValueError unless image and mask fit a generator."""
    if image.dim() != 4 or image.shape[1] != 3 or not image.is_floating_point():
        raise ValueError(
            f"the image is {image.dtype} {tuple(image.shape)}: give floating point N x 3 x H x W"
            " in [0, 1]."
        )
    if valid.shape != (image.shape[0], 1, *image.shape[2:]):
        raise ValueError(
            f"the mask is {tuple(valid.shape)} and the image {tuple(image.shape)}: give a mask of"
            " N x 1 x H x W with the image's N, H and W."
        )
    if image.is_meta:  # it has no values to check
        return
    if not ((valid == 0) | (valid == 1)).all():
        raise ValueError(
            "the mask holds values other than 0 (hole) and 1 (known): threshold it first."
        )
    if not (torch.isfinite(image) | (valid == 0)).all():
        raise ValueError(
            "a known pixel of the image is NaN or infinite: repair it or make it part of the hole."
        )


def to_logit(colour: Tensor) -> Tensor:
    """Invert (tanh(y) + 1) / 2, with colours clamped to a little less than [0, 1]."""
    return torch.atanh((2 * colour - 1).clamp(-0.999, 0.999))


def known_mean(image: Tensor, valid: Tensor, empty: float = 0.5) -> Tensor:
    """Return the mean of the known pixels for each channel, NC11 in fp32.

    Args:
        image: NCHW, 0 in the hole.
        valid: N1HW in {0, 1}.
        empty: The mean of a sample without known pixels.
    """
    count = valid.sum(dim=(2, 3), keepdim=True)
    total = (full(image) * valid).sum(dim=(2, 3), keepdim=True)
    return torch.where(count > 0, total / count.clamp(min=1), empty)


def build_generator(config: ModelConfig | str) -> Generator:
    """Build the generator of a config or of a preset's name."""
    return Generator(preset(config) if isinstance(config, str) else config)
