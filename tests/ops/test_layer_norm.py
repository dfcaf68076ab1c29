"""Layer normalisation against its equation, and the properties of the op on every backend that runs here."""

from __future__ import annotations

import os

import pytest
import torch

from ultra_kernels import _native, layer_norm
from ultra_kernels.layer_norm.op import OP

needs_native = pytest.mark.skipif(_native.missing() is not None, reason=str(_native.missing()))
needs_interpreter = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1")
KERNELS = [
    pytest.param("native", marks=needs_native, id="native"),
    pytest.param("triton", marks=needs_interpreter, id="triton"),
]
BACKENDS = ["reference", *KERNELS]
EPS = torch.finfo(torch.float32).eps


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


@pytest.mark.parametrize("backend", BACKENDS)
def test_residual_returns_the_sum_and_carries_both_gradients(backend):
    x, w, b = inputs(torch.float32)
    r = torch.randn_like(x).requires_grad_()
    y, s = layer_norm(x, w, b, residual=r, backend=backend)
    assert torch.equal(s, x + r) and torch.equal(y, layer_norm(x + r, w, b, backend=backend))
    dx, dr, dw = torch.autograd.grad((y.square() + 3 * s).sum(), (x, r, w))
    assert torch.equal(dx, dr)
    only_y, only_w = torch.autograd.grad(
        layer_norm(x, w, b, residual=r, backend=backend)[0].square().sum(), (x, w)
    )  # fmt: skip
    torch.testing.assert_close(dx, only_y + 3)
    assert torch.equal(dw, only_w)
    (only_s,) = torch.autograd.grad(layer_norm(x, w, b, residual=r, backend=backend)[1].sum(), r)
    assert torch.equal(only_s, torch.ones_like(x))


@needs_native
def test_what_is_normalised_is_the_rounded_sum():
    """1 and 1/256 in bfloat16 are 1, and a residual of another dtype is cast first."""
    x = torch.tensor([[1.0, 2.0, 1.0, 3.0]], dtype=torch.bfloat16)
    r = torch.tensor([[1 / 256, 0.0, 0.0, 1 / 512]])
    for backend in ("reference", "native"):
        y, s = layer_norm(x, torch.ones(4), torch.zeros(4), residual=r, backend=backend)
        assert torch.equal(s, x) and torch.equal(y, layer_norm(x, torch.ones(4), torch.zeros(4), backend=backend))
        assert y.dtype == s.dtype == torch.bfloat16


def relative_errors(backend, x, *, eps=1e-5, **options):
    """Of y, dx, dweight and dbias, against float64: the largest error over the largest value."""
    g = torch.Generator().manual_seed(3)
    D = x.shape[-1]
    w, b, cotangent = torch.randn(D, generator=g), torch.randn(D, generator=g), torch.randn(x.shape, generator=g)

    def results(dtype, backend):
        leaves = [t.detach().to(dtype).requires_grad_() for t in (x, w, b)]
        y = layer_norm(*leaves, eps, backend=backend, **options)
        return [y.detach(), *torch.autograd.grad(y, leaves, cotangent.to(dtype))]

    pairs = zip(results(torch.float32, backend), results(torch.float64, "reference"), strict=True)
    return [float((got.double() - want).abs().max() / want.abs().max()) for got, want in pairs]


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("D", [63, 768, 1100, 8200])
@pytest.mark.parametrize("mean", [1e4, -3e5])
def test_a_large_mean_costs_no_digits(backend, D, mean):
    """A float32 mean of 1e4 is off by up to 5e-4, of 3e5 by 1.6e-2, where rows have a standard deviation of 1."""
    x = torch.randn(5, D, generator=torch.Generator().manual_seed(0)) + mean
    assert max(relative_errors(backend, x)) <= 4 * EPS * D**0.5


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [0.0, 3.1, -1e4])
@pytest.mark.parametrize("D", [1, 63, 768])
def test_constant_rows_become_the_bias(backend, value, D):
    """x - mean is one rounding of x; 1 / sqrt(eps) makes up to 317 of it."""
    x = torch.full((3, D), value, requires_grad=True)
    w, b = torch.full((D,), 2.0, requires_grad=True), torch.linspace(-1, 1, D).requires_grad_()
    y = layer_norm(x, w, b, backend=backend)
    rounding = 4 * EPS * 317 * max(abs(value), 1.0) * D**0.5
    assert float((y - b).detach().abs().max()) <= 2 * rounding
    dx, dw, db = torch.autograd.grad(y, (x, w, b), torch.ones(3, 1) * torch.linspace(0, 1, D))
    assert float(dw.abs().max()) <= 3 * rounding and torch.allclose(db, 3 * torch.linspace(0, 1, D))
    centred = torch.linspace(0, 1, D) - torch.linspace(0, 1, D).mean()
    assert float((dx - 2 * 1e5**0.5 * centred).abs().max()) <= 2 * 317 * (rounding**2 + 4 * EPS * D**0.5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 5), (2, 0, 5)])
