"""The selective scan in PyTorch, a plain loop over time; the contract is in op.py."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F

from .._dispatch import opaque


def _fake(u, delta, A, B, C, D, z, delta_bias, delta_softplus, direction, cu_seqlens):  # type: ignore[no-untyped-def]
    sequences = u.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return u.new_empty(u.shape), u.new_empty(sequences, *A.shape, dtype=torch.promote_types(u.dtype, torch.float32))


@opaque(
    "selective_scan_reference(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, "
    "Tensor? delta_bias, bool delta_softplus, str direction, Tensor? cu_seqlens) -> (Tensor, Tensor)",
    _fake,
)
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
    direction: str = "forward",
    cu_seqlens: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, last_state)."""
    y, last = scan(u, delta, A, B, C, delta_bias, delta_softplus, direction, cu_seqlens)
    return finish(y, u, D, z), last


def scan(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    delta_bias: torch.Tensor | None,
    delta_softplus: bool,
    direction: str,
    cu_seqlens: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(C_t · h_t `[B,D,L]`, the last h of every sequence), both float32 or wider."""
    wide = torch.promote_types(u.dtype, torch.float32)
    u, delta, A, B, C = (t.to(wide) for t in (u, delta, A, B, C))
    if delta_bias is not None:
        delta = delta + delta_bias.to(wide)[:, None]
    if delta_softplus:
        delta = F.softplus(delta)
    batch, channels, length = u.shape
    if B.dim() == 3:
        B = B.unsqueeze(1)
    if C.dim() == 3:
        C = C.unsqueeze(1)
    per_group = channels // B.shape[1], channels // C.shape[1]
    ys: list[torch.Tensor] = [u.new_empty(0)] * length
    states = []
    for begin, end in borders(cu_seqlens, length):
        h = u.new_zeros(batch, channels, A.shape[1])
        for t in range(begin, end) if direction == "forward" else range(end - 1, begin - 1, -1):
            dt = delta[:, :, t, None]
            B_t, C_t = (M[..., t].repeat_interleave(n, 1) for M, n in zip((B, C), per_group, strict=True))
            h = torch.exp(dt * A) * h + dt * u[:, :, t, None] * B_t
            ys[t] = (h * C_t).sum(-1)
        states.append(h)
    y = torch.stack(ys, -1) if length else torch.zeros_like(u)
    return y, torch.cat(states) if states else u.new_zeros(0, channels, A.shape[1])


def finish(y: torch.Tensor, u: torch.Tensor, D: torch.Tensor | None, z: torch.Tensor | None) -> torch.Tensor:
    """(y + D u) · silu(z) in u's dtype."""
    if D is not None:
        y = y + D.to(y.dtype)[:, None] * u.to(y.dtype)
    if z is not None:
        y = y * F.silu(z.to(y.dtype))
    return y.to(u.dtype)


def borders(cu_seqlens: torch.Tensor | None, length: int) -> list[tuple[int, int]]:
    """(begin, end) of every sequence; the whole axis without cu_seqlens. Raises ValueError."""
    if cu_seqlens is None:
        return [(0, length)]
    cu = cu_seqlens.tolist()
    spans = list(itertools.pairwise(cu))
    if cu[0] != 0 or cu[-1] != length or any(begin > end for begin, end in spans):
        raise ValueError(f"cu_seqlens must rise from 0 to the length {length}; got {cu[:8]} (first 8)")
    return spans
