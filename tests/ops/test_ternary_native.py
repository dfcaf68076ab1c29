"""What is special to ternary products and BitLinear in C++: instruction sets, tile borders, rounding, kept weights."""

from __future__ import annotations

import itertools

import pytest
import torch

from ultra_kernels import _native, bitlinear, pack_ternary, ternary_linear, ternary_matmul
from ultra_kernels.bitlinear import native as bitlinear_native
from ultra_kernels.bitlinear.cases import grid_tokens, ternary_weights
from ultra_kernels.bitlinear.reference import quantize_tokens, quantize_weight
from ultra_kernels.ternary import native
from ultra_kernels.ternary.reference import unpack

pytestmark = pytest.mark.skipif(_native.missing() is not None, reason=str(_native.missing()))

ONE = torch.tensor(1.0)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def integers(low: int, high: int, *shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(low, high + 1, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int8)


# 16 columns are a block; narrow sums are widened after 15 (AVX2) or 30 blocks (baseline), so at 240 and 480 columns.
@pytest.mark.parametrize("K", [1, 15, 16, 17, 63, 239, 240, 241, 256, 480, 497, 4096])
def test_products_are_exact(isa: str, K: int) -> None:
    for M, N in itertools.product((1, 2, 3, 4, 5, 6, 7, 11, 13, 65), (1, 4, 15, 16, 17, 33, 70)):
        x, w = integers(-128, 127, M, K), integers(-1, 1, N, K, seed=1)
        assert torch.equal(ternary_matmul(x, pack_ternary(w, ONE), backend="native").long(), x.long() @ w.long().t())


@pytest.mark.parametrize("value", [127, -127, -128])
@pytest.mark.parametrize("K", [4096, 600_001])
def test_extreme_sums(isa: str, value: int, K: int) -> None:
    """AVX-512 holds sums of 64-fold products: those of 524,288 columns overflow unless it takes them out before."""
    w = torch.ones(5, K, dtype=torch.int8)
    w[1], w[2, ::2] = -1, 0
    packed = pack_ternary(w, ONE)
    for M in (1, 2, 3, 7):
        y = ternary_matmul(torch.full((M, K), value, dtype=torch.int8), packed, backend="native")
        half = value * (K // 2)
        assert y.tolist() == [[value * K, -value * K, half, value * K, value * K]] * M


def test_rows_of_any_stride(isa: str) -> None:
    x, w = integers(-128, 127, 9, 70), integers(-1, 1, 20, 63, seed=1)
    packed = pack_ternary(w, ONE)
    for view in (x[:, :63], x[:, 7:], x[::2, :63], x.t().contiguous().t()[:, :63], x[:1, :63].expand(5, 63)):
        want = view.long() @ w.long().t()
        assert torch.equal(ternary_matmul(view, packed, backend="native").long(), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("K", [1, 5, 16, 33, 100])
def test_tokens_are_rounded_as_by_the_reference(isa: str, K: int, dtype: torch.dtype) -> None:
    x = (draw(50, K) * 10.0 ** draw(50, 1, seed=1)).to(dtype)
    x[0], x[1], x[2, 0] = 0, 1e-6, 3e4
    codes, step, _ = native.quantize_rows(x, None)
    want, wanted_step = quantize_tokens(x)
    assert torch.equal(codes.float(), want) and torch.equal(step, wanted_step[:, 0])


def test_ties_round_to_even(isa: str) -> None:
    x = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5, 127.0]])
    assert native.quantize_rows(x, None)[0].tolist() == [[0, 2, 2, 0, -2, -2, 126, 127]]


@pytest.mark.parametrize("scale", ["mean", "median"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("N", "K"), [(1, 1), (3, 100), (16, 16), (65, 257), (2100, 5)])
def test_weights_are_rounded_as_by_the_reference(isa: str, N: int, K: int, dtype: torch.dtype, scale: str) -> None:
    w = (draw(N, K) * 0.02).to(dtype)
    packed, gamma = native.quantize_weight(w, scale)
    codes, want = quantize_weight(w.double(), scale)
    torch.testing.assert_close(gamma, want.float(), rtol=2 * 2**-23, atol=0)
    near_tie = ((w.double() / (want + 1e-5)).abs() - 0.5).abs() < 1e-6
    assert bool(((unpack(packed, (N, K)) == codes) | near_tie).all()) and near_tie.double().mean() < 0.01


def test_the_least_scales(isa: str) -> None:
    """Both are 1e-5: the least absmax of a token, and the term beside γ (0.9 / 1.9 rounds down, 1.1 / 2.1 up)."""
    assert native.quantize_rows(torch.tensor([[4e-6, -1e-6]]), None)[0].tolist() == [[51, -13]]  # 127 · 0.4, 127 · 0.1
    for value, code in ((0.9e-5, 0), (1.1e-5, 1)):
        packed, _ = native.quantize_weight(torch.full((2, 2), value), "mean")
        assert unpack(packed, (2, 2)).unique().tolist() == [code]


@pytest.mark.parametrize("N", [3, 16, 37])
def test_linear_scales_sums_and_adds_a_bias(isa: str, N: int) -> None:
    x, w, bias = draw(3, 40), integers(-1, 1, N, 40), draw(N, seed=1)
    codes, step = quantize_tokens(x)
    want = (codes.double() @ w.double().t()) * step.double() * 0.37 + bias.double()
    got = ternary_linear(x, pack_ternary(w, torch.tensor(0.37)), bias, backend="native")
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=1e-6)