def test_nothing_in_nothing_out(backend, shape):
    x = torch.zeros(shape, requires_grad=True)
    w, b = (torch.ones(shape[-1], requires_grad=True) for _ in range(2))
    layer_norm(x, w, b, backend=backend).sum().backward()
    assert x.grad.shape == shape and not w.grad.any() and not b.grad.any()


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_row(backend, bad):
    x = torch.randn(3, 70, generator=torch.Generator().manual_seed(0))
    x[1, 65] = bad
    y = layer_norm(x, torch.ones(70), torch.zeros(70), backend=backend)
    assert y[1].isnan().all() and y[[0, 2]].isfinite().all()


@needs_native
@pytest.mark.parametrize("rows", [5, 300, 2100])
def test_results_do_not_depend_on_the_thread_count(rows):
    threads, g = torch.get_num_threads(), torch.Generator().manual_seed(0)
    leaves = [torch.randn(rows, 20, generator=g), torch.randn(20, generator=g), torch.randn(20, generator=g)]
    leaves = [t.requires_grad_() for t in leaves]
    found = []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            y, s = layer_norm(*leaves, residual=leaves[0].detach(), backend="native")
            found.append([y, s, *torch.autograd.grad(y.square().sum() + s.sum(), leaves)])
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@needs_native
def test_every_instruction_set_keeps_the_digits_of_a_large_mean(isa):
    x = torch.randn(5, 301, generator=torch.Generator().manual_seed(0)) + 1e4
    assert max(relative_errors("native", x)) <= 4 * EPS * 301**0.5


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [True, False])
def test_output_has_the_dtype_of_x(dtype, autocast, backend):
    if backend == "triton" and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter rounds bfloat16 otherwise")
    x, w, b = inputs(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = layer_norm(x, w.float(), b.float(), backend=backend)
    assert y.dtype == dtype
    assert torch.equal(y, layer_norm(x.float(), w.float(), b.float(), backend=backend).to(dtype))


@pytest.mark.parametrize("backend", BACKENDS)
def test_parameters_of_the_inputs_dtype(backend):
    x, w, b = (t.to(torch.float16).detach().requires_grad_() for t in inputs())
    dx, dw, db = torch.autograd.grad(layer_norm(x, w, b, backend=backend).float().square().sum(), (x, w, b))
    assert dx.dtype == dw.dtype == db.dtype == torch.float16
    wide = [t.detach().double().requires_grad_() for t in (x, w, b)]
    for got, want in zip((dx, dw, db), torch.autograd.grad(layer_norm(*wide).square().sum(), wide), strict=True):
        torch.testing.assert_close(got.double(), want, atol=4e-3 * float(want.abs().max()), rtol=0.0)


@needs_native
@pytest.mark.parametrize("residual", [False, True])
def test_compiles_without_a_graph_break(monkeypatch, residual):
    monkeypatch.delenv("ULTRA_BACKEND", raising=False)
    x, w, b = args = inputs(torch.float32)
    assert OP.choose(None, x) == "native"
    extra = {"residual": torch.randn_like(x).requires_grad_()} if residual else {}

    def loss(call):
        out = call(x, w, b, **extra)
        return sum(((i + 2) * o.square()).sum() for i, o in enumerate(out if residual else (out,)))

    eager = torch.autograd.grad(loss(layer_norm), [*args, *extra.values()])
    compiled = torch.compile(layer_norm, fullgraph=True, backend="aot_eager")
    for a, b in zip(eager, torch.autograd.grad(loss(compiled), [*args, *extra.values()]), strict=True):
        torch.testing.assert_close(a, b)


@needs_native
def test_a_second_derivative_is_refused():
    x, w, b = inputs(torch.float32)
    (first,) = torch.autograd.grad(layer_norm(x, w, b, backend="native").square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"layer_norm has no second derivative"):
        first.sum().backward()


def test_errors_name_the_argument():
    x, w, b = inputs()
    with pytest.raises(ValueError, match=r"bias has shape \(6,\).*\(7,\)"):
        layer_norm(x, w, b[:6])
    with pytest.raises(ValueError, match=r"residual has shape \(2, 4, 7\)"):
        layer_norm(x, w, b, residual=x[:2])
