"""What must hold of the whole network whatever its weights, over random masks and sizes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from dpnet.model import Generator, build_generator
from dpnet.model.config import ModelConfig, preset
from dpnet.model.generator import EncoderLayer, ResidualBlock
from dpnet.model.normalization import DecoderNorm
from dpnet.model.pyramid import MaskAwareConv

SIZES = st.tuples(st.integers(1, 40), st.integers(1, 40))
SEEDS = st.integers(0, 2**16)
# As deep as `base`, with its kernels, but narrow.
DEEP = preset("base", widths=(16, 32, 64), attention_dim=16, guide=7)
few = settings(max_examples=settings().max_examples // 3)  # each runs a whole network


def network(config: ModelConfig | str = "tiny", **changes: object) -> Generator:
    """In float64 and with no weight 0, so that the output depends on everything."""
    torch.manual_seed(0)
    if isinstance(config, str):
        config = preset(config, **changes)
    generator = build_generator(config).double().eval()
    for p in generator.parameters():
        if not p.any():
            nn.init.normal_(p, std=0.05)
    return generator


def random_mask(seed: int, n: int, height: int, width: int) -> Tensor:
    """Blocks of known and unknown pixels, single pixels among them; by chance all or nothing."""
    torch.manual_seed(seed)
    share = torch.rand(()) * 1.4 - 0.2
    coarse = (torch.rand(n, 1, height // 6 + 1, width // 6 + 1) < share).double()
    m = F.interpolate(coarse, size=(height, width))
    return torch.where(torch.rand_like(m) < 0.05, 1 - m, m)


def random_image(seed: int, n: int, height: int, width: int) -> Tensor:
    torch.manual_seed(seed + 1)
    return torch.rand(n, 3, height, width, dtype=torch.float64)


def box(side: int, n: int = 1) -> Tensor:
    """A mask whose middle, half as wide and high, is a hole."""
    m = torch.ones(n, 1, side, side)
    m[:, :, side // 4 : side * 3 // 4, side // 4 : side * 3 // 4] = 0
    return m


@few
@given(
    seed=SEEDS,
    size=SIZES,
    rubbish=st.sampled_from([float("nan"), float("inf"), -float("inf"), 1e300, -3.0]),
)
def test_values_under_the_hole_influence_neither_output_nor_gradients(seed, size, rubbish):
    generator, valid = network(), random_mask(seed, 2, *size)

    def run(image: Tensor) -> list[Tensor]:
        image = image.requires_grad_()
        out = generator(image, valid)
        leaves = [image, *generator.parameters()]
        return [out, *torch.autograd.grad(out.square().sum(), leaves, allow_unused=True)]

    image = random_image(seed, 2, *size)
    filled = torch.where(valid > 0, image, rubbish)
    for got, expected in zip(run(filled), run(image), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_known_pixel_that_is_no_number_is_an_error(value):
    image, valid = random_image(0, 2, 16, 16), box(16, 2).double()
    image[1, 2, 0, 5] = value
    with pytest.raises(ValueError, match="a known pixel of the image is NaN or infinite: repair"):
        network()(image, valid)


@few
@given(seed=SEEDS, size=SIZES, n=st.integers(2, 4))
def test_a_sample_does_not_depend_on_the_others_in_its_batch(seed, size, n):
    generator, image, valid = network(), random_image(seed, n, *size), random_mask(seed, n, *size)
    with torch.no_grad():
        together = generator(image, valid)
        for i in range(n):
            alone = generator(image[i : i + 1], valid[i : i + 1])
            torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("normalization", ["instance", "region", "batch"])
def test_with_other_normalizations_a_sample_does_not_depend_on_its_batch_either(normalization):
    generator = network(normalization=normalization)
    image, valid = random_image(0, 3, 32, 48), random_mask(0, 3, 32, 48)
    with torch.no_grad():
        together, alone = generator(image, valid), generator(image[1:2], valid[1:2])
    torch.testing.assert_close(together[1:2], alone, rtol=1e-9, atol=1e-9)


def test_the_output_depends_on_every_known_pixel_and_on_every_weight():
    """Else the tests above would prove little."""
    generator, valid = network(), box(32).double()
    image = random_image(0, 1, 32, 32).requires_grad_()
    generator(image, valid).square().sum().backward()
    assert (image.grad != 0).equal((valid > 0).expand(1, 3, 32, 32))
    assert [name for name, p in generator.named_parameters() if not p.grad.any()] == []


def test_single_precision_is_near():
    generator = network()
    image, valid = random_image(0, 2, 40, 36), random_mask(3, 2, 40, 36)
    with torch.no_grad():
        expected = generator(image, valid)
        got = generator.float()(image.float(), valid.float())
    torch.testing.assert_close(got.double(), expected, rtol=1e-3, atol=1e-4)


def masks_of(generator: Generator, valid: Tensor) -> dict[str, Tensor]:
    """The mask after every convolution of the encoder, and those that the decoder uses."""
    seen: dict[str, Tensor] = {}
    for name, module in generator.named_modules():
        if isinstance(module, MaskAwareConv):
            module.register_forward_hook(lambda _m, _i, out, name=name: seen.update({name: out[1]}))
        elif isinstance(module, DecoderNorm):
            module.register_forward_hook(lambda _m, i, _o, name=name: seen.update({name: i[1]}))
    with torch.no_grad():
        generator(torch.rand(*valid.shape[:1], 3, *valid.shape[2:]).to(valid), valid)
    return seen


@pytest.mark.parametrize("changes", [{}, {"pyramid": False}, {"mask": "binary"}], ids=str)
@pytest.mark.parametrize("size", [(16, 16), (48, 80)])
def test_without_a_hole_the_mask_stays_one_everywhere(size, changes):
    for precision in (torch.float32, torch.float64):
        generator = network(**changes).to(precision)
        seen = masks_of(generator, torch.ones(2, 1, *size, dtype=precision))
        assert len(seen) == 1 + 4 + 2 * 2 + 3
        for m in seen.values():
            assert torch.equal(m, torch.ones_like(m))


def test_a_hole_everywhere_stays_a_hole_everywhere():
    for m in masks_of(network(), torch.zeros(1, 1, 32, 32).double()).values():
        assert not m.any()


def test_a_centred_hole_is_still_a_hole_at_every_resolution_of_the_decoder():
    """The binary rule would have filled it, which is why masks are soft."""
    valid = box(256)
    for mask, holds in (("soft", True), ("binary", False)):
        generator = build_generator(preset("tiny", blocks=8, mask=mask)).eval()
        seen = masks_of(generator, valid)
        middles = {}
        for name in ("middle", "up1.norm", "up2.norm"):
            m = seen[name]
            middle = m.shape[2] // 2
            middles[m.shape[2]] = float(
                m[0, 0, middle - 1 : middle + 1, middle - 1 : middle + 1].max()
            )
        assert set(middles) == {64, 128, 256}
        if holds:
            assert all(value < 0.5 for value in middles.values())
        # After the blocks nothing is left of it by the binary rule.
        last = seen["blocks.7.second"]
        assert bool(last.min() == 1) is not holds


def rms_of_layers(generator: Generator, image: Tensor, valid: Tensor) -> list[tuple[float, float]]:
    """Root mean square after every layer of the encoder: of the map, and of the holes' rim."""
    found: list[tuple[float, float]] = []

    def note(_module: nn.Module, _inputs: object, output: tuple[Tensor, Tensor]) -> None:
        power = output[0].square().mean(1, keepdim=True)
        known = F.adaptive_max_pool2d(valid, power.shape[2:])
        nearly = F.max_pool2d(known, 3, 1, 1)
        hole_near = F.max_pool2d(1 - F.adaptive_avg_pool2d(valid, power.shape[2:]), 3, 1, 1)
        rim = power[(nearly > 0) & (hole_near > 0)]  # within a pixel of both
        found.append((float(power.mean().sqrt()), float(rim.mean().sqrt())))

    for module in generator.modules():
        if isinstance(module, EncoderLayer | ResidualBlock):
            module.register_forward_hook(note)
    with torch.no_grad():
        generator(image, valid)
    return found


@pytest.mark.parametrize("config", [preset("tiny"), DEEP], ids=["tiny", "deep"])
@pytest.mark.parametrize("hole", ["box", "blocks"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_activations_keep_their_scale_through_the_encoder(seed, hole, config):
    torch.manual_seed(seed)
    generator = build_generator(config)  # as it is initialised
    smooth = F.interpolate(torch.rand(1, 3, 12, 12), size=(96, 96), mode="bilinear")
    image = 0.8 * smooth + 0.2 * torch.rand(1, 3, 96, 96)
    valid = box(96) if hole == "box" else random_mask(seed, 1, 96, 96).float()
    layers = rms_of_layers(generator, image, valid)
    assert len(layers) == 3 + 2 * config.blocks + 2
    whole, rim = ([pair[i] for pair in layers] for i in (0, 1))
    assert max(whole) / min(whole) < 3
    assert max(rim) / min(rim) < 3
    for of_map, of_rim in layers:
        assert 1 / 3 < of_rim / of_map < 3
