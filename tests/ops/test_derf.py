"""What makes Derf's reference trustworthy, and the properties of the op on every backend that runs here."""

from __future__ import annotations

import math

import pytest
import torch

from ultra_kernels import _native, derf
from ultra_kernels.derf.op import OP

needs_native = pytest.mark.skipif(_native.missing() is not None, reason=str(_native.missing()))
BACKENDS = ["reference", pytest.param("native", marks=needs_native)]


def inputs(dtype=torch.float64, D=9):
    g = torch.Generator().manual_seed(0)
    leaves = [torch.randn(4, D, generator=g), torch.tensor([0.6]), torch.tensor([0.3])]
    leaves += [torch.randn(D, generator=g), torch.randn(D, generator=g)]
    return [t.to(dtype).requires_grad_() for t in leaves]


def test_equals_the_equation_of_the_paper():
    x, alpha, shift, weight, bias = (t.detach() for t in inputs())
    y = derf(x, alpha, shift, weight, bias, backend="reference")
    for i, d in [(0, 0), (1, 3), (3, 8)]:
        want = float(weight[d]) * math.erf(float(alpha) * float(x[i, d]) + float(shift)) + float(bias[d])
        assert abs(float(y[i, d]) - want) < 1e-14


def test_gradients_of_the_reference():
    assert torch.autograd.gradcheck(lambda *a: derf(*a, backend="reference"), inputs())
    assert torch.autograd.gradgradcheck(lambda *a: derf(*a, backend="reference"), inputs())


@pytest.mark.parametrize("backend", BACKENDS)
def test_residual_is_added_first_and_returned(backend):
    x, *rest = inputs(torch.float32)
    residual = torch.randn_like(x).requires_grad_()
    y, total = derf(x, *rest, residual=residual, backend=backend)
    assert torch.equal(total, x + residual)
    assert torch.equal(y, derf(x + residual, *rest, backend=backend))
    (y.sum() + (2 * total).sum()).backward()
    assert torch.equal(x.grad, residual.grad)
    of_y, of_sum = (derf(x, *rest, residual=residual, backend=backend)[i].sum() for i in (0, 1))
    torch.testing.assert_close(x.grad, torch.autograd.grad(of_y, x)[0] + 2)
    assert torch.equal(torch.autograd.grad(of_sum, residual)[0], torch.ones_like(x))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 5), (2, 0, 5), (3, 0)])
def test_nothing_in_nothing_out(backend, shape):
    D = shape[-1]
    x, alpha, shift = (torch.zeros(s, requires_grad=True) for s in (shape, 1, 1))
    weight, bias = (torch.ones(D, requires_grad=True) for _ in range(2))
    derf(x, alpha, shift, weight, bias, backend=backend).sum().backward()
    assert x.grad.shape == shape and not alpha.grad.any() and not shift.grad.any()
    assert not weight.grad.any() and not bias.grad.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_parameters_of_no_dimension_and_other_dtypes(backend):
    x, alpha, shift, weight, bias = (t.detach() for t in inputs(torch.float32))
    scalars = [t.reshape(()).to(torch.bfloat16).requires_grad_() for t in (alpha, shift)]
    half = [t.to(torch.bfloat16).requires_grad_() for t in (weight, bias)]
    derf(x, *scalars, *half, backend=backend).square().sum().backward()
    for p in scalars + half:
        assert p.grad.shape == p.shape and p.grad.dtype == p.dtype


@needs_native
def test_sums_do_not_depend_on_the_thread_count():
    threads, g = torch.get_num_threads(), torch.Generator().manual_seed(0)
    leaves = [torch.randn(300, 20, generator=g), torch.tensor([0.6]), torch.tensor([0.3]), *torch.ones(2, 20)]
    leaves = [t.requires_grad_() for t in leaves]
    grads = []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            grads.append(torch.autograd.grad(derf(*leaves, backend="native").square().sum(), leaves))
    finally:
        torch.set_num_threads(threads)
    for other in grads[1:]:
        assert all(torch.equal(a, b) for a, b in zip(grads[0], other, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_and_infinity_pass_as_in_erf(backend):
    x = torch.tensor([[float("nan"), float("inf"), -float("inf"), 0.0]])
    one, zero = torch.ones(1), torch.zeros(1)
    y = derf(x, one, zero, torch.ones(4), torch.zeros(4), backend=backend)
    torch.testing.assert_close(y, torch.erf(x), equal_nan=True, rtol=0, atol=0)


def test_errors_name_the_argument():
    x, alpha, shift, weight, bias = inputs()
    with pytest.raises(ValueError, match=r"shift has shape \(2,\); it must have one element"):
        derf(x, alpha, torch.zeros(2), weight, bias)
    with pytest.raises(ValueError, match=r"alpha has shape \(0,\)"):
        derf(x, torch.zeros(0), shift, weight, bias)
    with pytest.raises(ValueError, match=r"bias has shape \(8,\).*9"):
        derf(x, alpha, shift, weight, bias[:8])
    with pytest.raises(ValueError, match=r"residual has shape \(9,\)"):
        derf(x, alpha, shift, weight, bias, residual=bias)


@needs_native
def test_compiles_without_a_graph_break(monkeypatch):
    monkeypatch.delenv("ULTRA_BACKEND", raising=False)
    args = inputs(torch.float32)
    assert OP.choose(None, args[0]) == "native"
    eager = torch.autograd.grad(derf(*args).square().sum(), args)
    compiled = torch.compile(lambda *a: derf(*a), fullgraph=True, backend="aot_eager")
    for a, b in zip(eager, torch.autograd.grad(compiled(*args).square().sum(), args), strict=True):
        torch.testing.assert_close(a, b)
