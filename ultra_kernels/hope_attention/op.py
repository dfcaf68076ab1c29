"""Softmax attention with hyperbolic position encoding (HoPE)."""

from __future__ import annotations

from typing import Literal

import torch

from .. import _native
from .._dispatch import Op, autocast, define_differentiable, full_precision, of_all, triton_heads
from .._packed import check_cu_seqlens
from . import reference

MAX_HEAD_DIM = 128  # of the Triton kernels


OP = Op(
    "hope_attention",
    __package__,
    {"cuda": ("triton", "reference"), "cpu": ("native", "reference")},
    {"triton": triton_heads(MAX_HEAD_DIM), "native": of_all(_native.why_not)},
)


def hope_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    base: float = 10000.0,
    damping: float | torch.Tensor = 0.01,
    mode: Literal["per_pair", "global"] = "per_pair",
    scale: float | None = None,
    causal: bool = False,
    rotary_heads: int = 0,
    rotary_theta: float = 10000.0,
    prefix_k: torch.Tensor | None = None,
    prefix_v: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """o_m = Σ_n softmax_n(s_mn) v_n, s_mn = scale · Σ_i e^(-|d| θ'_i) q_i^T [[cosh dθ_i, sinh dθ_i], [sinh, cosh]] k_i.

    Here d = m - n, q_i and k_i are the interleaved pairs (x_2i, x_2i+1), θ_i = base^(-2i/K), and θ'_i = θ_i + damping
    (mode "per_pair") or max θ + damping ("global"), so every term decays with distance. It is computed as decaying
    exponentials alone and is finite at any length. damping >= 0: a number, or a 0-d tensor, which gets a gradient.

    q, k `[B,T,H,K]`, K even, v `[B,T,H,V]`; scale None = K^-0.5. The first `rotary_heads` heads use rotary positions
    with `rotary_theta` instead. prefix_k `[P,H,K]`, prefix_v `[P,H,V]`: keys and values that every sequence sees at
    every row, with no positional factor. causal: n <= m. With cu_seqlens int32 `[num_seqs + 1]`, B is 1 and the
    sequences lie end to end along T. The output has q's dtype.
    Raises ValueError, BackendUnavailable. After Dai et al. 2025 (arXiv:2509.05218), light-cone form.
    """
    if q.dim() != 4 or k.shape != q.shape or v.dim() != 4 or v.shape[:3] != q.shape[:3]:
        raise ValueError(
            "hope_attention: q and k must be [B, T, H, K] and v [B, T, H, V]; got "
            f"{tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    H, K = q.shape[2:]
    if K % 2:
        raise ValueError(f"hope_attention: positions turn pairs of channels, so K must be even, got {K}")
    if mode not in ("per_pair", "global"):
        raise ValueError(f"hope_attention: mode {mode!r} is none of per_pair, global")
    if base < 1:
        raise ValueError(f"hope_attention: base must be at least 1, got {base}")
    if isinstance(damping, torch.Tensor) and damping.dim():
        raise ValueError(f"hope_attention: damping must be a number or 0-d, got {tuple(damping.shape)}")
    if not isinstance(damping, torch.Tensor) and damping < 0:
        raise ValueError(f"hope_attention: damping must be at least 0, got {damping}")
    if not 0 <= rotary_heads <= H:
        raise ValueError(f"hope_attention: rotary_heads must be 0..{H}, the number of heads; got {rotary_heads}")
    if (prefix_k is None) != (prefix_v is None):
        raise ValueError("hope_attention: prefix_k and prefix_v come together; one of them is None")
    if prefix_k is not None and prefix_v is not None:
        P, V = prefix_k.shape[0], v.shape[-1]
        if prefix_k.shape != (P, H, K) or prefix_v.shape != (P, H, V):
            raise ValueError(
                f"hope_attention: prefix_k must be [P, {H}, {K}] and prefix_v [P, {H}, {V}]; got "
                f"{tuple(prefix_k.shape)}, {tuple(prefix_v.shape)}"
            )
        prefix_k, prefix_v = autocast(prefix_k, prefix_v)
    check_cu_seqlens("hope_attention", q, cu_seqlens)
    q, k, v = autocast(q, k, v)
    chosen = OP.choose(backend, q, k, v)
    scale = K**-0.5 if scale is None else scale
    if not isinstance(damping, torch.Tensor):
        damping = torch.full((), damping, dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)
    args = (q, k, v, damping, base, mode, scale, causal, rotary_heads, rotary_theta, prefix_k, prefix_v, cu_seqlens)
    if chosen == "reference":
        with full_precision(q):
            return reference.hope_attention(*args)
    out: torch.Tensor = _forward(*args, chosen)[0]
    return out


def rates(K: int, base: float, mode: str) -> torch.Tensor:
    """What channel c of a key on the left loses per token, without damping, in float64 `[K]`.

    Channels 2i and 2i + 1 are (x_2i + x_2i+1)/√2 and (x_2i - x_2i+1)/√2: light-cone coordinates, in which the pair's
    matrix is diagonal. For a key on the right the two rates of a pair swap.
    """
    theta = base ** (torch.arange(0, K, 2, dtype=torch.float64) / -K)
    top = theta if mode == "per_pair" else theta[:1]
    return torch.stack([top - theta, top + theta], -1).flatten()


def _fake(q, k, v, *options):  # type: ignore[no-untyped-def]
    B, T, H, _ = q.shape
    return q.new_empty(v.shape), q.new_empty((B, H, T), dtype=torch.float32)


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    q, k, v, damping, *ctx.options, prefix_k, prefix_v, cu_seqlens, ctx.backend = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*output, q, k, v, damping, prefix_k, prefix_v, cu_seqlens)


