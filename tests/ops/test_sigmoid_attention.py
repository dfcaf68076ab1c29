"""Sigmoid attention against its literal formula, its bias per sequence, and its borders."""

from __future__ import annotations

import math

import pytest
import torch

from ultra_kernels import sigmoid_attention

F64 = torch.float64


def inputs(B: int = 2, T: int = 7, H: int = 3, K: int = 4, dtype: torch.dtype = F64):
    g = torch.Generator().manual_seed(B * T + H)
    return tuple(torch.randn(B, T, H, K, generator=g, dtype=F64).to(dtype) for _ in range(3))


def literal(q, k, v, bias, scale, normalize=False, causal=False):
    o = torch.zeros_like(v)
    B, T, H, _ = q.shape
    for b in range(B):
        for h in range(H):
            for m in range(T):
                keys = range(m + 1) if causal else range(T)
                weights = {n: 1 / (1 + math.exp(-(scale * float(q[b, m, h] @ k[b, n, h]) + bias[h]))) for n in keys}
                total = sum(weights.values()) + 1e-6 if normalize else 1.0
                for n, w in weights.items():
                    o[b, m, h] += w / total * v[b, n, h]
    return o


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("options", [{}, {"bias": -1.5}, {"bias": "heads"}, {"normalize": True}, {"scale": 2.0}])
def test_literal_sum(options, causal: bool) -> None:
    q, k, v = inputs()
    heads = [-1.0, 0.0, 2.5]
    bias = {None: [-math.log(7)] * 3, "heads": heads}.get(options.get("bias"), [options.get("bias")] * 3)
    if options.get("normalize"):
        bias = [0.0] * 3
    want = literal(q, k, v, bias, options.get("scale", 0.5), options.get("normalize", False), causal)
    given = options | ({"bias": torch.tensor(heads, dtype=F64)} if options.get("bias") == "heads" else {})
    torch.testing.assert_close(sigmoid_attention(q, k, v, causal=causal, **given), want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("options", [{}, {"bias": -2.0}, {"normalize": True}, {"causal": True}])
@pytest.mark.parametrize("lengths", [[20, 0, 3, 33, 1, 0], [16, 16]])
def test_packed_sequences_are_alone(options, lengths: list[int]) -> None:
    """With values and gradients; the bias is -ln n of the sequence's own n."""
    leaves = [x.requires_grad_() for x in inputs(B=1, T=sum(lengths))]
    cu = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    packed = sigmoid_attention(*leaves, cu_seqlens=cu, **options)
    alone = torch.cat(
        [sigmoid_attention(*p, **options) for p in zip(*(x.split(lengths, 1) for x in leaves), strict=True)], 1
    )
    torch.testing.assert_close(packed, alone, rtol=1e-12, atol=1e-12)
    cotangent = torch.randn_like(packed)
    for a, b in zip(*(torch.autograd.grad(o, leaves, cotangent) for o in (packed, alone)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_small_weights_keep_their_relative_accuracy() -> None:
    """With v = 1 and zero logits each row sums to n·sigmoid(-ln n) = n/(n+1), which half precision would lose."""
    n = 4096
    q = torch.zeros(1, n, 1, 2)
    o = sigmoid_attention(q, q, torch.ones(1, n, 1, 1))
    torch.testing.assert_close(o, torch.full_like(o, n / (n + 1)), rtol=1e-5, atol=0)
    half = sigmoid_attention(*(x.bfloat16() for x in (q, q, torch.ones(1, n, 1, 1))))
    torch.testing.assert_close(half, o.bfloat16())


def test_gradcheck() -> None:
    leaves = [x.requires_grad_() for x in (*inputs(B=1, T=6, H=2, K=3), torch.tensor([-1.0, 0.5], dtype=F64))]
    cu = torch.tensor([0, 2, 6], dtype=torch.int32)

    def f(q, k, v, bias):
        return sigmoid_attention(q, k, v, bias=bias, causal=True, cu_seqlens=cu)

    assert torch.autograd.gradcheck(f, leaves) and torch.autograd.gradgradcheck(f, leaves)

    def normalized(q, k, v):
        return sigmoid_attention(q, k, v, normalize=True, cu_seqlens=cu)

    assert torch.autograd.gradcheck(normalized, leaves[:3])


def test_no_tokens() -> None:
    q, k, v = inputs(B=1, T=0)
    assert sigmoid_attention(q, k, v).shape == v.shape
    assert sigmoid_attention(q, k, v, cu_seqlens=torch.zeros(3, dtype=torch.int32)).shape == v.shape


def test_compiles_without_a_graph_break() -> None:
    leaves = [x.requires_grad_() for x in inputs(dtype=torch.float32)]
    compiled = torch.compile(lambda *a: sigmoid_attention(*a), fullgraph=True, backend="aot_eager")
    eager = torch.autograd.grad(sigmoid_attention(*leaves).square().sum(), leaves)
    for a, b in zip(eager, torch.autograd.grad(compiled(*leaves).square().sum(), leaves), strict=True):
        torch.testing.assert_close(a, b)


def test_errors_say_what_and_where() -> None:
    q, k, v = inputs()
    with pytest.raises(ValueError, match="normalize=True uses no bias"):
        sigmoid_attention(q, k, v, normalize=True, bias=-1.0)
    with pytest.raises(ValueError, match=r"bias has shape \(2,\), must be \(3,\)"):
        sigmoid_attention(q, k, v, bias=torch.zeros(2))
    with pytest.raises(ValueError, match="q, k and v must be"):
        sigmoid_attention(q, k[..., :2], v)
    with pytest.raises(ValueError, match="batch size must be 1"):
        sigmoid_attention(q, k, v, cu_seqlens=torch.tensor([0, 7], dtype=torch.int32))


def test_a_single_token_has_no_bias() -> None:
    """b = -ln 1 = 0: o = sigmoid(q·k / sqrt(K)) v."""
    q, k, v = torch.randn(3, 1, 1, 1, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(sigmoid_attention(q, k, v), torch.sigmoid((q * k).sum(-1, keepdim=True) / 2) * v)
