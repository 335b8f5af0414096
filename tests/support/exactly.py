"""Compare blocks with plain references in float64: values and gradients, for all kinds of masks."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

MASKS = (
    "no hole",
    "all hole",
    "one known pixel",
    "one hole pixel",
    "hole over a window",
    "binary",
    "soft",
    "faint",
)


def mask(kind: str, n: int, height: int, width: int) -> Tensor:
    """Return a mask N1HW in float64 from the global generator."""
    m = torch.rand(n, 1, height, width, dtype=torch.float64)
    at = int(torch.randint(height, ())), int(torch.randint(width, ()))
    if kind == "no hole":
        m.fill_(1)
    elif kind == "all hole":
        m.fill_(0)
    elif kind == "one known pixel":
        m.fill_(0)[:, :, at[0], at[1]] = 1
    elif kind == "one hole pixel":
        m.fill_(1)[:, :, at[0], at[1]] = 0
    elif kind == "hole over a window":  # of the largest kernel, 9 x 9, if it fits
        m.fill_(1)[:, :, 1:10, 1:10] = 0
    elif kind == "binary":
        m = (m > 0.5).double()
    elif kind == "faint":  # windows around the smallest share that counts, and beyond the limit
        m = 10 ** (-6 * m)
    else:
        assert kind == "soft"
    return m


def assert_exact(
    ours: Callable[[], tuple[Tensor, ...]],
    reference: Callable[[], tuple[Tensor, ...]],
    inputs: Mapping[str, Tensor],
    tolerance: float = 1e-9,
) -> None:
    """Check that both return the same tensors and, with random weights on them, the same gradients.

    Args:
        ours: the block.
        reference: the plain computation.
        inputs: the leaves that get gradients, by name.
        tolerance: largest absolute and relative difference.
    """
    got, expected = ours(), reference()
    assert len(got) == len(expected)
    weights = [torch.randn_like(e, dtype=torch.float64) for e in expected]
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g, e.to(g.dtype), rtol=tolerance, atol=tolerance)
    for leaf in inputs.values():
        assert leaf.requires_grad
    mine, theirs = (_gradients(out, weights, list(inputs.values())) for out in (got, expected))
    for name, a, b in zip(inputs, mine, theirs, strict=True):
        torch.testing.assert_close(
            a, b, rtol=tolerance, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )


def _gradients(
    out: tuple[Tensor, ...], weights: list[Tensor], leaves: list[Tensor]
) -> list[Tensor]:
    total = sum((o * w).sum() for o, w in zip(out, weights, strict=True))
    total = total + 0.0 * sum(leaf.sum() for leaf in leaves)  # some leaves have no influence
    return list(torch.autograd.grad(total, leaves))


def convolve(x: Tensor, weight: Tensor, bias: Tensor, stride: int, padding: int) -> Tensor:
    """Compute a plain convolution NCHW, pixel by pixel."""
    k = weight.shape[2]
    x = torch.nn.functional.pad(x, (padding,) * 4)
    rows, columns = (x.shape[2] - k) // stride + 1, (x.shape[3] - k) // stride + 1
    pixels = [
        (x[:, None, :, i * stride : i * stride + k, j * stride : j * stride + k] * weight).sum(
            (2, 3, 4)
        )
        + bias
        for i in range(rows)
        for j in range(columns)
    ]
    return torch.stack(pixels, dim=2).reshape(x.shape[0], len(bias), rows, columns)
