"""Describe the layers of a network and their costs. It uses shapes only; nothing is computed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from dpnet.model.attention import PyramidAttention, averaged_by, plain_attention
from dpnet.model.config import ModelConfig
from dpnet.model.discriminator import PatchDiscriminator
from dpnet.model.generator import MULTIPLE, Generator
from dpnet.model.normalization import EncoderNorm
from dpnet.model.plain_attention import PATCH
from dpnet.model.pyramid import MaskAwareConv

Layer = dict[str, Any]


def describe(config: ModelConfig, size: int = 256) -> dict[str, Any]:
    """Return layers and costs of both networks for one RGB image of `size` x `size`.

    The result holds JSON values, among them:
        macs: Products in convolution modules, as the paper counts. There are no linear modules.
        attention_macs: Products of attention as defined over 3x3 patches: queries x keys x
            (9 d + 9 d_v).
        attention_macs_computed: Products of the fast form over pixels: queries x keys x (d + d_v).
        total_macs: The sum of `macs` and `attention_macs_computed`.

    Raises ValueError unless `size` is a positive multiple of 32.
    """
    if size < 2 * MULTIPLE or size % (2 * MULTIPLE):
        raise ValueError(f"the size is {size}: give a multiple of {2 * MULTIPLE} pixels.")
    with torch.device("meta"):
        generator, discriminator = Generator(config).eval(), PatchDiscriminator(config)
        image, valid = torch.zeros(1, 3, size, size), torch.zeros(1, 1, size, size)
    layers: list[Layer] = []
    products: list[int] = []
    for name, module in generator.named_modules():
        if isinstance(module, MaskAwareConv | EncoderNorm) or (
            isinstance(module, nn.Conv2d) and not _inside_pyramid(generator, name)
        ):
            module.register_forward_hook(_note(layers, name))
        elif isinstance(module, PyramidAttention):
            module.register_forward_hook(_note_attention(layers, products, name))
    with plain_attention(), torch.no_grad():
        generator(image, valid)
    layers += [
        _layer(name, "parameter", p.shape, [], [], p.numel(), 0)
        for name, p in generator.named_parameters(recurse=False)
    ]
    macs, attention = sum(layer["macs"] for layer in layers), sum(products)
    discriminator_layers = _discriminator_layers(discriminator, size)
    return {
        "size": size,
        "macs": macs,
        "parameters": _parameters(generator),
        "attention_macs": attention * PATCH**2,
        "attention_macs_computed": attention,
        "total_macs": macs + attention,
        "layers": layers,
        "discriminator": {
            "macs": sum(layer["macs"] for layer in discriminator_layers),
            "parameters": _parameters(discriminator),
            "layers": discriminator_layers,
        },
    }


def description_text(found: Mapping[str, Any]) -> str:
    """Return the result of `describe` as two tables with totals."""
    attention = found["attention_macs"], found["attention_macs_computed"]
    discriminator = found["discriminator"]
    rows = [
        *_table(found["layers"]),
        "",
        f"convolutions, as the paper counts   {_giga(found['macs'])}",
        f"attention over 3x3 patches          {_giga(attention[0])}",
        f"the same as it is computed          {_giga(attention[1])}",
        f"convolutions and attention computed {_giga(found['total_macs'])}",
        f"parameters                          {found['parameters']:,}",
        "",
        "discriminator",
        *_table(discriminator["layers"]),
        "",
        f"convolutions                        {_giga(discriminator['macs'])}",
        f"parameters                          {discriminator['parameters']:,}",
    ]
    return "\n".join(rows)


def _note(layers: list[Layer], name: str) -> Any:
    def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        out = output[0] if isinstance(output, tuple) else output
        parameters = _parameters(module)
        if isinstance(module, EncoderNorm):
            what = f"{module.kind} normalization"
            layers.append(_layer(name, what, out.shape[1:], [], [], parameters, 0))
            return
        convs = [m for m in module.modules() if isinstance(m, nn.Conv2d)]
        what = "convolution"
        if isinstance(module, MaskAwareConv):
            what = "pyramid" if len(convs) > 1 else "mask-aware convolution"
        if convs[0].stride[0] > 1:
            what += f", stride {convs[0].stride[0]}"
        kernels = [conv.kernel_size[0] for conv in convs]
        groups = [conv.groups for conv in convs]
        macs = sum(_macs(conv, out.shape[2:]) for conv in convs)
        layers.append(_layer(name, what, out.shape[1:], kernels, groups, parameters, macs))

    return hook


def _note_attention(layers: list[Layer], products: list[int], name: str) -> Any:
    def hook(module: nn.Module, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        assert isinstance(module, PyramidAttention)
        x, key_layers, _valid = inputs
        factor = averaged_by((x.shape[2], x.shape[3]))
        queries, *keys = [
            math.prod(-(-side // factor) for side in f.shape[2:]) for f in (x, *key_layers)
        ]
        dim = module.query.out_channels + module.out.in_channels  # d + d_v
        products.append(queries * sum(keys) * dim)
        what = f"{queries:,} x {sum(keys):,} scores"
        layers.append(_layer(name, what, output.shape[1:], [PATCH], [], 0, 0))

    return hook


def _discriminator_layers(discriminator: PatchDiscriminator, side: int) -> list[Layer]:
    layers = []
    for i, conv in enumerate(discriminator.convs):
        assert isinstance(conv, nn.Conv2d)
        kernel, stride = conv.kernel_size[0], conv.stride[0]
        side //= stride
        what = f"spectral-norm convolution, stride {stride}"
        shape = (conv.out_channels, side, side)
        macs = _macs(conv, (side, side))
        layers.append(_layer(f"convs.{i}", what, shape, [kernel], [1], _parameters(conv), macs))
    return layers


def _layer(
    name: str,
    what: str,
    shape: Sequence[int],
    kernels: list[int],
    groups: list[int],
    parameters: int,
    macs: int,
) -> Layer:
    return {
        "name": name,
        "what": what,
        "shape": list(shape),
        "kernels": kernels,
        "groups": groups,
        "parameters": parameters,
        "macs": macs,
    }


def _macs(conv: nn.Conv2d, out: Sequence[int]) -> int:
    kernel = math.prod(conv.kernel_size)
    return math.prod(out) * conv.out_channels * conv.in_channels // conv.groups * kernel


def _parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _inside_pyramid(generator: Generator, name: str) -> bool:
    parts = name.split(".")
    above = (".".join(parts[:i]) for i in range(1, len(parts)))
    return any(isinstance(generator.get_submodule(path), MaskAwareConv) for path in above)


def _table(layers: Sequence[Layer]) -> list[str]:
    head = ("layer", "what it is", "output", "kernels", "groups", "parameters", "MMac")
    rows = [
        (
            layer["name"],
            layer["what"],
            "x".join(map(str, layer["shape"])),
            " ".join(map(str, layer["kernels"])),
            " ".join(map(str, layer["groups"])),
            f"{layer['parameters']:,}" if layer["parameters"] else "",
            f"{layer['macs'] / 1e6:,.1f}" if layer["macs"] else "",
        )
        for layer in layers
    ]
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    numbers = len(head) - 2  # columns from here on align to the right
    return [
        "  ".join(
            cell.rjust(width) if i >= numbers else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in [head, *rows]
    ]


def _giga(macs: int) -> str:
    return f"{macs / 1e9:.2f} GMac"
