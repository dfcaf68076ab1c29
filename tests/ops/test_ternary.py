"""Packing is lossless, the integer product is exact, and inference equals what was trained."""

from __future__ import annotations

import pytest
import torch

from ultra_kernels import (
    bitlinear,
    pack_ternary,
    quantize_ternary,
    ternary_linear,
    ternary_matmul,
    unpack_ternary,
)


def codes(N, K, seed=0):
    return torch.randint(-1, 2, (N, K), generator=torch.Generator().manual_seed(seed), dtype=torch.int8)


@pytest.mark.parametrize("K", [0, 1, 3, 4, 5, 16, 17, 63, 130])
@pytest.mark.parametrize("N", [0, 1, 7, 16, 33])
def test_pack_round_trip(N, K):
    packed = pack_ternary(codes(N, K), torch.tensor(0.37))
    assert packed.codes.shape == (-(-N // 16), -(-K // 16), 64) and packed.codes.dtype == torch.uint8
    assert packed.shape == (N, K)
    back, scale = unpack_ternary(packed)
    assert back.dtype == torch.int8 and torch.equal(back, codes(N, K))
    assert scale == torch.tensor(0.37) and scale.dtype == torch.float32


def test_layout_is_as_documented():
    N, K = 18, 35
    weights = codes(N, K)
    packed = pack_ternary(weights, torch.tensor(1.0)).codes
    want = torch.zeros_like(packed)
    for n in range(N):
        for k in range(K):
            want[n // 16, k // 16, 4 * (n % 16) + k % 4] += (int(weights[n, k]) + 1) << 2 * (k % 16 // 4)
    assert torch.equal(packed, want)


@pytest.mark.parametrize("M", [0, 1, 3, 7, 65])
@pytest.mark.parametrize(("N", "K"), [(1, 1), (1, 130), (33, 4), (17, 63), (64, 257), (0, 5), (5, 0)])
def test_matmul_is_exact(M, N, K):
    x = torch.randint(-128, 128, (M, K), generator=torch.Generator().manual_seed(1), dtype=torch.int8)
    y = ternary_matmul(x, pack_ternary(codes(N, K), torch.tensor(1.0)))
    assert y.dtype == torch.int32 and y.shape == (M, N)
    assert torch.equal(y.long(), x.long() @ codes(N, K).long().t())


@pytest.mark.parametrize("value", [127, -127, -128])
@pytest.mark.parametrize("K", [4096, 200_001])
def test_extreme_sums_do_not_saturate(value, K):
    """int16 accumulators overflow at K = 258, a float32 sum loses its last bit at K = 131,073."""
    x = torch.full((2, K), value, dtype=torch.int8)
    w = torch.ones(3, K, dtype=torch.int8)
    w[1], w[2, ::2] = -1, 0
    y = ternary_matmul(x, pack_ternary(w, torch.tensor(1.0)))
    assert y.tolist() == [[value * K, -value * K, value * (K // 2)]] * 2


def test_autocast_leaves_the_product_exact():
    """As float32 operands of a product the sums would be rounded to 8 bits."""
    x = torch.randint(-128, 128, (7, 130), generator=torch.Generator().manual_seed(1), dtype=torch.int8)
    packed, tokens = pack_ternary(codes(33, 130), torch.tensor(0.5)), x.float()
    with torch.autocast("cpu", torch.bfloat16):
        y, z = ternary_matmul(x, packed), ternary_linear(tokens, packed)
    assert torch.equal(y.long(), x.long() @ codes(33, 130).long().t())
    assert torch.equal(z, ternary_linear(tokens, packed))


@pytest.mark.parametrize("scale", ["mean", "median"])
@pytest.mark.parametrize("shape", [(13,), (6, 13), (2, 3, 13)])
def test_packed_inference_equals_training(shape, scale):
    g = torch.Generator().manual_seed(0)
    w, x, b = torch.randn(5, 13, generator=g), torch.randn(*shape, generator=g), torch.randn(5, generator=g)
    packed = pack_ternary(*quantize_ternary(w, scale=scale))
    y = ternary_linear(x, packed, b)
    assert y.shape == (*shape[:-1], 5)
    torch.testing.assert_close(y, bitlinear(x, w, b, scale=scale))


def test_quantize_ternary_on_a_worked_example():
    w = torch.tensor([[0.1, -0.4, 0.6], [2.0, -3.0, 0.0]])  # mean |w| 6.1 / 6 = 1.0167, lower median 0.4
    for scale, gamma, want in (("mean", 6.1 / 6, [[0, 0, 1], [1, -1, 0]]), ("median", 0.4, [[0, -1, 1], [1, -1, 0]])):
        got, found = quantize_ternary(w, scale=scale)
        assert got.dtype == torch.int8 and got.tolist() == want
        assert found.dtype == torch.float32 and found.item() == pytest.approx(gamma, rel=1e-6)


def test_zero_rows_give_the_bias():
    packed, b = pack_ternary(codes(5, 13), torch.tensor(0.5)), torch.arange(5.0)
    assert torch.equal(ternary_linear(torch.zeros(2, 13), packed, b), b.expand(2, 5))


def test_output_dtype_and_no_gradient():
    x = torch.randn(2, 13, requires_grad=True, dtype=torch.bfloat16)
    y = ternary_linear(x, pack_ternary(codes(5, 13), torch.tensor(0.5)))
    assert y.dtype == torch.bfloat16 and not y.requires_grad


def test_compiles_without_a_graph_break():
    packed, x = pack_ternary(codes(5, 13), torch.tensor(0.5)), torch.randn(2, 13)
    compiled = torch.compile(lambda x: ternary_linear(x, packed), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), ternary_linear(x, packed))


def test_errors_name_the_argument():
    packed, one = pack_ternary(codes(5, 13), torch.tensor(1.0)), torch.tensor(1.0)
    with pytest.raises(ValueError, match=r"torch.float32 \(2, 13\).*int8 \(M, 13\)"):
        ternary_matmul(torch.zeros(2, 13), packed)
    with pytest.raises(ValueError, match=r"\(2, 12\)"):
        ternary_matmul(torch.zeros(2, 12, dtype=torch.int8), packed)
    with pytest.raises(ValueError, match=r"last axis must be 13"):
        ternary_linear(torch.zeros(2, 12), packed)
    with pytest.raises(ValueError, match=r"bias has shape \(4,\)"):
        ternary_linear(torch.zeros(2, 13), packed, torch.zeros(4))
    with pytest.raises(ValueError, match="codes reach 2"):
        pack_ternary(codes(5, 13) * 2, one)
    with pytest.raises(ValueError, match="int8"):
        pack_ternary(codes(5, 13).float(), one)
    with pytest.raises(ValueError, match=r"scale has shape \(2,\)"):
        pack_ternary(codes(5, 13), torch.ones(2))
    with pytest.raises(ValueError, match="'max' is unknown"):
        quantize_ternary(torch.ones(2, 2), scale="max")
    with pytest.raises(ValueError, match="not empty"):
        quantize_ternary(torch.ones(0, 2))
