"""Other networks for `study.py`, each with about the cost of the network that it is compared with.

Each is our own small version of a published idea, not the authors' network. All have the colours
of DPNet's generator: units of the known pixels, and a start from the smooth fill. So a difference
in quality comes from the layers between. `forward(image_N3HW, valid_N1HW) -> N3HW in [0, 1]`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from dpnet.model.config import ModelConfig
from dpnet.model.generator import FOLLOW, MULTIPLE, Generator, Units, activate, to_logit
from dpnet.model.normalization import EncoderNorm

Conv = Callable[[int, int, int], nn.Module]  # (channels in, channels out, stride)
Widths = tuple[int, int, int]  # channels at full, half and quarter resolution


class Painter(nn.Module):
    """The frame that all networks share: padding, units of colour, the share of the smooth fill.

    `inner(x_N7HW) -> N3HW` gets the known colours in units, the mask and the smooth fill.
    """

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.follow = nn.Parameter(torch.zeros(3, 1, 1))

    def forward(self, image: Tensor, valid: Tensor, units: Units | None = None) -> Tensor:
        return self.paint(image, valid, units)

    def paint(self, image: Tensor, valid: Tensor, units: Units | None = None) -> Tensor:
        height, width = image.shape[2:]
        pad = (0, -width % MULTIPLE, 0, -height % MULTIPLE)
        image, valid = F.pad(image.float(), pad), F.pad(valid.float(), pad)
        centre, scale, smooth = Generator.units(image, valid)
        away = torch.where(valid > 0, to_logit(image) - centre, 0.0) / scale
        y = self.inner(torch.cat([away, valid, smooth], dim=1)) + FOLLOW * self.follow * smooth
        return ((torch.tanh(centre + scale * y) + 1) / 2)[:, :, :height, :width]


class NoSmooth(Generator):
    """DPNet's generator without the smooth fill: neither its input nor its start."""

    @staticmethod
    def units(image: Tensor, valid: Tensor) -> Units:
        found = Generator.units(image, valid)
        return found._replace(smooth=torch.zeros_like(found.smooth))


class Plain(nn.Module):
    """A convolution, instance normalization and the activation."""

    def __init__(self, channels_in: int, channels_out: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels_in, channels_out, 3, stride, 1)
        self.norm = nn.InstanceNorm2d(channels_out, affine=True)

    def forward(self, x: Tensor) -> Tensor:
        return activate(self.norm(self.conv(x)))


class Gated(nn.Module):
    """A gated convolution (Yu et al., ICCV 2019): features times a learned gate."""

    def __init__(self, channels_in: int, channels_out: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels_in, 2 * channels_out, 3, stride, 1)
        self.norm = nn.InstanceNorm2d(channels_out, affine=True)

    def forward(self, x: Tensor) -> Tensor:
        feature, gate = self.conv(x).chunk(2, dim=1)
        return activate(self.norm(feature)) * torch.sigmoid(gate)


