"""Pyramidal attention: the fast form and the plain one against a loop in float64."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dpnet.model import attention as A
from dpnet.model import attention_blocks as blocks
from dpnet.model.config import preset
from dpnet.model.generator import build_generator
from dpnet.model.plain_attention import plain_attend, plain_shares

DIM, VALUES = 3, 2
FORMS = {"fast": A.attend, "plain": plain_attend}


def patch(x, row, column):
    """The 3x3 patch of a C H W map, zeros outside."""
    cells = []
    for i in range(row - 1, row + 2):
        for j in range(column - 1, column + 2):
            inside = 0 <= i < x.shape[1] and 0 <= j < x.shape[2]
            cells.append(x[:, i, j] if inside else torch.zeros_like(x[:, 0, 0]))
    return torch.stack(cells, dim=1)


def reference(query, keys, values, shares):
    """Query by query and key by key, as the definition reads; also the weights of each query."""
    n, _, height, width = query.shape
    samples, all_weights = [], []
    total_keys = sum(k.shape[2] * k.shape[3] for k in keys)
    sharp = 10 * math.log(total_keys) / math.log(5376)
    for b in range(n):
        usable = []
        for k, v, c in zip(keys, values, shares, strict=True):
            for i in range(k.shape[2]):
                for j in range(k.shape[3]):
                    if c[b, 0, i, j] >= 0.05:
                        usable.append((patch(k[b], i, j), patch(v[b], i, j), c[b, 0, i, j]))
        cells = [[[] for _ in range(width)] for _ in range(height)]
        for y in range(height):
            for x in range(width):
                asked = patch(query[b], y, x)
                if not usable:
                    mixed = torch.zeros(values[0].shape[1], 9, dtype=query.dtype)
                else:
                    logits = torch.stack(
                        [
                            sharp * (asked * k).sum() / (asked.norm() * k.norm()) + c.log()
                            for k, _, c in usable
                        ]
                    )
                    weights = logits.softmax(0)
                    all_weights.append(weights)
                    mixed = sum(w * v for w, (_, v, _) in zip(weights, usable, strict=True))
                for cell in range(9):
                    i, j = y + cell // 3 - 1, x + cell % 3 - 1
                    if 0 <= i < height and 0 <= j < width:
                        cells[i][j].append(mixed[:, cell])
        rows = [torch.stack([torch.stack(c).mean(0) for c in row], dim=1) for row in cells]
        samples.append(torch.stack(rows, dim=1))
    return torch.stack(samples), all_weights


def example(query=(3, 4), grids=((3, 4), (2, 2)), n=1, seed=0, dtype=torch.float64):
    random = torch.Generator().manual_seed(seed)

    def rand(*shape, draw=torch.randn):
        return draw(*shape, generator=random, dtype=torch.float64).to(dtype).requires_grad_()

    shares = [rand(n, 1, *g, draw=torch.rand).detach() for g in grids]
    keys, values = [rand(n, DIM, *g) for g in grids], [rand(n, VALUES, *g) for g in grids]
    return rand(n, DIM, *query), keys, values, shares


def with_gradients(form, query, keys, values, shares):
    out = form(query, keys, values, shares)
    leaves = [query, *keys, *values]
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    total = (out * weights).sum() + 0 * query.sum()  # without usable keys, `out` is constant
    gradients = torch.autograd.grad(total, leaves, allow_unused=True)
    return out, [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, gradients)]  # noqa: B905


def assert_same(form, inputs, rtol=1e-9, atol=1e-10):
    expected, gradients = with_gradients(lambda *x: reference(*x)[0], *inputs)
    out, ours = with_gradients(form, *inputs)
    torch.testing.assert_close(out, expected, rtol=rtol, atol=atol)
    for mine, theirs in zip(ours, gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=rtol, atol=atol)


GRIDS = [
    ((3, 4), ((3, 4), (2, 2))),
    ((5, 3), ((5, 3), (3, 2), (2, 1))),
    ((1, 1), ((1, 1),)),
    ((1, 5), ((1, 5), (1, 3))),
    ((4, 1), ((4, 1), (2, 1), (1, 1))),
    ((3, 3), ((2, 2),)),
]


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize(("query", "grids"), GRIDS)
def test_it_and_its_gradients_equal_the_definition(form, query, grids):
    assert_same(form, example(query, grids, n=2))


@given(
    st.tuples(st.integers(1, 4), st.integers(1, 4)),
    st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=3),
    st.integers(0, 2**31),
    st.sampled_from([40, 200, 1 << 22]),
)
def test_the_fast_form_equals_the_definition_on_any_grids_and_blocks(query, grids, seed, block):
    before = dict(blocks.BLOCK)
    blocks.BLOCK["cpu"] = block
    try:
        assert_same(A.attend, example(query, grids, seed=seed))
    finally:
        blocks.BLOCK.update(before)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_samples_without_keys_give_zero_and_excluded_keys_nothing(form):
    inputs = example(n=3)
    shares = inputs[3]
    for share in shares:
        share[1] = 0.01  # sample 1 has no key
        share[2, 0, 0] = 0.049  # sample 2 loses some
    shares[0][2, 0, 1, 1] = 0.05  # the least that counts
    assert_same(form, inputs)
    out = form(*inputs)
    assert torch.equal(out[1], torch.zeros_like(out[1]))
    assert out[0].abs().sum() > 0


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_values_of_excluded_keys_have_no_influence(form):
    query, keys, values, shares = example((4, 4), ((4, 4),))
    # A value patch reaches one pixel further than its key, so three rows are excluded.
    shares[0][:, :, :3] = 0.02
    before = form(query, keys, values, shares)
    others = [v.clone() for v in values]
    others[0][:, :, :2] = 1e6
    torch.testing.assert_close(form(query, keys, others, shares), before, rtol=0, atol=0)


def test_the_weights_of_a_query_sum_to_one_and_are_zero_on_excluded_keys():
    query, keys, _, shares = example((4, 3), ((4, 3), (2, 2)), n=2)
    shares[0][:, :, 1] = 0.04
    column, bias, some = A.key_terms(keys, shares)
    assert some.all()
    row = A.inverse_norms(query)[:, 0]
    padded = torch.nn.functional.pad(query.permute(0, 2, 3, 1), (0, 0, 0, 0, 1, 1))
    sides = [side for k in keys for side in k.shape[2:]]
    with torch.no_grad():
        _, weights = blocks._weights(padded, A._flat(keys), row, column, bias, sides)
    torch.testing.assert_close(weights.sum(3), torch.ones_like(weights[..., 0]))
    excluded = torch.cat([c.flatten(1) for c in shares], dim=1) < 0.05
    assert excluded.any()
    assert not weights[excluded[:, None, None].expand_as(weights)].any()
    expected = torch.stack(reference(query, keys, keys, shares)[1])
    ours = torch.cat([w[:, :, ~e].flatten(0, 1) for w, e in zip(weights, excluded, strict=True)])
    torch.testing.assert_close(ours, expected)


def test_both_forms_agree_in_single_precision_at_the_size_of_training():
    inputs = example((32, 32), ((32, 32), (16, 16), (8, 8)), n=2, dtype=torch.float32)
    out, ours = with_gradients(A.attend, *inputs)
    plain, theirs = with_gradients(plain_attend, *inputs)
    torch.testing.assert_close(out, plain, rtol=1e-4, atol=1e-4)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_bfloat16_stays_within_its_own_error():
    query, keys, values, shares = example((16, 16), ((16, 16), (8, 8)), n=2, dtype=torch.float32)
    exact = A.attend(query, keys, values, shares)
    half = A.attend(
        query.bfloat16(), [k.bfloat16() for k in keys], [v.bfloat16() for v in values], shares
    )
    assert half.dtype == torch.bfloat16
    plain = plain_attend(
        query.bfloat16(), [k.bfloat16() for k in keys], [v.bfloat16() for v in values], shares
    )
    ours, theirs = ((x.float() - exact).square().mean().sqrt() for x in (half, plain))
    assert ours < 1.5 * theirs  # as near to the exact result as the plain form in bfloat16


def test_the_whole_score_matrix_never_exists():
    """No tensor of a forward and backward pass is as large as queries x keys."""
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            for x in result if isinstance(result, tuple) else (result,):
                if isinstance(x, torch.Tensor):
                    largest = max(largest, x.untyped_storage().nbytes() // x.element_size())
            return result

    inputs = example((64, 64), ((64, 64), (32, 32), (16, 16)), dtype=torch.float32)
    with Watch():
        with_gradients(A.attend, *inputs)
    assert 0 < largest <= blocks.BLOCK["cpu"] < 4096 * 5376 / 4


def test_large_maps_are_averaged_down_before_they_attend(monkeypatch):
    monkeypatch.setattr(A, "GRID_MAX", 16)
    torch.manual_seed(0)
    layer = A.PyramidAttention(4, [4, 4], 2)
    seen = []
    attend = A.attend
    monkeypatch.setattr(A, "attend", lambda *x: seen.append(x[0].shape[2:]) or attend(*x))
    for side, grid in ((16, (4, 4)), (40, (4, 4)), (44, (4, 4))):
        x = torch.randn(1, 4, side // 4, side // 4)
        layers = [x, torch.nn.functional.avg_pool2d(x, 2, ceil_mode=True)]
        out = layer(x, layers, torch.ones(1, 1, side, side))
        assert out.shape == x.shape
        assert not torch.equal(out, x)
        assert tuple(seen[-1]) == grid


def test_a_whole_network_gives_the_same_with_the_plain_form():
    torch.manual_seed(0)
    model = build_generator(preset("tiny")).double().eval()
    torch.nn.init.normal_(model.out.weight, std=0.1)
    image, valid = torch.rand(1, 3, 48, 64).double(), torch.ones(1, 1, 48, 64).double()
    valid[:, :, 10:30, 20:44] = 0
    with torch.no_grad():
        fast = model(image, valid)
        with A.plain_attention():
            plain = model(image, valid)
        again = model(image, valid)
    torch.testing.assert_close(fast, plain, rtol=1e-9, atol=1e-12)
    assert torch.equal(fast, again)


def test_known_share_counts_the_input_pixels_under_a_patch():
    valid = torch.ones(1, 1, 16, 16)
    valid[:, :, :4, :4] = 0  # one cell of a 4x4 map
    share = A.known_share(valid, (4, 4))[0, 0]
    assert float(share[0, 0]) == pytest.approx(3 / 4)  # a corner sees four cells
    assert float(share[1, 1]) == pytest.approx(8 / 9)
    assert float(share[3, 3]) == 1
    valid = (torch.rand(2, 1, 32, 48, generator=torch.Generator().manual_seed(0)) > 0.4).float()
    for ours, plain in zip(
        [A.known_share(valid, (8 // s, 12 // s)) for s in (1, 2, 4)],
        plain_shares(valid, 3),
        strict=True,
    ):
        torch.testing.assert_close(ours, plain)
