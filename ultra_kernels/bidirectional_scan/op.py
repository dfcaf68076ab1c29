"""Two selective scans over the same sequence, one per direction, joined in one pass."""

from __future__ import annotations

import torch

from .._dispatch import Op
from ..selective_scan.op import check_scan
from . import reference

OP = Op("bidirectional_scan", __package__, {"cuda": ("reference",), "cpu": ("reference",)}, {})


def bidirectional_scan(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    delta_bias: torch.Tensor | None = None,
    delta_softplus: bool = False,
    *,
    shift: bool = True,
    cu_seqlens: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """out_t = (s_f(t−1) + s_b(t+1) + D u_t) · silu(z_t), s_f and s_b the forward and backward selective scans of u.

    u, z `[B,D,L]`; delta `[2,B,D,L]`, A `[2,D,N]`, B, C `[2,B,N,L]`, delta_bias `[2,D]`: index 0 reads forwards, index 1
    backwards; D `[D]`. s = 0 outside its sequence, so D alone ties an output to the input at its own position.
    shift=False joins s_f(t) + s_b(t) instead. Each scan, Δ and cu_seqlens are those of `selective_scan`, without a gate.
    Returns out in u's shape and dtype. Raises ValueError, BackendUnavailable.
    The quasi-separable form of Hwang et al. 2024 (Hydra, arXiv:2407.09941).
    """
    check_scan("bidirectional_scan", u, delta, A, B, C, D, z, delta_bias, cu_seqlens, (2,))
    OP.choose(backend, u)
    return reference.bidirectional_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, shift, cu_seqlens)