def _gradients(ctx, grad, _):  # type: ignore[no-untyped-def]
    o, lse, q, k, v, damping, *rest = ctx.saved_tensors
    found = _backward(grad, o, lse, ctx.needs_input_grad[3], q, k, v, damping, *ctx.options, *rest, ctx.backend)
    dq, dk, dv, *small = found
    inputs = (damping if ctx.needs_input_grad[3] else None, *rest[:2])
    ddamping, dprefix_k, dprefix_v = (
        None if x is None else g.to(x.dtype) for x, g in zip(inputs, small, strict=True)
    )  # fmt: skip
    return dq, dk, dv, ddamping, *(None for _ in ctx.options), dprefix_k, dprefix_v, None, None


def _backward_fake(grad, o, lse, wants_damping, q, k, v, damping, *rest):  # type: ignore[no-untyped-def]
    *_, prefix_k, prefix_v, _, _ = rest
    return (
        *(x.new_empty(x.shape) for x in (q, k, v)),
        q.new_empty(() if wants_damping else (0,), dtype=torch.float32),
        *(q.new_empty((0,) if x is None else x.shape, dtype=torch.float32) for x in (prefix_k, prefix_v)),
    )


_INPUTS = (
    "Tensor q, Tensor k, Tensor v, Tensor damping, float base, str mode, float scale, bool causal, int rotary_heads, "
    "float rotary_theta, Tensor? prefix_k, Tensor? prefix_v, Tensor? cu_seqlens, str backend"
)
_forward, _backward = define_differentiable(
    # o, and ln of the sum of the exponentials of each row's logits, float32 [B,H,T]
    f"hope_attention({_INPUTS}) -> (Tensor, Tensor)",
    # dq, dk, dv, and in float32 ddamping, dprefix_k and dprefix_v, empty where there is none
    f"hope_attention_backward(Tensor grad, Tensor o, Tensor lse, bool wants_damping, {_INPUTS}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    forward=lambda *args: OP.module(args[-1]).forward(*args[:-1]),
    forward_fake=_fake,
    backward=lambda *args: OP.module(args[-1]).backward(*args[:-1]),
    backward_fake=_backward_fake,
    setup_context=_setup_context,
    gradients=_gradients,
)
