"""Sigmoid attention: every weight is a sigmoid of its own logit, rows are not normalised."""

from __future__ import annotations

import torch

from .._dispatch import Op, autocast, full_precision
from .._packed import check_cu_seqlens
from . import reference

OP = Op("sigmoid_attention", __package__, {"cuda": ("reference",), "cpu": ("reference",)}, {})


def sigmoid_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float | None = None,
    bias: float | torch.Tensor | None = None,
    normalize: bool = False,
    causal: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """o_m = Σ_n sigmoid(scale · q_m·k_n + b) v_n over all n, or n <= m when causal.

    q, k, v `[B,T,H,K]` (v may have another last dimension); scale None = K^-0.5; bias None: b = -ln n, n the length of
    the sequence (the whole length with causal too), else a number or a tensor `[H]`, which gets a gradient.
    normalize=True has b = 0 and divides every row by the sum of its weights + 1e-6. With cu_seqlens int32
    `[num_seqs + 1]`, B is 1 and the sequences lie end to end along T. The output has q's dtype.
    Raises ValueError, also on normalize with a bias, BackendUnavailable. After Ramapuram et al. 2024 (arXiv:2409.04431)
    """
    if q.dim() != 4 or k.shape != q.shape or v.dim() != 4 or v.shape[:3] != q.shape[:3]:
        raise ValueError(
            "sigmoid_attention: q, k and v must be [B, T, H, K]; got "
            f"{tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    if normalize and bias is not None:
        raise ValueError("sigmoid_attention: normalize=True uses no bias; leave one of the two out")
    if isinstance(bias, torch.Tensor) and bias.shape != (q.shape[2],):
        raise ValueError(f"sigmoid_attention: bias has shape {tuple(bias.shape)}, must be ({q.shape[2]},)")
    check_cu_seqlens("sigmoid_attention", q, cu_seqlens)
    q, k, v = autocast(q, k, v)
    OP.choose(backend, q)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    number, heads = (None, bias) if isinstance(bias, torch.Tensor) else (bias, None)
    with full_precision(q):
        return reference.sigmoid_attention(q, k, v, scale, number, heads, normalize, causal, cu_seqlens)
