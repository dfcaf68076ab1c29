"""The Triton kernels of DyT and Derf under the interpreter: what the cases of the op suite are too small to show."""

from __future__ import annotations

import os

import pytest
import torch

from ultra_kernels import derf, dyt

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1")
pytest.importorskip("triton")


def call(function, x, alpha, shift, weight, bias, backend="triton"):
    scalars = (alpha, shift) if function is derf else (alpha,)
    return function(x, *scalars, weight, bias, backend=backend)


# e^2|x| is infinite where tanh is 1, and the polynomial that is not selected there may be NaN
@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
@pytest.mark.parametrize(("function", "truth"), [(dyt, torch.tanh), (derf, torch.special.erf)])
def test_relative_accuracy_from_tiny_to_large(function, truth):
    x = torch.cat([torch.logspace(-30, 2, 4096), torch.linspace(0.5, 4.5, 4094)])
    x = torch.cat([x, -x, torch.tensor([0.0, float("inf"), -float("inf"), float("nan")])]).view(128, 128)
    one, zero = torch.ones(1), torch.zeros(1)
    got = call(function, x, one, zero, torch.ones(128), torch.zeros(128)).double()
    want = truth(x.double())
    assert torch.equal(got.isnan(), want.isnan())
    fine = ~want.isnan() & (want != 0)
    error = ((got - want).abs() / want.abs())[fine].max()
    assert error <= 3 * torch.finfo(torch.float32).eps  # 3 ulp: numpy's exp2 and division, then one subtraction
    assert not got[want == 0].any()


@pytest.mark.parametrize("function", [dyt, derf])
def test_long_row_blocks(function, monkeypatch):
    """150 rows in 4 blocks of 38: each block loops, the last one is short, and the sums meet in a fixed order."""
    from ultra_kernels import _pointwise_norm_triton as shared

    assert [shared.row_blocks(n) for n in (1, 16, 17, 4096, 10**9)] == [1, 1, 2, 256, 256]
    monkeypatch.setattr(shared, "row_blocks", lambda rows: 4)
    g = torch.Generator().manual_seed(0)
    leaves = [torch.randn(150, 5, generator=g), torch.tensor([0.6]), torch.tensor([0.3])]
    leaves += [torch.randn(5, generator=g), torch.randn(5, generator=g)]
    cotangent = torch.randn(150, 5, generator=g)

    def gradients(backend, dtype):
        own = [t.to(dtype).requires_grad_() for t in leaves]
        y = call(function, *own, backend=backend)
        return torch.autograd.grad(y, own, cotangent.to(dtype), allow_unused=True)

    first, again = gradients("triton", torch.float32), gradients("triton", torch.float32)
    for i, (a, b, want) in enumerate(zip(first, again, gradients("reference", torch.float64), strict=True)):
        assert (a is None) == (want is None)
        if want is not None:
            assert torch.equal(a, b), "the same bits on every run"
            terms = {750: 1, 5: 150, 1: 750}[want.numel()]
            limit = 4 * torch.finfo(torch.float32).eps * terms**0.5 * max(1.0, float(want.abs().max()))
            assert float((a.double() - want).abs().max()) <= limit, i
