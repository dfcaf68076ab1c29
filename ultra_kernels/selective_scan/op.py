"""The selective scan of Mamba (S6)."""

from __future__ import annotations

import torch

from .._dispatch import Op
from . import reference

OP = Op("selective_scan", __package__, {"cuda": ("reference",), "cpu": ("reference",)}, {})


def selective_scan(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    delta_bias: torch.Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    *,
    direction: str = "forward",
    cu_seqlens: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """h_t = exp(Δ_t A) h_{t−1} + Δ_t B_t u_t from h = 0, y_t = C_t · h_t, out = (y + D u) · silu(z), in float32.

    u, delta, z `[B,D,L]`; A `[D,N]` real; B, C `[B,N,L]`, or `[B,G,N,L]` where channel d reads group d // (D/G);
    D, delta_bias `[D]`. Δ = delta + delta_bias, with delta_softplus its softplus. direction "backward" reads the time
    axis from its end: the forward scan of the flipped inputs, flipped back. cu_seqlens int32 `[num_seqs + 1]` (B = 1):
    h starts from 0 in every sequence.

    Returns out (u's shape and dtype) or, with return_last_state, (out, last_state): float32 h after the last step read,
    `[B,D,N]`, with cu_seqlens `[num_seqs,D,N]`. Drop-in for mamba-ssm's selective_scan_fn with B, C varying in time.
    Raises ValueError, BackendUnavailable. After Gu & Dao 2023 (arXiv:2312.00752).
    """
    check_scan("selective_scan", u, delta, A, B, C, D, z, delta_bias, cu_seqlens)
    if direction not in ("forward", "backward"):
        raise ValueError(f"selective_scan: direction is {direction!r}; it must be 'forward' or 'backward'")
    OP.choose(backend, u)
    out, last = reference.selective_scan(
        u, delta, A, B, C, D, z, delta_bias, delta_softplus, direction, cu_seqlens
    )
    return (out, last) if return_last_state else out


def check_scan(
    op: str,
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    z: torch.Tensor | None,
    delta_bias: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    directions: tuple[int, ...] = (),
) -> None:
    """Raises ValueError unless the shapes fit together; `directions` is the leading shape of the doubled arguments."""
    if u.dim() != 3:
        raise ValueError(f"{op}: u has shape {tuple(u.shape)}; it must be [B,D,L]")
    batch, channels, length = u.shape
    if A.dim() != 2 + len(directions) or A.is_complex():
        raise ValueError(f"{op}: A is {A.dtype} of shape {tuple(A.shape)}; it must be real {[*directions, 'D', 'N']}")
    states = A.shape[-1]
    wanted: list[tuple[str, torch.Tensor | None, tuple[int, ...]]] = [
        ("delta", delta, (*directions, batch, channels, length)),
        ("A", A, (*directions, channels, states)),
        ("D", D, (channels,)),
        ("z", z, (batch, channels, length)),
        ("delta_bias", delta_bias, (*directions, channels)),
    ]
    for name, M in (("B", B), ("C", C)):
        grouped = (M.shape[-3],) if not directions and M.dim() == 4 else ()
        if grouped and (grouped[0] == 0 or channels % grouped[0]):
            raise ValueError(f"{op}: {name} has {grouped[0]} groups, which do not divide the {channels} channels of u")
        wanted.append((name, M, (*directions, batch, *grouped, states, length)))
    for name, tensor, shape in wanted:
        if tensor is not None and tensor.shape != shape:
            raise ValueError(
                f"{op}: {name} has shape {tuple(tensor.shape)}; with u {tuple(u.shape)} and N {states} it must be {shape}"
            )
    check_cu_seqlens(op, "u", u, cu_seqlens)


def check_cu_seqlens(op: str, name: str, x: torch.Tensor, cu_seqlens: torch.Tensor | None) -> None:
    """Raises ValueError unless cu_seqlens is absent or int32 `[num_seqs + 1]` beside an x of batch size 1."""
    if cu_seqlens is None:
        return
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.dim() != 1 or not len(cu_seqlens):
        raise ValueError(
            f"{op}: cu_seqlens is {cu_seqlens.dtype} of shape {tuple(cu_seqlens.shape)}; it must be int32 [num_seqs + 1]"
        )
    if x.shape[0] != 1:
        raise ValueError(f"{op}: with cu_seqlens the batch size must be 1; {name} has shape {tuple(x.shape)}")
