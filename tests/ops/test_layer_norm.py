"""Layer normalisation against its equation, and its dtypes."""

from __future__ import annotations

import pytest
import torch

from ultra_kernels import layer_norm


def inputs(dtype=torch.float64):
    torch.manual_seed(0)
    x = torch.randn(3, 4, 7, dtype=torch.float64) * 3 + 1
    return tuple(t.to(dtype).requires_grad_() for t in (x, torch.randn(7), torch.randn(7)))


def test_literal_equation_with_biased_variance():
    x, w, b = inputs()
    for eps in (1e-5, 0.5):
        mean = x.sum(-1, keepdim=True) / 7
        var = ((x - mean) ** 2).sum(-1, keepdim=True) / 7
        torch.testing.assert_close(layer_norm(x, w, b, eps), w * (x - mean) / (var + eps).sqrt() + b)
    assert torch.equal(layer_norm(x, w, b), layer_norm(x, w, b, 1e-5))


def test_gradcheck():
    x, w, b = inputs()
    assert torch.autograd.gradcheck(lambda *a: layer_norm(*a, residual=2 * a[0]), (x, w, b))


def test_residual_returns_the_sum_and_carries_both_gradients():
    x, w, b = inputs()
    r = torch.randn_like(x).requires_grad_()
    y, s = layer_norm(x, w, b, residual=r)
    assert torch.equal(s, x + r) and torch.equal(y, layer_norm(x + r, w, b))
    dx, dr = torch.autograd.grad((y.square() + 3 * s).sum(), (x, r))
    assert torch.equal(dx, dr)
    (only_y,) = torch.autograd.grad(layer_norm(x, w, b, residual=r)[0].square().sum(), x)
    torch.testing.assert_close(dx, only_y + 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [True, False])
def test_output_has_the_dtype_of_x(dtype, autocast):
    x, w, b = inputs(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = layer_norm(x, w.float(), b.float())
    assert y.dtype == dtype
    assert torch.equal(y, layer_norm(x.float(), w.float(), b.float()).to(dtype))


def test_compiles_without_a_graph_break():
    x, w, b = inputs(torch.float32)
    compiled = torch.compile(layer_norm, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, w, b), layer_norm(x, w, b))


def test_errors_name_the_argument():
    x, w, b = inputs()
    with pytest.raises(ValueError, match=r"bias has shape \(6,\).*\(7,\)"):
        layer_norm(x, w, b[:6])
    with pytest.raises(ValueError, match=r"residual has shape \(2, 4, 7\)"):
        layer_norm(x, w, b, residual=x[:2])
