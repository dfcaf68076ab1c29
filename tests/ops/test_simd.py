"""The functions of csrc/common/simd.h and gates.h against float64, on every instruction set."""

from __future__ import annotations

import pytest
import torch

from ultra_kernels import _native, causal_conv1d, selective_scan

pytestmark = pytest.mark.skipif(_native.missing() is not None, reason=str(_native.missing()))

ULP = {"exp": 1.5, "tanh": 1.5, "erf": 1.5, "exp2": 2.2}  # what the comments of simd.h and gates.h promise
# function -> number in simd_apply, float64 truth
FUNCTIONS = {"exp": (0, torch.exp), "tanh": (1, torch.tanh), "erf": (2, torch.special.erf), "exp2": (3, torch.exp2)}


@pytest.fixture(params=["baseline", "avx2", "avx512"])
def library(request):
    C = _native.load()
    if request.param not in C.isas():
        pytest.skip(f"this CPU has {C.isas()}")
    best = C.isa()
    C.set_isa(request.param)
    yield C
    C.set_isa(best)


def apply(C, name: str, x: torch.Tensor) -> torch.Tensor:
    y = torch.full_like(x, 7.0)
    C.simd_apply(FUNCTIONS[name][0], x.data_ptr(), y.data_ptr(), x.numel())
    return y


def every_4099th_float() -> torch.Tensor:
    """A million floats spread over all bit patterns, denormals, infinities and NaN among them."""
    return torch.arange(0, 2**32, 4099).to(torch.int32).view(torch.float32)


def ulps(got: torch.Tensor, want: torch.Tensor) -> torch.Tensor:
    """The error of float32 values, in units in the last place of the float64 truth."""
    ulp = torch.ldexp(torch.ones_like(want), torch.frexp(want)[1] - 24).clamp(min=2.0**-149)
    return (got.double() - want).abs() / ulp


@pytest.mark.parametrize("name", FUNCTIONS)
def test_units_in_the_last_place(library, name):
    truth = FUNCTIONS[name][1]
    dense = torch.linspace(-10, 10, 1_000_001)  # where the functions bend and their branches meet
    x = torch.cat([every_4099th_float(), dense])
    if name == "exp":  # below -87.3 it flushes to zero instead of a denormal: the next test
        x = torch.cat([x[~(x < -87.3)], torch.linspace(-87.3, 88.8, 100_000)])
    if name == "exp2":  # below -126 it flushes to zero, and infinity comes half a power early: the test after the next
        x = torch.cat([x[~((x < -126) | ((x >= 127.5) & (x < 128)))], torch.linspace(-126, 127.49, 100_000)])
    got, want = apply(library, name, x).double(), truth(x.double())
    assert torch.equal(got.isnan(), want.isnan())
    fine = want.float().isfinite()
    assert torch.equal(got[~fine & ~want.isnan()], want.float().double()[~fine & ~want.isnan()])
    got, want = got[fine], want[fine]
    error = ulps(got, want)
    worst = int(error.argmax())
    off = float(error[worst])
    assert off <= ULP[name], f"{name}({float(x[fine][worst])!r}) is off by {off} ulp"


def test_exp_flushes_denormal_results_to_zero(library):
    x = torch.linspace(-110, -87.34, 1001)
    assert torch.equal(apply(library, "exp", x), torch.zeros_like(x))


def test_exp2_at_its_ends(library):
    """Tiny or 0 below -126, infinity from 128 on, perhaps from 127.5, 1 at 0: a step of size 0 keeps the state."""
    low, high = torch.linspace(-1e4, -127, 1000), torch.linspace(128, 1e4, 1000)
    assert bool((apply(library, "exp2", low) <= 2.0**-126).all()) and bool((apply(library, "exp2", low) >= 0).all())
    assert bool(apply(library, "exp2", high).isinf().all())
    last = torch.linspace(127.6, 127.99, 100)
    got, want = apply(library, "exp2", last), last.double().exp2()
    assert bool((got.isinf() | ((got.double() / want - 1).abs() < 1e-6)).all())
    assert torch.equal(apply(library, "exp2", torch.zeros(33)), torch.ones(33))


@pytest.mark.parametrize("n", [0, 1, 3, 4, 5, 15, 16, 17])
def test_no_element_past_the_end(library, n):
    x, y = torch.full((32,), 0.5), torch.full((32,), 7.0)
    library.simd_apply(1, x.data_ptr(), y.data_ptr(), n)
    assert torch.equal(y[n:], torch.full((32 - n,), 7.0)) and bool((y[:n] != 7.0).all())


@pytest.mark.parametrize("gate", ["softplus", "silu"])
def test_gates_in_units_in_the_last_place(library, gate):
    """A scan of one step with ones everywhere else is the gate itself: Δ for softplus, D u silu(z) for silu."""
    x = torch.cat([torch.linspace(-80, 80, 200_001), torch.linspace(-3, 3, 200_001)])
    D = len(x)
    one, row = torch.ones(1, 1, 1), torch.ones(1, D, 1)
    if gate == "softplus":
        y = selective_scan(row, x.view(1, D, 1), -torch.ones(D, 1), one, one, None, None, None, True, backend="native")
        want = torch.nn.functional.softplus(x.double(), threshold=1000)
    else:
        y = selective_scan(row, 0 * row, -torch.ones(D, 1), one, one, torch.ones(D), x.view(1, D, 1), backend="native")
        want = torch.nn.functional.silu(x.double())
    # exp, reciprocal, product and sum, each rounded once or a little more
    assert float(ulps(y.flatten(), want).max()) <= 4


def test_bfloat16_is_rounded_to_even(library):
    """1 + 2^-8 and 1 + 3 · 2^-8 lie half way between two bfloat16 numbers."""
    bias = torch.tensor([2**-8, 3 * 2**-8]).repeat(32)
    x, weight = torch.ones(1, 64, 1, dtype=torch.bfloat16), torch.tensor([[0.0, 1.0]]).repeat(64, 1)
    y = causal_conv1d(x, weight, bias, backend="native").flatten()
    assert torch.equal(y, (1 + bias).bfloat16()) and y[:2].tolist() == [1.0, 1.015625]
