"""The Triton kernels of the ternary products: exact integers, every tile, odd sizes; most needs the interpreter."""

from __future__ import annotations

import os

import pytest
import torch

from ultra_kernels import (
    BackendUnavailable,
    PackedTernary,
    pack_ternary,
    quantize_ternary,
    ternary_linear,
    ternary_matmul,
)
from ultra_kernels._triton import recorded_launches

pytest.importorskip("triton")
interpreted = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1")


def weights(N: int, K: int) -> torch.Tensor:
    return torch.randint(-1, 2, (N, K), generator=torch.Generator().manual_seed(0), dtype=torch.int8)


def packed(N: int, K: int) -> PackedTernary:
    return pack_ternary(weights(N, K), torch.tensor(0.37))


def integers(M: int, K: int) -> torch.Tensor:
    return torch.randint(-128, 128, (M, K), generator=torch.Generator().manual_seed(1), dtype=torch.int8)


def assert_exact(M: int, N: int, K: int, device: str = "cpu") -> None:
    x = integers(M, K)
    y = ternary_matmul(x.to(device), packed(N, K).to(device), backend="triton")
    assert y.dtype == torch.int32 and torch.equal(y.cpu().long(), x.long() @ weights(N, K).long().t())


def assert_linear(M: int, N: int, K: int, dtype: torch.dtype, device: str = "cpu", bias: bool = True) -> None:
    """Float32 to the last bits, which a fused multiply-add of a GPU moves; half to one rounding."""
    g = torch.Generator().manual_seed(2)
    x, b = torch.randn(M, K, generator=g).to(dtype), torch.randn(N, generator=g).to(dtype)
    tensors = (x, packed(N, K), b if bias else None)
    want = ternary_linear(*tensors, backend="reference")
    got = ternary_linear(*(None if t is None else t.to(device) for t in tensors), backend="triton")
    assert got.dtype == dtype
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(got.cpu(), want, rtol=eps, atol=4 * eps * float(want.abs().max()) if M else 0.0)


@interpreted
@pytest.mark.parametrize("M", [0, 1, 3, 7, 65])
@pytest.mark.parametrize(("N", "K"), [(1, 1), (1, 130), (33, 4), (17, 63), (64, 257), (0, 5), (5, 0)])
def test_products_are_exact(M: int, N: int, K: int) -> None:
    assert_exact(M, N, K)


