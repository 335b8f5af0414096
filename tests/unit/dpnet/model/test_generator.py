"""The generator's sizes, switches and cost; test_invariants.py holds what is true of any mask."""

from dataclasses import replace

import pytest
import torch

from dpnet.model import PRESETS, build_discriminator, build_generator
from dpnet.model.config import ModelConfig, preset


@pytest.fixture
def generator():
    torch.manual_seed(0)
    model = build_generator("tiny").eval()
    torch.nn.init.normal_(model.out.weight, std=0.1)  # else the output is mean fill
    return model


def example(n=2, height=48, width=64):
    torch.manual_seed(1)
    image, valid = torch.rand(n, 3, height, width), torch.ones(n, 1, height, width)
    valid[:, :, 10:30, 20:44] = 0
    return image, valid


@pytest.mark.parametrize("size", [(16, 16), (50, 37), (1, 1), (65, 16)])
def test_any_size_comes_back_in_range(generator, size):
    image, valid = torch.rand(1, 3, *size), torch.ones(1, 1, *size)
    valid[:, :, : size[0] // 2] = 0
    with torch.no_grad():
        out = generator(image, valid)
    assert out.shape == image.shape
    assert out.min() >= 0
    assert out.max() <= 1


def test_colours_given_in_half_precision_are_computed_in_full(generator):
    image, valid = example()
    image = image.bfloat16()
    with torch.no_grad():
        assert torch.equal(generator(image, valid), generator(image.float(), valid))


def test_nothing_known_still_gives_finite_output_and_gradients(generator):
    image, valid = torch.rand(1, 3, 32, 32), torch.zeros(1, 1, 32, 32)
    out = generator(image, valid)
    out.sum().backward()
    assert torch.isfinite(out).all()
    assert all(torch.isfinite(p.grad).all() for p in generator.parameters() if p.grad is not None)


def test_training_starts_from_mean_fill():
    torch.manual_seed(0)
    image, valid = example(1)
    with torch.no_grad():
        out = build_generator("tiny")(image, valid)
    mean = (image * valid).sum((2, 3)) / valid.sum((2, 3))
    torch.testing.assert_close(out[0, :, 20, 30], mean[0], rtol=1e-4, atol=1e-4)


SWITCHES = [
    {"pyramid": False},
    {"attention": "none"},
    {"attention": "single"},
    {"normalization": "instance"},
    {"normalization": "batch"},
    {"normalization": "region"},
    {"mask": "binary"},
    {"discriminator_sees_mask": False},
]


@pytest.mark.parametrize("switch", SWITCHES, ids=str)
def test_every_ablation_trains(switch):
    torch.manual_seed(0)
    config = preset("tiny", **switch)
    generator, discriminator = build_generator(config), build_discriminator(config)
    image, valid = example(1, 32, 48)
    optimizer = torch.optim.Adam(generator.parameters(), 1e-3)
    losses = []
    for _ in range(3):
        out = generator(image, valid)
        loss = (out - image).abs().mean() - 0.01 * discriminator(out, valid).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[2] < losses[0]


def macs(model, size):
    """Multiply-adds of convolution modules, as the paper's figure counts them."""
    total = 0

    def count(module, _inputs, output):
        nonlocal total
        total += module.weight.numel() * output.shape[2] * output.shape[3]

    hooks = [
        m.register_forward_hook(count) for m in model.modules() if isinstance(m, torch.nn.Conv2d)
    ]
    with torch.no_grad(), torch.device("meta"):
        model(torch.empty(1, 3, size, size), torch.empty(1, 1, size, size))
    for hook in hooks:
        hook.remove()
    return total


def test_the_preset_base_has_the_cost_in_the_paper():
    with torch.device("meta"):  # shapes only: nothing is computed
        base = build_generator("base")
    assert macs(base, 256) / 1e9 == pytest.approx(55.58, rel=0.02)


def test_the_discriminator_is_the_published_one():
    discriminator = build_discriminator("base")
    assert [conv.out_channels for conv in discriminator.convs] == [64, 128, 256, 512, 1]
    assert discriminator(torch.rand(1, 3, 256, 256), torch.ones(1, 1, 256, 256)).shape[2:] == (8, 8)
    assert sum(p.numel() for p in discriminator.parameters()) == pytest.approx(2.8e6, rel=0.02)


def test_a_config_survives_json():
    for config in PRESETS.values():
        assert ModelConfig.from_json(config.to_json()) == config


def test_a_config_of_an_older_version_has_statistics_of_each_region():
    record = PRESETS["tiny"].to_json()
    del record["statistics"]
    assert ModelConfig.from_json(record) == replace(PRESETS["tiny"], statistics="own")
