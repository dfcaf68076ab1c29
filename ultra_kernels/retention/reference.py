"""Retention in PyTorch, as one product of scores or by chunks; the contract is in op.py."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from .._dispatch import opaque
from .._packed import Group, by_sequence

_PARALLEL_UP_TO = 256


def _fake(q, k, v, log_decay, scale, head_scale, direction, cu_seqlens, initial_state, output_final_state, chunk):  # type: ignore[no-untyped-def]
    S = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    shape = (S, *q.shape[2:], v.shape[3]) if output_final_state else (0,)
    return q.new_empty(v.shape), q.new_empty(shape, dtype=torch.promote_types(q.dtype, torch.float32))


@opaque(
    "retention_reference(Tensor q, Tensor k, Tensor v, Tensor log_decay, float scale, Tensor? head_scale, "
    "str direction, Tensor? cu_seqlens, Tensor? initial_state, bool output_final_state, int? chunk) "
    "-> (Tensor, Tensor)",
    _fake,
)
def retention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor,
    scale: float,
    head_scale: torch.Tensor | None,
    direction: str,
    cu_seqlens: torch.Tensor | None,
    initial_state: torch.Tensor | None,
    output_final_state: bool,
    chunk: int | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`chunk` fixes the chunk length; None chooses it by cost. The state is empty unless it is asked for."""
    wide = torch.promote_types(q.dtype, torch.float32)
    g = log_decay.detach().to(wide)
    start = None if initial_state is None else initial_state.to(wide)
    finals: list[tuple[torch.Tensor, torch.Tensor]] = []  # (which sequences, their states)

    def dense(group: Group, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [S,H,L,...]
        L = q.shape[2]
        o = _chunked(q, k, v, g, direction, chunk or _chunk_length(L))
        begin = None if start is None else start if cu_seqlens is None else start[group.sequences]
        if begin is not None:
            o = o + (q * _power(g, torch.arange(1, L + 1, device=q.device))[..., None]) @ begin
        if output_final_state:
            finals.append((group.sequences, _final_state(k, v, g, begin, group.lengths)))
        return o.transpose(1, 2)

    inputs = _scaled(q.to(wide), scale, head_scale), k.to(wide), v.to(wide)
    if cu_seqlens is None:
        B, T = q.shape[:2]
        o = dense(Group(torch.arange(B, device=q.device), B, T, None), *inputs)
    else:
        o = by_sequence(dense, cu_seqlens, *inputs)
    o = o.to(q.dtype)
    if not output_final_state:
        return o, q.new_empty(0, dtype=wide)
    if cu_seqlens is None:
        return o, finals[0][1]
    S, H, K, V = cu_seqlens.numel() - 1, q.shape[2], q.shape[3], v.shape[3]
    state = q.new_zeros((S, H, K, V), dtype=wide) if start is None else start.clone()  # what empty sequences keep
    for sequences, final in finals:
        state = state.index_copy(0, sequences, final)
    return o, state


def retention_step(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor,
    state: torch.Tensor,
    scale: float,
    head_scale: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    wide = torch.promote_types(q.dtype, torch.float32)
    gamma = log_decay.detach().to(wide).exp()
    update = k.to(wide)[..., :, None] * v.to(wide)[..., None, :]
    state = gamma[:, None, None] * state.to(wide) + update
    # q [B,H,K] is scaled per head as q [B,T,H,K] is
    o = (_scaled(q.to(wide), scale, head_scale)[..., None, :] @ state).squeeze(-2)
    return o.to(q.dtype), state


def _scaled(q: torch.Tensor, scale: float, head_scale: torch.Tensor | None) -> torch.Tensor:
    """q [..., H, K] times a number or one number per head."""
    return q * (scale if head_scale is None else head_scale.to(q.dtype)[:, None])


def _power(g: torch.Tensor, distance: torch.Tensor) -> torch.Tensor:
    """gamma^distance [H, *distance.shape], 0 where distance < 0.

    Powers below the smallest normal number become 0: products with denormal numbers run 50 times slower on CPUs.
    """
    exponent = g.clamp(min=-1e4).view(-1, *[1] * distance.dim()) * distance.to(g.dtype)
    keep = (distance >= 0) & (exponent > math.log(torch.finfo(g.dtype).tiny))
    return torch.where(keep, exponent, -math.inf).exp()


def _chunk_length(L: int) -> int:
    # Longer chunks for very long sequences: the product that carries states between chunks is quadratic in their count.
    return L if L <= _PARALLEL_UP_TO else 64 if L <= 4096 else 256


def _chunked(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, direction: str, C: int
) -> torch.Tensor:
    """q, k, v [S,H,L,...] -> [S,H,L,V]: scores inside chunks of C, between them states [K,V] that decay by gamma^C."""
    L = q.shape[2]
    j = torch.arange(min(C, L), device=q.device)
    gap = j[:, None] - j  # query minus key
    decay = _power(g, {"forward": gap, "backward": -gap, "bidirectional": gap.abs()}[direction])
    if L <= C:
        return ((q @ k.mT) * decay) @ v
    n = -(-L // C)
    if n * C > L:
        q, k, v = (F.pad(x, (0, 0, 0, n * C - L)) for x in (q, k, v))
    q, k, v = (x.unflatten(2, (n, C)) for x in (q, k, v))  # [S,H,n,C,...]
    o = ((q @ k.mT) * decay[:, None]) @ v
    c = torch.arange(n, device=q.device)
    for side in ("forward", "backward"):
        if direction in (side, "bidirectional"):
            # from a key to the end (start, if backward) of its chunk, over whole chunks, then to the query
            leave, enter, between = (
                (C - 1 - j, j + 1, c[:, None] - c - 1) if side == "forward" else (j, C - j, c - c[:, None] - 1)
            )
            states = (k * _power(g, leave)[:, None, :, None]).mT @ v
            carried = _power(C * g, between) @ states.flatten(-2)
            o = o + (q * _power(g, enter)[:, None, :, None]) @ carried.unflatten(-1, states.shape[-2:])
    return o.flatten(2, 3)[:, :, :L]


def _final_state(
    k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, begin: torch.Tensor | None, lengths: torch.Tensor | None
) -> torch.Tensor:
    """[S,H,K,V] after each sequence's own last row."""
    S, _, L, _ = k.shape
    lengths = torch.full((S,), L, device=k.device) if lengths is None else lengths
    left = _power(g, lengths[:, None] - 1 - torch.arange(L, device=k.device)).transpose(0, 1)  # [S,H,L], pads 0
    state = (k * left[..., None]).mT @ v
    return state if begin is None else state + _power(g, lengths).mT[..., None, None] * begin
