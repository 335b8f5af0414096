"""The described cost of a network, compared with counts made in other ways."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dpnet.model import PRESETS, ModelConfig, build_discriminator, build_generator
from dpnet.model.describe import describe, description_text

SWITCHES = [
    {},
    {"attention": "none"},
    {"attention": "single"},
    {"pyramid": False},
    {"normalization": "instance"},
    {"normalization": "batch"},
    {"normalization": "region"},
    {"mask": "binary", "discriminator_sees_mask": False},
]


class Products(TorchDispatchMode):
    """Counts the multiplications of convolutions and matrix products as torch carries them out."""

    def __init__(self) -> None:
        super().__init__()
        self.convolutions = self.matrices = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.convolution.default:
            self.convolutions += out.numel() * args[1][0].numel()
        elif func in (torch.ops.aten.mm.default, torch.ops.aten.bmm.default):
            self.matrices += out.numel() * args[0].shape[-1]
        return out


def example(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.rand(1, 3, size, size), torch.ones(1, 1, size, size)


@pytest.mark.parametrize("switches", SWITCHES, ids=str)
def test_products_and_parameters_are_those_of_the_network(switches: dict[str, Any]) -> None:
    config = ModelConfig(**{**PRESETS["tiny"].to_json(), **switches})
    found = describe(config, 64)
    generator, discriminator = build_generator(config).eval(), build_discriminator(config).eval()
    with torch.no_grad(), Products() as counted:
        generator(*example(64))
    assert found["macs"] == sum(layer["macs"] for layer in found["layers"]) == counted.convolutions
    assert found["parameters"] == sum(p.numel() for p in generator.parameters())
    assert found["parameters"] == sum(layer["parameters"] for layer in found["layers"])
    with torch.no_grad(), Products() as counted:
        discriminator(*example(64))
    assert found["discriminator"]["macs"] == counted.convolutions
    assert found["discriminator"]["parameters"] == sum(
        p.numel() for p in discriminator.parameters()
    )


def test_attention_products_are_counted_as_defined_and_as_computed() -> None:
    found = describe(PRESETS["tiny"], 256)
    queries, keys, d = 64**2, 64**2 + 32**2 + 16**2, 16
    assert found["attention_macs"] == queries * keys * 9 * (d + d)
    assert found["attention_macs_computed"] == queries * keys * (d + d)
    assert found["total_macs"] == found["macs"] + queries * keys * (d + d)


def test_above_512_pixels_attention_is_counted_on_averaged_maps() -> None:
    at_512, at_1024 = (describe(PRESETS["tiny"], size) for size in (512, 1024))
    assert at_1024["attention_macs"] == at_512["attention_macs"]
    assert at_1024["macs"] == pytest.approx(4 * at_512["macs"])


def test_the_preset_base_has_the_cost_in_the_paper() -> None:
    found = describe(PRESETS["base"])
    assert found["macs"] / 1e9 == pytest.approx(55.58, rel=0.02)
    assert found["discriminator"]["parameters"] == pytest.approx(2.8e6, rel=0.02)
    assert describe(PRESETS["large"])["parameters"] / found["parameters"] == pytest.approx(4, 0.1)


def test_layers_are_listed_in_the_order_in_which_they_work() -> None:
    found = describe(PRESETS["tiny"], 64)
    json.dumps(found)
    names = [layer["name"] for layer in found["layers"]]
    assert names[:4] == ["stem.conv", "stem.norm", "down1.conv", "down1.norm"]
    order = ["blocks.0.second", "down3.conv", "attention", "middle.project", "up1.conv", "out"]
    assert sorted(order, key=names.index) == order
    assert len(names) == len(set(names))
    down2 = found["layers"][names.index("down2.conv")]
    assert down2["shape"] == [64, 16, 16]
    assert down2["kernels"] == [3, 5, 7, 9]
    assert down2["groups"] == [1, 4, 8, 16]


def test_the_text_has_a_line_for_each_layer_and_fits_a_terminal() -> None:
    for name, size in product(PRESETS, (256, 512)):
        found = describe(PRESETS[name], size)
        lines = description_text(found).splitlines()
        assert max(map(len, lines)) <= 100
        for layer in found["layers"]:
            assert any(line.split()[0] == layer["name"] for line in lines if line)


def test_the_table_in_the_docs_is_the_output_of_the_command() -> None:
    docs = Path(__file__).parents[4] / "docs" / "network.md"
    assert description_text(describe(PRESETS["base"])) in docs.read_text("utf-8")


@pytest.mark.parametrize("size", [0, -32, 16, 100])
def test_a_size_that_does_not_divide_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match=rf"the size is {size}: give a multiple of 32"):
        describe(PRESETS["tiny"], size)
