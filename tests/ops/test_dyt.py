"""DyT against its equation, and the properties of the op on every backend that runs here."""

from __future__ import annotations

import math

import pytest
import torch

from ultra_kernels import _native, dyt

needs_native = pytest.mark.skipif(_native.missing() is not None, reason=str(_native.missing()))
BACKENDS = ["reference", pytest.param("native", marks=needs_native)]


def inputs(dtype: torch.dtype = torch.float64, D: int = 9) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    leaves = [torch.randn(4, D, generator=g), torch.tensor([0.6]), *torch.randn(2, D, generator=g)]
    return [t.to(dtype).requires_grad_() for t in leaves]


def test_equals_the_equation_of_the_paper() -> None:
    x, alpha, weight, bias = (t.detach() for t in inputs())
    y = dyt(x, alpha, weight, bias, backend="reference")
    for i, d in [(0, 0), (1, 3), (3, 8)]:
        want = float(weight[d]) * math.tanh(float(alpha) * float(x[i, d])) + float(bias[d])
        assert abs(float(y[i, d]) - want) < 1e-14


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_equal_their_equations(backend: str) -> None:
    leaves = inputs(torch.float64 if backend == "reference" else torch.float32)
    x, alpha, weight, _ = (t.detach() for t in leaves)
    g = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(x)
    t = torch.tanh(alpha * x)
    slope = g * weight * (1 - t * t)
    wanted = slope * alpha, (slope * x).sum()[None], (g * t).sum(0), g.sum(0)
    for got, want in zip(torch.autograd.grad(dyt(*leaves, backend=backend), leaves, g), wanted, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_residual_is_added_first_and_returned(backend: str) -> None:
    x, *rest = inputs(torch.float32)
    residual = torch.randn_like(x).requires_grad_()
    y, total = dyt(x, *rest, residual=residual, backend=backend)
    assert torch.equal(total, x + residual)
    assert torch.equal(y, dyt(x + residual, *rest, backend=backend))
    (y.sum() + (2 * total).sum()).backward()
    assert torch.equal(x.grad, residual.grad)
    of_y, of_sum = (dyt(x, *rest, residual=residual, backend=backend)[i].sum() for i in (0, 1))
    torch.testing.assert_close(x.grad, torch.autograd.grad(of_y, x)[0] + 2)
    assert torch.equal(torch.autograd.grad(of_sum, residual)[0], torch.ones_like(x))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 5), (2, 0, 5), (3, 0)])
def test_nothing_in_nothing_out(backend: str, shape: tuple[int, ...]) -> None:
    x, alpha = torch.zeros(shape, requires_grad=True), torch.zeros(1, requires_grad=True)
    weight, bias = (torch.ones(shape[-1], requires_grad=True) for _ in range(2))
    dyt(x, alpha, weight, bias, backend=backend).sum().backward()
    assert x.grad.shape == shape and not alpha.grad.any() and not weight.grad.any() and not bias.grad.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_and_infinity_pass_as_in_tanh(backend: str) -> None:
    x = torch.tensor([[float("nan"), float("inf"), -float("inf"), 0.0]])
    y = dyt(x, torch.ones(1), torch.ones(4), torch.zeros(4), backend=backend)
    torch.testing.assert_close(y, torch.tanh(x), equal_nan=True, rtol=0, atol=0)


def test_errors_name_the_argument() -> None:
    x, alpha, weight, bias = inputs()
    with pytest.raises(ValueError, match=r"alpha has shape \(2,\)"):
        dyt(x, torch.zeros(2), weight, bias)
    with pytest.raises(ValueError, match=r"bias has shape \(8,\).*9"):
        dyt(x, alpha, weight, bias[:8])
    with pytest.raises(ValueError, match=r"residual has shape \(9,\)"):
        dyt(x, alpha, weight, bias, residual=bias)