class UNet(nn.Module):
    """A U-Net with three strides, and residual pairs of layers at the lowest resolution."""

    def __init__(self, layer: Conv, widths: Widths, blocks: int) -> None:
        super().__init__()
        a, b, c = widths
        self.stem, self.down1 = layer(7, a, 1), layer(a, b, 2)
        self.down2, self.down3 = layer(b, c, 2), layer(c, c, 2)
        self.blocks = nn.ModuleList(
            nn.Sequential(layer(c, c, 1), layer(c, c, 1)) for _ in range(blocks)
        )
        self.up3, self.up2, self.up1 = (
            layer(2 * c, c, 1),
            layer(c + b, b, 1),
            layer(b + a, a, 1),
        )
        self.out = _zeroed(nn.Conv2d(a, 3, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        x1 = self.stem(x)
        x2 = self.down1(x1)
        x3 = self.down2(x2)
        y = self.down3(x3)
        for block in self.blocks:
            y = y + block(y)
        y = self.up3(torch.cat([_double(y), x3], 1))
        y = self.up2(torch.cat([_double(y), x2], 1))
        y = self.up1(torch.cat([_double(y), x1], 1))
        return self.out(y)  # type: ignore[no-any-return]


class PartialConv(nn.Module):
    """A partial convolution (Liu et al., ECCV 2018), with instance normalization."""

    def __init__(self, channels_in: int, channels_out: int, stride: int = 1) -> None:
        super().__init__()
        self.stride = stride
        self.conv = nn.Conv2d(channels_in, channels_out, 3, stride, 1, bias=False)
        self.norm = nn.InstanceNorm2d(channels_out, affine=True)

    def forward(self, x: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
        ones = torch.ones(1, 1, 3, 3, device=m.device)
        seen = F.conv2d(m, ones, stride=self.stride, padding=1)
        y = self.conv(x * m) * torch.where(seen > 0, 9 / seen.clamp(min=1), 0.0)
        return activate(self.norm(y)), (seen > 0).to(m.dtype)


class PartialUNet(nn.Module):
    """A U-Net whose encoder has partial convolutions and whose decoder has plain ones."""

    def __init__(self, widths: Widths, blocks: int) -> None:
        super().__init__()
        a, b, c = widths
        self.down = nn.ModuleList(
            [PartialConv(3, a), PartialConv(a, b, 2), PartialConv(b, c, 2), PartialConv(c, c, 2)]
            + [PartialConv(c, c) for _ in range(2 * blocks)]
        )
        self.up3, self.up2, self.up1 = Plain(2 * c, c), Plain(c + b, b), Plain(b + a + 3, a)
        self.out = _zeroed(nn.Conv2d(a, 3, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        y, m, smooth = x[:, :3], x[:, 3:4], x[:, 4:]
        kept = []
        for number, layer in enumerate(self.down):
            before = y
            y, m = layer(y, m)
            if number >= 4:
                y = y + before
            kept.append(y)
        y = self.up3(torch.cat([_double(y), kept[2]], 1))
        y = self.up2(torch.cat([_double(y), kept[1]], 1))
        y = self.up1(torch.cat([_double(y), kept[0], smooth], 1))
        return self.out(y)  # type: ignore[no-any-return]


class RegionResidual(nn.Module):
    """Two dilated convolutions with region normalization (Yu et al., AAAI 2020)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=2, dilation=2)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)
        self.norms = nn.ModuleList(EncoderNorm(channels, "region") for _ in range(2))

    def forward(self, x: Tensor, m: Tensor) -> Tensor:
        y = activate(self.norms[0](self.first(x), m))
        return x + self.norms[1](self.second(y), m)  # type: ignore[no-any-return]


class RegionNet(nn.Module):
    """Encoder, residual blocks with dilation, decoder; region normalization by the mask."""

    def __init__(self, widths: Widths, blocks: int) -> None:
        super().__init__()
        a, b, c = widths
        self.convs = nn.ModuleList(
            [nn.Conv2d(7, a, 7, padding=3), nn.Conv2d(a, b, 4, 2, 1), nn.Conv2d(b, c, 4, 2, 1)]
        )
        self.norms = nn.ModuleList(EncoderNorm(width, "region") for width in (a, b, c))
        self.blocks = nn.ModuleList(RegionResidual(c) for _ in range(blocks))
        self.up2, self.up1 = Plain(c, b), Plain(b, a)
        self.out = _zeroed(nn.Conv2d(a, 3, 7, padding=3))

    def forward(self, x: Tensor) -> Tensor:
        m = x[:, 3:4]
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = conv(x)
            m = F.interpolate(m, x.shape[2:], mode="nearest")
            x = activate(norm(x, m))
        for block in self.blocks:
            x = block(x, m)
        return self.out(self.up1(_double(self.up2(_double(x)))))  # type: ignore[no-any-return]


class FourierUnit(nn.Module):
    """A 1x1 convolution on the spectrum (Chi et al., NeurIPS 2020): it sees the whole image."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2 * channels, 2 * channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        spectrum = torch.fft.rfft2(x.float(), norm="ortho")
        both = activate(self.conv(torch.cat([spectrum.real, spectrum.imag], 1)))
        real, imaginary = both.chunk(2, dim=1)
        return torch.fft.irfft2(torch.complex(real, imaginary), s=x.shape[2:], norm="ortho")


class FourierResidual(nn.Module):
    """A residual block with a local and a global half, as in LaMa (Suvorov et al., WACV 2022)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {
                    "local": nn.Conv2d(channels, channels, 3, padding=1),
                    "before": nn.Conv2d(channels, channels // 4, 1),
                    "global": FourierUnit(channels // 4),
                    "after": nn.Conv2d(channels // 4, channels, 1),
                    "norm": nn.InstanceNorm2d(channels, affine=True),
                }
            )
            for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for layer in self.layers:
            assert isinstance(layer, nn.ModuleDict)
            whole = layer["after"](layer["global"](activate(layer["before"](y))))
            y = activate(layer["norm"](layer["local"](y) + whole))
        return x + y


class FourierNet(nn.Module):
    """Encoder, Fourier residual blocks at quarter resolution, decoder."""

    def __init__(self, widths: Widths, blocks: int) -> None:
        super().__init__()
        a, b, c = widths
        self.inner = nn.Sequential(
            Plain(7, a), Plain(a, b, 2), Plain(b, c, 2),
            *(FourierResidual(c) for _ in range(blocks)),
            nn.Upsample(scale_factor=2), Plain(c, b), nn.Upsample(scale_factor=2), Plain(b, a),
            _zeroed(nn.Conv2d(a, 3, 3, padding=1)),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)  # type: ignore[no-any-return]


def _zeroed(conv: nn.Conv2d) -> nn.Conv2d:
    """Let the output start at 0, so that training starts from the same fill as DPNet's."""
    nn.init.zeros_(conv.weight)
    assert conv.bias is not None
    nn.init.zeros_(conv.bias)
    return conv


def _double(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2, mode="nearest")


def multiplications(network: nn.Module) -> int:
    """Return the multiplications of one image of 64 x 64, for a network on the meta device."""
    with FlopCounterMode(display=False) as counter, torch.device("meta"):
        network.paint(torch.rand(1, 3, 64, 64), torch.ones(1, 1, 64, 64))  # type: ignore[operator]
    return counter.get_total_flops() // 2


def _of_equal_cost(make: Callable[[Widths, int], nn.Module]) -> Callable[[ModelConfig], nn.Module]:
    """Return what builds a network with the widths whose cost is nearest to DPNet's."""

    def build(config: ModelConfig) -> nn.Module:
        found: dict[Widths, int] = {}
        with torch.device("meta"):
            aim = multiplications(Generator(config))
            for percent in range(50, 201, 5):
                a, b, c = (max(4, round(w * percent / 400) * 4) for w in config.widths)
                if (a, b, c) not in found:
                    found[a, b, c] = multiplications(Painter(make((a, b, c), config.blocks)))
        return Painter(make(min(found, key=lambda w: abs(found[w] - aim)), config.blocks))

    return build


NETWORKS: dict[str, Callable[[ModelConfig], nn.Module]] = {
    "no_smooth": NoSmooth,
    "unet": _of_equal_cost(lambda widths, blocks: UNet(Plain, widths, blocks)),
    "partial": _of_equal_cost(PartialUNet),
    "gated": _of_equal_cost(lambda widths, blocks: UNet(Gated, widths, blocks)),
    "rn": _of_equal_cost(RegionNet),
    "fourier": _of_equal_cost(FourierNet),
}
