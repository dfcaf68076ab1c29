"""HoPE attention against the paper's hyperbolic matrices, its limits in length and memory, and its borders."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from ultra_kernels import hope_attention, rotary

F64 = torch.float64


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=F64)


def inputs(B: int = 2, T: int = 9, H: int = 2, K: int = 6):
    return tuple(rand(B, T, H, K, seed=s) for s in range(3))


def literal(q, k, v, base=10000.0, damping=0.01, mode="per_pair", causal=False, scale=None):
    """cosh and sinh as in the paper: fine in float64 at short lengths only."""
    T, K = q.shape[1], q.shape[3]
    theta = base ** (-torch.arange(0, K, 2, dtype=F64) / K)
    rate = theta + damping if mode == "per_pair" else theta.max() + damping
    d = (torch.arange(T)[:, None] - torch.arange(T)).to(F64)[..., None]
    c, s = (torch.exp(-d.abs() * rate) * f(d * theta) for f in (torch.cosh, torch.sinh))
    q1, q2, k1, k2 = q[..., 0::2], q[..., 1::2], k[..., 0::2], k[..., 1::2]

    def form(a, b, factor):
        return torch.einsum("bmhi,bnhi,mni->bhmn", a, b, factor)

    logits = (form(q1, k1, c) + form(q2, k2, c) + form(q1, k2, s) + form(q2, k1, s)) * (scale or K**-0.5)
    if causal:
        logits = logits.masked_fill(d[..., 0] < 0, -math.inf)
    return torch.einsum("bhmn,bnhv->bmhv", logits.softmax(-1), v)


@pytest.mark.parametrize("T", [1, 2, 31, 32, 33, 65, 130])
@pytest.mark.parametrize("mode", ["per_pair", "global"])
@pytest.mark.parametrize("causal", [False, True])
def test_the_papers_matrices(T: int, mode: str, causal: bool) -> None:
    """With all gradients; the lengths cover one tile, uneven halves and two levels of halving."""
    leaves = [x.requires_grad_() for x in (*inputs(T=T), torch.tensor(0.03, dtype=F64))]
    q, k, v, damping = leaves
    got = hope_attention(q, k, v, damping=damping, mode=mode, causal=causal)
    want = literal(q, k, v, damping=damping, mode=mode, causal=causal)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    cotangent = rand(*got.shape, seed=7)
    if T > 1:
        for a, b in zip(*(torch.autograd.grad(o, leaves, cotangent) for o in (got, want)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_options_reach_the_formula() -> None:
    q, k, v = inputs(T=40)
    for options in ({"base": 10.0}, {"damping": 0.0}, {"damping": 0.5}, {"scale": 1.3}):
        torch.testing.assert_close(
            hope_attention(q, k, v, **options), literal(q, k, v, **options), rtol=1e-10, atol=1e-12
        )


def test_rotary_heads_come_first() -> None:
    q, k, v = inputs(T=40, H=3)
    got = hope_attention(q, k, v, rotary_heads=1, rotary_theta=500.0, causal=True)
    turned = [rotary(x[:, :, :1], torch.arange(40), theta=500.0).transpose(1, 2) for x in (q, k)]
    plain = F.scaled_dot_product_attention(*turned, v[:, :, :1].transpose(1, 2), is_causal=True)
    torch.testing.assert_close(got[:, :, :1], plain.transpose(1, 2))
    torch.testing.assert_close(got[:, :, 1:], hope_attention(q[:, :, 1:], k[:, :, 1:], v[:, :, 1:], causal=True))
    assert not torch.allclose(got[:, :, :1], hope_attention(q[:, :, :1], k[:, :, :1], v[:, :, :1], causal=True))


@pytest.mark.parametrize("rotary_heads", [0, 2])
@pytest.mark.parametrize("causal", [False, True])
def test_prefix_is_seen_by_all_and_has_no_position(rotary_heads: int, causal: bool) -> None:
    """A softmax over both parts is the mean of the two attentions, weighted by their sums of exponentials."""
    T, P = 34, 3
    q, k, v = inputs(T=T)
    pk, pv = rand(P, 2, 6, seed=5), rand(P, 2, 6, seed=6)
    got = hope_attention(q, k, v, rotary_heads=rotary_heads, causal=causal, prefix_k=pk, prefix_v=pv)
    ones = torch.ones_like(v[..., :1])
    # recover the sum of exponentials of the sequence's own part by adding one prefix key of logit 0
    zero_k, one_v = torch.zeros(1, 2, 6, dtype=F64), torch.ones(1, 2, 1, dtype=F64)
    share = hope_attention(q, k, 0 * ones, rotary_heads=rotary_heads, causal=causal, prefix_k=zero_k, prefix_v=one_v)
    own_sum = 1 / share - 1
    own = hope_attention(q, k, v, rotary_heads=rotary_heads, causal=causal)
    weights = torch.einsum("bmhk,phk->bmhp", q, pk).mul(6**-0.5).exp()
    want = (own * own_sum + torch.einsum("bmhp,phv->bmhv", weights, pv)) / (own_sum + weights.sum(-1, keepdim=True))
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"rotary_heads": 1}, {"prefix": True, "rotary_heads": 1}])
@pytest.mark.parametrize("lengths", [[20, 0, 3, 40, 1, 0], [17, 17]])
def test_packed_sequences_are_alone(options, lengths: list[int]) -> None:
    """With values and every gradient, among them those of damping and prefix."""
    leaves = [x.requires_grad_() for x in (*inputs(B=1, T=sum(lengths)), torch.tensor(0.03, dtype=F64))]
    options = dict(options)
    if options.pop("prefix", False):
        leaves += [rand(2, 2, 6, seed=s).requires_grad_() for s in (5, 6)]
        options |= {"prefix_k": leaves[4], "prefix_v": leaves[5]}
    cu = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    packed = hope_attention(*leaves[:3], damping=leaves[3], cu_seqlens=cu, **options)
    parts = zip(*(x.split(lengths, 1) for x in leaves[:3]), strict=True)
    alone = torch.cat([hope_attention(*p, damping=leaves[3], **options) for p in parts], 1)
    torch.testing.assert_close(packed, alone, rtol=1e-11, atol=1e-12)
    cotangent = rand(*packed.shape, seed=9)
    for a, b in zip(*(torch.autograd.grad(o, leaves, cotangent) for o in (packed, alone)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


def test_gradcheck() -> None:
    """Beyond one tile, masked and unmasked."""
    leaves = [x.requires_grad_() for x in (*inputs(B=1, T=35, H=1, K=2), torch.tensor(0.1, dtype=F64))]
    for causal in (False, True):

        def f(q, k, v, damping, causal=causal):
            return hope_attention(q, k, v, damping=damping, causal=causal)

        assert torch.autograd.gradcheck(f, leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("mode", ["per_pair", "global"])
def test_finite_and_right_at_length_4096(dtype: torch.dtype, mode: str) -> None:
    q, k, v = (x.to(dtype) for x in inputs(B=1, T=4096, H=1, K=8))
    leaves = [x.requires_grad_() for x in (q * 3, k * 3, v)]
    o = hope_attention(*leaves, mode=mode)
    grads = torch.autograd.grad(o.float().square().sum(), leaves)
    assert o.dtype == dtype and all(torch.isfinite(x).all() for x in (o, *grads))
    # row 4000 by the exponentials alone, in float64
    theta = 10000.0 ** (-torch.arange(0, 8, 2, dtype=F64) / 8)
    rate = theta + 0.01 if mode == "per_pair" else theta.max() + 0.01
    d = (4000 - torch.arange(4096)).to(F64)[:, None]
    near, far = torch.exp(-d.abs() * (rate - theta)), torch.exp(-d.abs() * (rate + theta))
    c, s = (near + far) / 2, d.sign() * (near - far) / 2
    row, keys = leaves[0][0, 4000, 0].double(), leaves[1][0, :, 0].double()
    logits = (row[0::2] * keys[:, 0::2] + row[1::2] * keys[:, 1::2]) * c
    logits += (row[0::2] * keys[:, 1::2] + row[1::2] * keys[:, 0::2]) * s
    want = (logits.sum(-1) * 8**-0.5).softmax(0) @ leaves[2][0, :, 0].double()
    eps = torch.finfo(dtype).eps
    # logits reach 40: their float32 rounding is what a weight sees
    torch.testing.assert_close(o[0, 4000, 0].double(), want, rtol=2 * eps, atol=40 * 1.2e-7 * 4 + eps)


def test_no_tensor_is_larger_than_the_scores() -> None:
    B, T, H, K = 1, 256, 2, 64
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, tuple | list) else (out,):
                if isinstance(x, torch.Tensor):
                    largest = max(largest, x.untyped_storage().nbytes() // x.element_size())
            return out

    leaves = [torch.randn(B, T, H, K, requires_grad=True) for _ in range(3)]
    with Watch():
        damping = torch.tensor(0.01, requires_grad=True)
        hope_attention(*leaves, damping=damping, backend="reference").sum().backward()
    assert B * H * T * T <= largest <= B * H * T * T + T * K


def test_no_tokens() -> None:
    q, k, v = inputs(B=1, T=0)
    assert hope_attention(q, k, v, rotary_heads=1).shape == v.shape
    assert hope_attention(q, k, v, cu_seqlens=torch.zeros(3, dtype=torch.int32)).shape == v.shape


def test_compiles_without_a_graph_break() -> None:
    leaves = [x.float().requires_grad_() for x in inputs(T=40)]

    def f(q, k, v):
        return hope_attention(q, k, v, rotary_heads=1)

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    eager = torch.autograd.grad(f(*leaves).square().sum(), leaves)
    for a, b in zip(eager, torch.autograd.grad(compiled(*leaves).square().sum(), leaves), strict=True):
        torch.testing.assert_close(a, b)


def test_errors_say_what_and_where() -> None:
    q, k, v = inputs()
    with pytest.raises(ValueError, match="K must be even, got 5"):
        hope_attention(q[..., :5], k[..., :5], v)
    with pytest.raises(ValueError, match="mode 'local'"):
        hope_attention(q, k, v, mode="local")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"rotary_heads must be 0\.\.2"):
        hope_attention(q, k, v, rotary_heads=3)
    with pytest.raises(ValueError, match="come together"):
        hope_attention(q, k, v, prefix_k=torch.zeros(1, 2, 6))
    with pytest.raises(ValueError, match=r"prefix_k must be \[P, 2, 6\]"):
        hope_attention(q, k, v, prefix_k=torch.zeros(1, 3, 6), prefix_v=torch.zeros(1, 2, 6))
    with pytest.raises(ValueError, match="damping must be at least 0, got -1"):
        hope_attention(q, k, v, damping=-1)
    with pytest.raises(ValueError, match="0-d"):
        hope_attention(q, k, v, damping=torch.zeros(2))
    with pytest.raises(ValueError, match="base"):
        hope_attention(q, k, v, base=0.5)
