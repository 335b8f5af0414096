"""Pyramidal attention against a plain loop in float64."""

import math

import pytest
import torch

from dpnet.model import attention as A


def reference(q, k, v, share):
    n, length, _ = q.shape
    out = torch.zeros(n, length, v.shape[2], dtype=torch.float64)
    scale = 10 * math.log(k.shape[1]) / math.log(5376)
    for b in range(n):
        keep = [j for j in range(k.shape[1]) if share[b, j] >= 0.05]
        for i in range(length):
            if not keep:
                continue
            logits = torch.tensor(
                [
                    scale * float(q[b, i].double() @ k[b, j].double()) + math.log(share[b, j])
                    for j in keep
                ],
                dtype=torch.float64,
            )
            weights = logits.softmax(0)
            assert float(weights.sum()) == pytest.approx(1)
            for w, j in zip(weights, keep, strict=True):
                out[b, i] += w * v[b, j].double()
    return out


def random_inputs():
    torch.manual_seed(0)
    q = torch.nn.functional.normalize(torch.randn(2, 12, 6), dim=2)
    k = torch.nn.functional.normalize(torch.randn(2, 20, 6), dim=2)
    return q, k, torch.randn(2, 20, 4), torch.rand(2, 20)


@pytest.mark.parametrize("budget", [1 << 24, 50])
def test_it_equals_the_definition_whole_and_in_chunks(budget, monkeypatch):
    monkeypatch.setattr(A, "SCORE_BUDGET", budget)
    q, k, v, share = random_inputs()
    share[0, :3] = torch.tensor([0.0, 0.049, 0.05])
    expected = reference(q, k, v, share)
    torch.testing.assert_close(A.attend(q, k, v, share).double(), expected, rtol=1e-4, atol=1e-5)


def test_chunks_give_the_same_gradients(monkeypatch):
    grads = []
    for budget in (1 << 24, 50):
        monkeypatch.setattr(A, "SCORE_BUDGET", budget)
        q, k, v, share = random_inputs()
        for tensor in (q, k, v):
            tensor.requires_grad_()
        A.attend(q, k, v, share).pow(2).sum().backward()
        grads.append((q.grad, k.grad, v.grad))
    for whole, chunked in zip(*grads, strict=True):
        torch.testing.assert_close(whole, chunked, rtol=1e-4, atol=1e-5)


def test_a_sample_without_keys_gives_zero_and_finite_gradients():
    q, k, v, share = random_inputs()
    share[1] = 0.01
    q.requires_grad_()
    out = A.attend(q, k, v, share)
    out.sum().backward()
    assert torch.equal(out[1], torch.zeros_like(out[1]))
    assert torch.isfinite(q.grad).all()
    assert out[0].abs().sum() > 0


def test_excluded_keys_have_no_influence():
    q, k, v, share = random_inputs()
    share[:, 5] = 0.02
    before = A.attend(q, k, v, share)
    v[:, 5] = 1e6
    assert torch.equal(before, A.attend(q, k, v, share))


def test_pasting_patches_back_gives_the_map_again():
    x = torch.randn(2, 3, 5, 7)
    torch.testing.assert_close(A.paste(A.patches(x), (5, 7)), x)


def test_known_share_counts_the_input_pixels_under_a_patch():
    valid = torch.ones(1, 1, 16, 16)
    valid[:, :, :4, :4] = 0  # one cell of a 4x4 map
    share = A.known_share(valid, (4, 4))[0, 0]
    assert float(share[0, 0]) == pytest.approx(3 / 4)  # a corner sees four cells
    assert float(share[1, 1]) == pytest.approx(8 / 9)
    assert float(share[3, 3]) == 1