def test_the_norm_is_rms_norm(isa: str) -> None:
    x, gain = draw(5, 37) * 1e-3, 1 + 0.1 * draw(37, seed=1)
    codes, step, rstd = native.quantize_rows(x, gain)
    want = (x.double().square().mean(-1) + 1e-6).rsqrt()
    torch.testing.assert_close(rstd.double(), want, rtol=1e-6, atol=0)
    normal = x.double() * want[:, None] * gain.double()
    assert ((codes * step[:, None]).double() - normal).abs().max() <= 0.51 * step.max()


def test_nan_and_infinity_are_not_hidden(isa: str) -> None:
    x = draw(4, 40)
    x[0, 7], x[1, 39], x[2, 0] = float("nan"), float("inf"), -float("inf")
    packed = pack_ternary(integers(-1, 1, 9, 40), ONE)
    y = ternary_linear(x, packed, draw(9), backend="native")
    assert not y[:3].isfinite().any() and y[3].isfinite().all()


def gradients(
    x: torch.Tensor, w: torch.Tensor, dy: torch.Tensor, norm: torch.Tensor | None, backend: str
) -> tuple[torch.Tensor, ...]:
    leaves = [t.clone().requires_grad_() for t in (x, w, *(() if norm is None else (norm,)))]
    y = bitlinear(leaves[0], leaves[1], norm_weight=None if norm is None else leaves[2], backend=backend)
    return y.detach(), *torch.autograd.grad(y, leaves, dy)


# Blocks of dx are 512 rows, of dW 192 × 256; 128 terms are summed at a time.
@pytest.mark.parametrize(
    ("M", "N", "K"), [(1, 17, 63), (3, 31, 113), (127, 193, 65), (129, 48, 257), (513, 130, 96), (1100, 1090, 70)]
)
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_at_block_borders(isa: str, M: int, N: int, K: int, norm: bool, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    gain = 2.0 ** torch.randint(-1, 2, (K,), generator=g).double() if norm else None
    x, w = grid_tokens(g, M, K), ternary_weights(g, N, K)
    x = x if gain is None else x / gain
    dy = draw(M, N).to(dtype)
    want = gradients(x, w, dy.double(), gain, "reference")
    got = gradients(x.to(dtype), w.to(dtype), dy, None if gain is None else gain.to(dtype), "native")
    # bfloat16: rounding of dy · step, then of the result, 2^-9 each, as a root mean square
    limit = 5e-6 if dtype == torch.float32 else 6e-3
    for a, b in zip(got, want, strict=True):
        assert a.dtype == dtype and float((a.double() - b).norm() / b.norm()) < limit


@pytest.mark.parametrize("cut", ["rows", "odd", "columns"])
def test_gradients_of_any_stride(cut: str) -> None:
    """The kernel for pairs of bfloat16 reads four bytes at a time."""
    x, w = draw(7, 33).bfloat16(), draw(20, 33, seed=1).bfloat16()
    wide = draw(14, 43, seed=2).bfloat16()
    dy = {"rows": wide[::2, :20], "odd": wide[:7, 1:21], "columns": wide.t().contiguous().t()[:7, :20]}[cut]
    for a, b in zip(gradients(x, w, dy, None, "native"), gradients(x, w, dy.contiguous(), None, "native"), strict=True):
        assert torch.equal(a, b)


def test_threads_do_not_change_the_bits() -> None:
    x, w, norm, dy = draw(70, 300), draw(260, 300, seed=1), 1 + 0.1 * draw(300, seed=2), draw(70, 260, seed=3)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        want = gradients(x, w, dy, norm, "native")
        torch.set_num_threads(3)
        assert all(torch.equal(a, b) for a, b in zip(gradients(x, w, dy, norm, "native"), want, strict=True))
    finally:
        torch.set_num_threads(before)


def test_no_rows_leave_zero_gradients() -> None:
    y, dx, dw, dnorm = gradients(draw(0, 12), draw(5, 12), draw(0, 5), torch.ones(12), "native")
    assert y.shape == (0, 5) and dx.shape == (0, 12) and not dw.any() and not dnorm.any()


def test_a_weight_written_through_data_is_noticed() -> None:
    """Such writes do not count in the tensor's version; the kept ternary weight must go all the same."""
    x, w = draw(3, 40), draw(8, 40, seed=1).requires_grad_()
    before = bitlinear(x, w, backend="native")
    w.data.neg_()
    torch.testing.assert_close(bitlinear(x, w, backend="native"), -before)
    w.data.zero_()
    assert not bitlinear(x, w, backend="native").any()


def test_the_fingerprint_sees_both_ends_and_between() -> None:
    w = draw(50, 70)
    seen = {bitlinear_native.fingerprint(w)}
    for at in (0, 1, 1750, w.numel() - 1):
        changed = w.clone()
        changed.view(-1)[at : at + 5] += 1
        seen.add(bitlinear_native.fingerprint(changed))
    assert len(seen) == 5 and bitlinear_native.fingerprint(w.t().contiguous().t()) in seen
    assert bitlinear_native.fingerprint(torch.zeros(1, 1)) != bitlinear_native.fingerprint(torch.ones(1, 1))
