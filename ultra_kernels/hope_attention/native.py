"""HoPE attention in C++ (csrc/hope_attention); the contract is in op.py."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F

from .._native import address, contiguous_rows, head_rows, load, sequences
from .._rotations import frequencies, rotations
from .op import rates


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    damping: torch.Tensor,
    base: float,
    mode: str,
    scale: float,
    causal: bool,
    rotary_heads: int,
    rotary_theta: float,
    prefix_k: torch.Tensor | None,
    prefix_v: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(o, ln of the sum of the exponentials of each row's logits)."""
    C_ = load()
    B, T, H, _ = q.shape
    o = torch.empty(v.shape, dtype=q.dtype)
    lse = torch.empty((B, H, T), dtype=torch.float32)
    problem, _keep = _problem(
        q, k, v, damping, base, mode, scale, causal, rotary_heads, rotary_theta, prefix_k, prefix_v, cu_seqlens, lse
    )
    threads = torch.get_num_threads()
    scratch = torch.empty(threads * C_.hope_forward_scratch(problem), dtype=torch.float32)
    C_.hope_forward(problem, head_rows(o), scratch.data_ptr(), threads)
    return o, lse


def backward(
    grad: torch.Tensor,
    o: torch.Tensor,
    lse: torch.Tensor,
    wants_damping: bool,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    damping: torch.Tensor,
    base: float,
    mode: str,
    scale: float,
    causal: bool,
    rotary_heads: int,
    rotary_theta: float,
    prefix_k: torch.Tensor | None,
    prefix_v: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
) -> tuple[torch.Tensor, ...]:
    """Gradients of q, k, v, and in float32 of damping, prefix_k and prefix_v, empty where nobody asks for them."""
    C_ = load()
    H, (K, V), S = q.shape[2], (q.shape[3], v.shape[3]), sequences(q, cu_seqlens)
    P = 0 if prefix_k is None else len(prefix_k)
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype) for x in (q, k, v))
    problem, _keep = _problem(
        q, k, v, damping, base, mode, scale, causal, rotary_heads, rotary_theta, prefix_k, prefix_v, cu_seqlens, lse
    )
    grad = contiguous_rows(grad.to(q.dtype))
    ddamping = torch.empty((S, H) if wants_damping else (0,), dtype=torch.float32)
    dprefix_k, dprefix_v = (torch.empty((S, P, H, width), dtype=torch.float32) for width in (K, V))
    threads = torch.get_num_threads()
    scratch = torch.empty(threads * C_.hope_backward_scratch(problem), dtype=torch.float32)
    C_.hope_backward(
        problem, head_rows(o), head_rows(grad), head_rows(dq), head_rows(dk), head_rows(dv),
        ddamping.data_ptr() if wants_damping else 0, dprefix_k.data_ptr(), dprefix_v.data_ptr(), scratch.data_ptr(),
        threads,
    )  # fmt: skip
    empty = q.new_empty(0, dtype=torch.float32)
    return (
        dq, dk, dv, ddamping.sum() if wants_damping else empty, dprefix_k.sum(0) if P else empty,
        dprefix_v.sum(0) if P else empty,
    )  # fmt: skip


@functools.lru_cache(64)
def _decays(K: int, base: float, mode: str, damping: float) -> tuple[torch.Tensor, ...]:
    """rate, shrink, query, key and damping of HopeTables in csrc/hope_attention/hope_attention.h."""
    C_ = load()
    tile = C_.hope_tile
    own = rates(K, base, mode).expand(1, K)
    own = torch.cat([own, own.unflatten(1, (-1, 2)).flip(-1).flatten(1)])  # [2,K]: both sides
    rate = own + damping
    j = torch.arange(tile, dtype=torch.float64)[:, None]
    tiny = torch.finfo(torch.float32).tiny  # products with subnormal numbers are slow
    shrink = (-j * rate[:, None]).exp()
    query = ((j - tile // 2) * torch.stack([-own[0], own[1]])[:, None]).exp()
    apart = (-j[:, 0] * damping).exp()
    tables = (rate, torch.where(shrink < tiny, 0.0, shrink), query, 1 / query)
    padded = (F.pad(t.float(), (0, -K % C_.hope_columns)).contiguous() for t in tables)
    return *padded, torch.where(apart < tiny, 0.0, apart).float()


def _problem(  # type: ignore[no-untyped-def]
    q, k, v, damping, base, mode, scale, causal, rotary_heads, rotary_theta, prefix_k, prefix_v, cu_seqlens, lse
):
    """The C++ HopeProblem, and the tensors that must outlive it."""
    B, T, H, K = q.shape
    q, k, v = (contiguous_rows(x) for x in (q, k, v))
    borders = None if cu_seqlens is None else cu_seqlens.to(torch.int32).contiguous()  # the checks let int64 pass
    longest = T if borders is None else int(borders.diff().max()) if len(borders) > 1 else 0
    decays = _decays(K, base, mode, float(damping))
    # to the next power of two: packed batches differ in their longest sequence, and tables are kept
    rows = 1 << longest.bit_length()
    turns = rotations(0, rows, frequencies(K, rotary_theta)) if rotary_heads else (None, None)
    prefix = [None if x is None else contiguous_rows(x.to(q.dtype))[None] for x in (prefix_k, prefix_v)]
    problem = load().HopeProblem(
        (B, T, H, K, v.shape[-1], rotary_heads, 0 if prefix_k is None else len(prefix_k)), head_rows(q), head_rows(k),
        head_rows(v), *(head_rows(x) for x in prefix), [address(t) for t in (*decays, *turns)], scale, causal,
        lse.data_ptr(), address(borders), sequences(q, cu_seqlens),
    )  # fmt: skip
    return problem, (q, k, v, borders, decays, turns, prefix, lse)
