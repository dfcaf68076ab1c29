"""The Triton kernels of BitLinear under the interpreter: quantisers to the last bit, every tile, long rows."""

from __future__ import annotations

import os

import pytest
import torch

from ultra_kernels import bitlinear, quantize_ternary
from ultra_kernels._testing import compare, run, widened
from ultra_kernels.bitlinear.cases import grid_tokens, ternary_weights, tokens_at_ties
from ultra_kernels.bitlinear.reference import quantize_tokens, quantize_weight, rms_norm

pytest.importorskip("triton")
interpreted = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1")


def kernels():
    from ultra_kernels.bitlinear import triton_kernels

    return triton_kernels


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@interpreted
@pytest.mark.parametrize("K", [1, 63, 1024, 1100])
def test_tokens_to_the_last_bit(K: int) -> None:
    """Those of the definition, ties among them; 1100 columns are more than a program has at once."""
    x = draw(40, K)
    x[1, : K // 2] = (torch.arange(K // 2) % 127 + 0.5) * (-1.0) ** torch.arange(K // 2)
    x[1, -1] = 127.0  # so that a code is a tie
    x[2], x[3, 0] = 0.0, 3e-6
    codes, step, rstd = kernels().quantize_tokens(x)
    want, want_step = quantize_tokens(x)
    assert codes.dtype == torch.int8 and torch.equal(codes.float(), want)
    assert torch.equal(step, want_step[:, 0]) and rstd.shape == (0,)


@interpreted
def test_tokens_at_ties() -> None:
    x = tokens_at_ties(torch.Generator().manual_seed(0), 30)
    assert torch.equal(kernels().quantize_tokens(x)[0].float(), quantize_tokens(x)[0])


@interpreted
@pytest.mark.parametrize("K", [17, 1100])
def test_tokens_after_the_norm(K: int) -> None:
    x, gain = draw(20, K), draw(K, seed=1)
    codes, step, rstd = kernels().quantize_tokens(x, gain)
    normal = rms_norm(x.double(), gain.double())
    torch.testing.assert_close(rstd.double(), (x.double().square().mean(-1) + 1e-6).rsqrt(), rtol=1e-6, atol=0)
    torch.testing.assert_close(step.double(), quantize_tokens(normal)[1][:, 0], rtol=1e-6, atol=0)
    # a code errs by half a step, and by what float32 moves a product of 127
    assert ((codes * step[:, None]).double() - normal).abs().div(step[:, None]).max() <= 0.5 + 1e-4


@interpreted
def test_order_of_slots() -> None:
    """16 columns as PackedTernary has them, 128 at a time; zeros beyond the last."""
    x = draw(3, 150)
    codes, _, totals = kernels().quantize_tokens(x, panels=True)
    plain = torch.nn.functional.pad(quantize_tokens(x)[0], (0, 256 - 150))
    want = torch.zeros(3, 256)
    for k in range(256):
        group, block, slot, i = k // 128, k % 128 // 16, k % 16 // 4, k % 4
        want[:, 128 * group + 32 * slot + 4 * block + i] = plain[:, k]
    assert torch.equal(codes.float(), want)
    assert totals.dtype == torch.int32 and torch.equal(totals.float(), plain.sum(1))


@interpreted
@pytest.mark.parametrize("scale", ["mean", "median"])
def test_weights_around_a_half(scale: str) -> None:
    """w / (γ + 1e-5) at a half, which rounds to 0, and the floats beside it."""
    for gamma in (1.0, 0.7371, 3e-5, 1e-7):
        d = torch.tensor(gamma) + 1e-5
        near = d / 2
        up, down = torch.nextafter(near, torch.tensor(9.0)), torch.nextafter(near, torch.tensor(0.0))
        around = torch.stack([near, up, down, -near, -up, -down, d, torch.tensor(0.0), torch.tensor(gamma)])
        if scale == "median":  # γ is its middle value
            weight = torch.cat([around, torch.full((40,), gamma)]).view(7, 7)
        else:  # what makes γ the mean, exactly or nearly
            weight = torch.cat([around, 2 * gamma - around.abs()]).view(6, 3)
        codes, found = quantize_ternary(weight, scale=scale, backend="triton")
        torch.testing.assert_close(found, quantize_weight(weight, scale)[1], rtol=2e-7, atol=0)
        want = (weight / (found + 1e-5)).round().clamp(-1, 1)
        assert torch.equal(codes.float(), want), gamma


@interpreted
def test_sums_of_magnitudes_in_many_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """3 programs of two blocks and a rest; the last stops where the weight does."""
    monkeypatch.setattr(kernels(), "MAX_PARTS", 4)
    monkeypatch.setattr(kernels(), "FLAT", 64)
    weight = draw(61, 7)  # 427 = 3 · 128 + 43
    codes, gamma = quantize_ternary(weight, backend="triton")
    torch.testing.assert_close(gamma, weight.abs().mean(), rtol=1e-6, atol=0)
    assert torch.equal(codes.float(), quantize_weight(weight)[0])


def check(
    rows: int, K: int, N: int, dtype: torch.dtype = torch.float32, device: str = "cpu", norm: bool = True
) -> None:
    g = torch.Generator().manual_seed(0)
    gain = 2.0 ** torch.randint(-1, 2, (K,), generator=g).double()
    inputs = {"x": grid_tokens(g, rows, K) / (gain if norm else 1.0), "weight": ternary_weights(g, N, K)}
    inputs |= {"bias": torch.randn(N, generator=g).double()} | ({"norm_weight": gain} if norm else {})
    inputs = {k: v.to(device, dtype).requires_grad_() for k, v in inputs.items()}
    got, want = run(bitlinear, inputs, "triton", dtype), run(bitlinear, widened(inputs), "reference", dtype)
    wrong = compare(got, want, 2 * max(rows, K, N), rounded={"dnorm_weight": dtype})
    assert not wrong, "\n".join(wrong)


@interpreted
@pytest.mark.parametrize(("rows", "K", "N"), [(1, 80, 130), (130, 80, 1), (130, 64, 140), (33, 37, 34), (70, 1100, 20)])
@pytest.mark.parametrize("many", [1, 10**9], ids=["large tiles", "small tiles"])
def test_tiles_and_their_edges(rows: int, K: int, N: int, many: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels(), "MANY_TILES", many)
    check(rows, K, N)


@interpreted
def test_blocks_of_rows_of_the_gain() -> None:
    """150 rows in 3 blocks of 50, each of whole tiles of rows and a part of one; two tiles of columns."""
    check(150, 300, 3)


@interpreted
def test_long_sums_do_not_saturate() -> None:
    """Products of 127 add up to 127 · 4112: more than int16 holds."""
    x, weight = torch.full((2, 4112), 127.0), torch.ones(3, 4112)
    weight[1] = -1
    y = bitlinear(x, weight, backend="triton")
    torch.testing.assert_close(y, bitlinear(x, weight, backend="reference"))
    assert y[0, 0] == 127 * 4112


@interpreted
def test_same_bits_on_every_run() -> None:
    inputs = {"x": draw(70, 33), "weight": draw(20, 33, seed=1), "norm_weight": draw(33, seed=2)}
    inputs = {k: v.requires_grad_() for k, v in inputs.items()}
    first, again = (run(bitlinear, inputs, "triton", torch.float32) for _ in range(2))
    assert [n for n in first if not torch.equal(first[n], again[n])] == []


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize(
    ("rows", "K", "N"), [(1, 80, 130), (130, 64, 1), (33, 37, 34), (70, 1100, 20), (1500, 1040, 1500), (4000, 33, 65)]
)
def test_tiles_and_their_edges_gpu(rows: int, K: int, N: int, dtype: torch.dtype) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    for norm in (False, True):
        check(rows, K, N, dtype, "cuda", norm)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
def test_tokens_to_the_last_bit_gpu(dtype: torch.dtype) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    x = draw(500, 1100).to(dtype)
    x[1, :500] = (torch.arange(500) % 127 + 0.5) * (-1.0) ** torch.arange(500)
    x[1, -1], x[2] = 127.0, 0.0
    ties = tokens_at_ties(torch.Generator().manual_seed(0), 100)
    assert torch.equal(kernels().quantize_tokens(ties.cuda())[0].cpu().float(), quantize_tokens(ties)[0])
    codes, step, _ = kernels().quantize_tokens(x.cuda())
    want, want_step = quantize_tokens(x)
    assert torch.equal(codes.cpu().float(), want) and torch.equal(step.cpu(), want_step[:, 0])
