"""Multi-scale retention: attention without softmax whose scores decay with distance."""

from __future__ import annotations

from typing import Literal, overload

import torch

from .._dispatch import Op, autocast, full_precision
from .._packed import check_cu_seqlens
from . import reference

Direction = Literal["forward", "backward", "bidirectional"]

OP = Op("retention", __package__, {"cuda": ("reference",), "cpu": ("reference",)}, {})
STEP = Op("retention_step", __package__, {"cuda": ("reference",), "cpu": ("reference",)}, {})


@overload
def retention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor,
    *,
    scale: float | torch.Tensor | None = None,
    direction: Direction = "bidirectional",
    cu_seqlens: torch.Tensor | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: Literal[False] = False,
    chunk_size: int | None = None,
    backend: str | None = None,
) -> torch.Tensor: ...


@overload
def retention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor,
    *,
    scale: float | torch.Tensor | None = None,
    direction: Direction = "bidirectional",
    cu_seqlens: torch.Tensor | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: Literal[True],
    chunk_size: int | None = None,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]: ...


def retention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor,
    *,
    scale: float | torch.Tensor | None = None,
    direction: Direction = "bidirectional",
    cu_seqlens: torch.Tensor | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    chunk_size: int | None = None,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """o_n = scale · Σ_m gamma_h^|n-m| (q_n·k_m) v_m over m <= n (forward), m >= n (backward) or all m (bidirectional).

    q, k `[B,T,H,K]`, v `[B,T,H,V]`; log_decay `[H]` = ln gamma <= 0, without gradient; scale None = K^-0.5, a number,
    or a tensor `[H]`. With cu_seqlens int32 `[num_seqs + 1]`, B is 1 and the sequences lie end to end along T.
    Forward only: initial_state `[num_seqs,H,K,V]` is S_0 in S_n = gamma S_{n-1} + k_n v_n^T, o_n = scale · q_n^T S_n,
    and output_final_state returns (o, S_T), float32 or wider. o has q's dtype. chunk_size asks for
    the chunkwise form with chunks of that length, None chooses by cost; the result differs in rounding alone.
    Raises ValueError, BackendUnavailable. After Sun et al. 2023 (arXiv:2307.08621).
    """
    if direction not in ("forward", "backward", "bidirectional"):
        raise ValueError(f"retention: direction {direction!r} is none of forward, backward, bidirectional")
    if q.dim() != 4 or k.shape != q.shape or v.dim() != 4 or v.shape[:3] != q.shape[:3]:
        raise ValueError(
            "retention: q and k must be [B, T, H, K] and v [B, T, H, V]; got "
            f"{tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    B, _, H, K = q.shape
    _check_heads(H, log_decay, scale)
    check_cu_seqlens("retention", q, cu_seqlens)
    if direction != "forward" and (initial_state is not None or output_final_state):
        raise ValueError(f"retention: a state needs direction='forward', got {direction!r}")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"retention: chunk_size is {chunk_size}; it must be at least 1")
    want = (B if cu_seqlens is None else cu_seqlens.numel() - 1, H, K, v.shape[-1])
    if initial_state is not None and initial_state.shape != want:
        raise ValueError(f"retention: initial_state has shape {tuple(initial_state.shape)}, must be {want}")
    q, k, v = autocast(q, k, v)
    OP.choose(backend, q)
    with full_precision(q):
        o, state = reference.retention(
            q, k, v, log_decay, *_scales(K, scale), direction, cu_seqlens, initial_state, output_final_state, chunk_size
        )
    return (o, state) if output_final_state else o


def retention_step(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor,
    state: torch.Tensor,
    *,
    scale: float | torch.Tensor | None = None,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token of forward retention: S' = gamma_h S + k v^T, o = scale · q^T S'; returns (o, S').

    q, k `[B,H,K]`, v `[B,H,V]`, log_decay `[H]` (no gradient), state `[B,H,K,V]`; scale as in `retention`. o has q's
    dtype, S' is float32 or wider. Raises ValueError, BackendUnavailable. After Sun et al. 2023 (arXiv:2307.08621).
    """
    if q.dim() != 3 or k.shape != q.shape or v.dim() != 3 or v.shape[:2] != q.shape[:2]:
        raise ValueError(
            "retention_step: q and k must be [B, H, K] and v [B, H, V]; got "
            f"{tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    _check_heads(q.shape[1], log_decay, scale)
    if state.shape != (*q.shape, v.shape[-1]):
        raise ValueError(f"retention_step: state has shape {tuple(state.shape)}, must be {(*q.shape, v.shape[-1])}")
    q, k, v = autocast(q, k, v)
    STEP.choose(backend, q)
    with full_precision(q):
        return reference.retention_step(q, k, v, log_decay, state, *_scales(q.shape[2], scale))


def _scales(K: int, scale: float | torch.Tensor | None) -> tuple[float, torch.Tensor | None]:
    """The factor of all heads, and one of each head where there are such."""
    return (1.0, scale) if isinstance(scale, torch.Tensor) else (K**-0.5 if scale is None else scale, None)


def _check_heads(H: int, log_decay: torch.Tensor, scale: float | torch.Tensor | None) -> None:
    for name, x in (("log_decay", log_decay), ("scale", scale)):
        if isinstance(x, torch.Tensor) and x.shape != (H,):
            raise ValueError(f"retention: {name} has shape {tuple(x.shape)}, must be ({H},)")
