"""Rotary positions against rotation matrices, and their one property: products depend on differences."""

from __future__ import annotations

import math

import pytest
import torch

from ultra_kernels import rotary

F64 = torch.float64


def test_literal_rotation() -> None:
    x = torch.randn(2, 3, 2, 6, dtype=F64)
    positions = torch.tensor([[0, 5, -2], [7, 1, 100]])
    y = rotary(x, positions, theta=50.0)
    for b in range(2):
        for t in range(3):
            for i in range(3):
                a = float(positions[b, t]) * 50.0 ** (-2 * i / 6)
                turn = torch.tensor([[math.cos(a), -math.sin(a)], [math.sin(a), math.cos(a)]], dtype=F64)
                want = x[b, t, :, 2 * i : 2 * i + 2] @ turn.T
                torch.testing.assert_close(y[b, t, :, 2 * i : 2 * i + 2], want, rtol=1e-12, atol=1e-12)


def test_products_depend_on_differences_only() -> None:
    q, k = torch.randn(2, 1, 9, 2, 8, dtype=F64)

    def scores(shift: int) -> torch.Tensor:
        at = torch.arange(9) + shift
        return torch.einsum("bmhk,bnhk->bhmn", rotary(q, at), rotary(k, at))

    torch.testing.assert_close(scores(0), scores(-1234), rtol=1e-11, atol=1e-11)


def test_float32_is_right_at_position_8192_and_half_rounds_once() -> None:
    x = torch.randn(1, 8193, 1, 32)
    at = torch.arange(8193)
    want = rotary(x.double(), at)
    # products of two float32 numbers of size |x| <= 5: a few roundings, no error that grows with the position
    assert (rotary(x, at) - want).abs().max() < 4 * 1.2e-7 * 5
    half = x.bfloat16()
    exact = rotary(half.double(), at)
    assert ((rotary(half, at).double() - exact).abs() <= exact.abs() * 2**-8 + 1e-6).all()


def test_options() -> None:
    x = torch.randn(2, 4, 3, 6)
    at = torch.tensor([3, 1, 4, 1], dtype=torch.int32)
    assert torch.equal(rotary(x, at), rotary(x, at.expand(2, 4)))
    assert torch.equal(rotary(x, torch.zeros(4, dtype=torch.int64)), x)
    inv_freq = 100.0 ** (-torch.arange(0, 6, 2, dtype=F64) / 6)
    torch.testing.assert_close(rotary(x, at, inv_freq=inv_freq), rotary(x, at, theta=100.0))
    strided = x.transpose(1, 3).contiguous().transpose(1, 3)
    assert torch.equal(rotary(strided, at), rotary(x, at))
    assert rotary(x[:, :0], at[:0]).shape == (2, 0, 3, 6)


def test_gradients() -> None:
    x = torch.randn(2, 3, 2, 4, dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: rotary(x, torch.tensor([1, 7, -3])), x)


def test_compiles_without_a_graph_break() -> None:
    x = torch.randn(2, 5, 2, 4, requires_grad=True)
    compiled = torch.compile(lambda x: rotary(x, torch.arange(5)), fullgraph=True, backend="aot_eager")
    got, want = (
        torch.autograd.grad(f(x).square().sum(), x)[0] for f in (compiled, lambda x: rotary(x, torch.arange(5)))
    )
    torch.testing.assert_close(got, want)


def test_errors_say_what_and_where() -> None:
    x = torch.randn(2, 4, 3, 6)
    with pytest.raises(ValueError, match=r"even K, got \(2, 4, 3, 5\)"):
        rotary(x[..., :5], torch.arange(4))
    with pytest.raises(ValueError, match=r"positions must be integers \[4\] or \[2, 4\]"):
        rotary(x, torch.arange(3))
    with pytest.raises(ValueError, match="float32"):
        rotary(x, torch.arange(4.0))
    with pytest.raises(ValueError, match=r"inv_freq has shape \(6,\), must be \(3,\)"):
        rotary(x, torch.arange(4), inv_freq=torch.ones(6))