@interpreted
@pytest.mark.parametrize("value", [127, -127, -128])
def test_extreme_sums_do_not_saturate(value: int) -> None:
    K = 4100
    x, w = torch.full((2, K), value, dtype=torch.int8), torch.ones(3, K, dtype=torch.int8)
    w[1], w[2, ::2] = -1, 0
    y = ternary_matmul(x, pack_ternary(w, torch.tensor(1.0)), backend="triton")
    assert y.tolist() == [[value * K, -value * K, value * (K // 2)]] * 2


@interpreted
@pytest.mark.parametrize("M", [16, 17, 64, 66, 130])
def test_every_tile(M: int) -> None:
    """Rows that fill a tile of each size and part of one; outputs in whole tiles and a part."""
    from ultra_kernels.ternary.triton_kernels import PANELS

    tile = next(tile for rows, tile in PANELS.items() if rows >= M)
    for N in (tile.block_n, tile.block_n + 5):
        assert_exact(M, N, 150)
        assert_linear(M, N, 150, torch.float32)


@interpreted
@pytest.mark.parametrize("M", [1, 20])
@pytest.mark.parametrize("K", [1, 16, 127, 1100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=lambda d: str(d)[6:])
def test_linear(M: int, K: int, dtype: torch.dtype) -> None:
    for bias in (False, True):
        assert_linear(M, 21, K, dtype, bias=bias)


@interpreted
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # of the interpreter
def test_rows_of_nan_of_inf_and_of_zeros() -> None:
    x, b = torch.randn(4, 40, generator=torch.Generator().manual_seed(0)), torch.arange(5.0)
    x[0, 2], x[1, 3], x[2] = float("nan"), -float("inf"), 0.0
    y = ternary_linear(x, packed(5, 40), b, backend="triton")
    assert not y[:2].isfinite().any() and torch.equal(y[2], b) and y[3].isfinite().all()


@interpreted
def test_strided_inputs_and_a_float16_bias() -> None:
    x = torch.randn(40, 6, generator=torch.Generator().manual_seed(0)).t()
    b = torch.linspace(-1, 1, 5).half()
    got, want = (ternary_linear(x.view(2, 3, 40), packed(5, 40), b, backend=k) for k in ("triton", "reference"))
    torch.testing.assert_close(got, want)
    gaps = integers(6, 80)[:, ::2]
    assert torch.equal(*(ternary_matmul(gaps, packed(5, 40), backend=k) for k in ("triton", "reference")))


@interpreted
def test_no_gradient_and_no_graph_break() -> None:
    x = torch.randn(2, 40, requires_grad=True)
    weight, p = torch.randn(5, 40, requires_grad=True), packed(5, 40)

    def infer(x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        codes, gamma = quantize_ternary(weight, backend="triton")
        return ternary_linear(x, p, backend="triton"), codes * gamma

    eager = infer(x, weight)
    assert not eager[0].requires_grad and not eager[1].requires_grad
    for a, b in zip(torch.compile(infer, fullgraph=True, backend="aot_eager")(x, weight), eager, strict=True):
        assert torch.equal(a, b)


@interpreted
def test_opcheck() -> None:
    ops = torch.ops.ultra_kernels
    p, x = packed(5, 40), torch.randn(3, 40, requires_grad=True)
    torch.library.opcheck(ops.quantize_ternary.default, (torch.randn(5, 40, requires_grad=True), "mean", "triton"))
    torch.library.opcheck(ops.ternary_matmul.default, (integers(3, 40), p.codes, p.shape, "triton"))
    for bias in (None, torch.ones(5)):
        torch.library.opcheck(ops.ternary_linear.default, (x, p.codes, p.scale, p.shape, bias, "triton"))


# ---- on a GPU -------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("M", [1, 7, 16, 17, 65, 500])
@pytest.mark.parametrize(("N", "K"), [(1, 1), (33, 4), (17, 63), (200, 257), (130, 4112)])
def test_products_gpu(M: int, N: int, K: int) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    assert_exact(M, N, K, "cuda")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for bias in (False, True):
            assert_linear(M, N, K, dtype, "cuda", bias)


# ---- without running ------------------------------------------------------------------------------------------


def test_one_kernel_serves_all_sizes_of_a_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime import JITFunction

    from ultra_kernels.ternary import triton_kernels

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    if not isinstance(triton_kernels.panels_kernel, JITFunction):
        pytest.skip("TRITON_INTERPRET=1: kernels are Python functions")
    with recorded_launches(run=False) as seen:
        for M, N, K in ((1, 1, 1), (3, 33, 4), (16, 16, 130), (8, 16, 256)):
            ternary_matmul(integers(M, K), packed(N, K), backend="triton")
    covering = [c.name for c in triton_kernels.configurations() if all(map(c.covers, seen))]
    assert covering == ["panels-16-i32"] and len(seen) == 4


def test_refusals_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(BackendUnavailable, match="not float64"):
        ternary_linear(torch.zeros(2, 9).double(), packed(5, 9), backend="triton")
    with pytest.raises(BackendUnavailable, match=r"a bias of float32, bfloat16 or float16, not torch\.float64"):
        ternary_linear(torch.zeros(2, 9), packed(5, 9), torch.zeros(5).double(), backend="triton")
    with pytest.raises(BackendUnavailable, match="x is on cpu, another tensor on meta"):
        ternary_matmul(integers(2, 9), packed(5, 9).to("meta"), backend="triton")
