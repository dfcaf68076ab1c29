"""Softmax attention with hyperbolic position encoding (HoPE)."""

from __future__ import annotations

from typing import Literal

import torch

from .._dispatch import Op, autocast, full_precision
from .._packed import check_cu_seqlens
from . import reference

OP = Op("hope_attention", __package__, {"cuda": ("reference",), "cpu": ("reference",)}, {})


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
    OP.choose(backend, q)
    scale = K**-0.5 if scale is None else scale
    if not isinstance(damping, torch.Tensor):
        damping = torch.full((), damping, dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)
    with full_precision(q):
        return reference.hope_attention(
            q, k, v, damping, base, mode, scale, causal, rotary_heads, rotary_theta, prefix_k, prefix_v, cu_seqlens
        )
