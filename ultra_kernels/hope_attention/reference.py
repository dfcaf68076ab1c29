"""Attention with hyperbolic positions in PyTorch; the contract is in op.py.

Logits are exact and need no tensor larger than the [T,T] scores. In light-cone coordinates every channel c of
q_m·k_n carries e^(-r_c |m-n|). The range of positions is halved again and again: queries right of the middle and keys
left of it meet at the middle, e^(-r(m-n)) = e^(-r(m-mid)) e^(-r(mid-n)), so each off-diagonal block is one product of
two operands that only shrank. What remains are diagonal tiles of at most 32 positions, where the same split around the
tile's centre stays within e^(±32).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from .._dispatch import opaque
from .._packed import Group, by_sequence
from ..rotary.reference import rotary

_TILE = 32  # rates are at most 2 per position: e^(2·16) keeps products of both sides within float32


@opaque(
    "hope_attention_reference(Tensor q, Tensor k, Tensor v, Tensor damping, float base, str mode, float scale, "
    "bool causal, int rotary_heads, float rotary_theta, Tensor? prefix_k, Tensor? prefix_v, Tensor? cu_seqlens) "
    "-> Tensor",
    lambda q, k, v, *options: q.new_empty(v.shape),
)
def hope_attention(
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
) -> torch.Tensor:
    wide = torch.promote_types(q.dtype, torch.float32)
    damping = damping.to(wide)
    R = rotary_heads
    prefix = None if prefix_k is None or prefix_v is None else (prefix_k.to(wide), prefix_v.to(wide))

    def dense(group: Group, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        L = q.shape[1]
        pads = group.key_mask()
        parts = []
        if R:
            positions = torch.arange(L, device=q.device)
            turned = (rotary(x[:, :, :R], positions, rotary_theta) for x in (q, k))
            q_r, k_r, v_r = (x.transpose(1, 2) for x in (*turned, v[:, :, :R]))
            masked = _masked(pads, L, causal, q.device)
            if prefix is None:
                allowed = None if masked is None else ~masked
                parts.append(F.scaled_dot_product_attention(q_r, k_r, v_r, attn_mask=allowed, scale=scale))
            else:
                logits = (q_r * scale) @ k_r.mT
                logits = logits if masked is None else logits.masked_fill(masked, -math.inf)
                parts.append(_attend(logits, v_r, q[:, :, :R] * scale, *(p[:, :R] for p in prefix)))
        if q.shape[2] > R:
            q_h, k_h, v_h = (x[:, :, R:].transpose(1, 2) for x in (q, k, v))
            logits = _Logits.apply(_light_cone(q_h, scale), _light_cone(k_h), damping, pads, base, mode, causal)  # type: ignore[no-untyped-call]
            rest = () if prefix is None else (q[:, :, R:] * scale, *(p[:, R:] for p in prefix))
            parts.append(_attend(logits, v_h, *rest))
        o = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        return o.transpose(1, 2)

    rows = q.to(wide), k.to(wide), v.to(wide)
    if cu_seqlens is None:
        B, T = q.shape[:2]
        o = dense(Group(torch.arange(B, device=q.device), B, T, None), *rows)
    else:
        o = by_sequence(dense, cu_seqlens, *rows)
    return o.to(q.dtype)


def _attend(
    logits: torch.Tensor,
    v: torch.Tensor,
    q: torch.Tensor | None = None,
    prefix_k: torch.Tensor | None = None,
    prefix_v: torch.Tensor | None = None,
) -> torch.Tensor:
    """softmax(logits [S,H,L,L]) v [S,H,L,V], joined by prefix keys for scaled q [S,L,H,K] without positions."""
    if q is None or prefix_k is None or prefix_v is None:
        return logits.softmax(-1) @ v
    P = prefix_k.shape[0]
    before = q.transpose(1, 2) @ prefix_k.permute(1, 2, 0)
    weights = torch.cat([before, logits], -1).softmax(-1)
    return weights[..., :P] @ prefix_v.transpose(0, 1) + weights[..., P:] @ v


def _masked(pads: torch.Tensor | None, L: int, causal: bool, device: torch.device) -> torch.Tensor | None:
    """[S or 1, 1, L or 1, L], True where a query must not see a key."""
    future = torch.ones(L, L, dtype=torch.bool, device=device).triu_(1)[None, None] if causal else None
    if pads is None:
        return future
    return pads[:, None, None, :] if future is None else pads[:, None, None, :] | future


def _light_cone(x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """Pairs (x1, x2) as all (x1+x2)/√2, then all (x1-x2)/√2, times scale."""
    c = scale * 0.5**0.5
    x1, x2 = x[..., 0::2] * c, x[..., 1::2] * c
    return torch.cat([x1 + x2, x1 - x2], -1).contiguous()


def _halvings(lo: int, hi: int) -> Iterator[tuple[int, int, int]]:
    """(lo, mid, hi) of every halving of [lo, hi) down to tiles; mid - lo is a power of two of tiles."""
    if hi - lo > _TILE:
        width = _TILE
        while 2 * width < hi - lo:
            width *= 2
        yield lo, lo + width, hi
        yield from _halvings(lo, lo + width)
        yield from _halvings(lo + width, hi)


def _tiles(T: int) -> Iterator[tuple[int, int, int]]:
    """(first row, number of tiles, rows of each): all whole diagonal tiles, then the rest."""
    whole, rest = divmod(T, _TILE)
    if whole:
        yield 0, whole, _TILE
    if rest:
        yield T - rest, 1, rest


def _rows(x: torch.Tensor, first: int, n: int, c: int) -> torch.Tensor:
    """The rows of n tiles of x [S,H,T,K]: a view [S,H,n,c,K]."""
    return x[:, :, first : first + n * c].unflatten(2, (n, c))


def _diagonal(x: torch.Tensor, first: int, n: int, c: int) -> torch.Tensor:
    """n diagonal tiles of x [S,H,T,T]: a view [S,H,n,c,c]."""
    x = x[:, :, first : first + n * c, first : first + n * c]
    return x.unflatten(3, (n, c)).unflatten(2, (n, c)).diagonal(dim1=2, dim2=4).movedim(-1, 2)


class _Factors:
    """The scalings of query and key rows before their products; left: of keys on the left of their queries."""

    def __init__(self, T: int, K: int, base: float, mode: str, damping: torch.Tensor, dtype: torch.dtype) -> None:
        exact = torch.float32 if damping.device.type == "mps" else torch.float64
        theta = base ** (torch.arange(0, K, 2, device=damping.device, dtype=exact) / -K)
        top = theta if mode == "per_pair" else theta[0]
        rates = torch.cat([top - theta, top + theta])  # keys on the left; on the right the two halves swap
        j = torch.arange(max(T, _TILE), device=damping.device, dtype=exact)[:, None]
        exponent = -j * (rates + damping.to(exact))
        # powers below the smallest normal number count as 0: products with denormal numbers run 50 times slower on CPUs
        keep = exponent > math.log(torch.finfo(dtype).tiny)
        shrink = torch.where(keep, exponent, -math.inf).exp().to(dtype)
        self._shrink = {True: shrink, False: shrink.roll(K // 2, 1)}
        # around a tile's centre the exponents have both signs; the damping, which has no bound, comes after the product
        centred = (_TILE // 2 - j[:_TILE]) * rates
        query, key = centred.exp().to(dtype), (-centred).exp().to(dtype)
        self._tile = {True: (query, key), False: (key.roll(K // 2, 1), query.roll(K // 2, 1))}
        gap = (j[:_TILE] - j[:_TILE, 0]).abs()
        self.decay = (-gap * damping.to(exact)).exp().to(dtype)

    def tile(self, left: bool, c: int) -> tuple[torch.Tensor, torch.Tensor]:
        query, key = self._tile[left]
        return query[:c], key[:c]

    def block(self, left: bool, lo: int, mid: int, hi: int) -> tuple[slice, slice, torch.Tensor, torch.Tensor]:
        """Rows and columns of an off-diagonal block and the factors of its queries and keys, which meet at mid."""
        near, far = self._shrink[left][: hi - mid], self._shrink[left][1 : mid - lo + 1].flip(0)
        if left:
            return slice(mid, hi), slice(lo, mid), near, far
        return slice(lo, mid), slice(mid, hi), far, near


class _Logits(torch.autograd.Function):
    """[S,H,T,T] from light-cone q, k [S,H,T,K]; -inf at pads [S,T] and, when causal, above the diagonal."""

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        damping: torch.Tensor,
        pads: torch.Tensor | None,
        base: float,
        mode: str,
        causal: bool,
    ) -> torch.Tensor:
        S, H, T, K = q.shape
        factors = _Factors(T, K, base, mode, damping, q.dtype)
        out = q.new_empty((S, H, T, T))
        for first, n, c in _tiles(T):
            a, b = _rows(q, first, n, c), _rows(k, first, n, c)
            (left_q, left_k), (right_q, right_k) = factors.tile(True, c), factors.tile(False, c)
            decay = factors.decay[:c, :c]
            below = ((a * left_q) @ (b * left_k).mT) * decay
            above = -math.inf if causal else ((a * right_q) @ (b * right_k).mT) * decay
            lower = torch.ones(c, c, dtype=torch.bool, device=q.device).tril_()
            _diagonal(out, first, n, c).copy_(torch.where(lower, below, above))
        for lo, mid, hi in _halvings(0, T):
            for left in (True, False):
                rows, cols, fq, fk = factors.block(left, lo, mid, hi)
                if causal and not left:
                    out[:, :, rows, cols] = -math.inf
                else:
                    out[:, :, rows, cols] = (q[:, :, rows] * fq) @ (k[:, :, cols] * fk).mT
        if pads is not None:
            out.masked_fill_(pads[:, None, None, :], -math.inf)
        ctx.factors, ctx.sides = factors, (True,) if causal else (True, False)
        ctx.save_for_backward(q, k, out if ctx.needs_input_grad[2] else None)
        return out

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        q, k, out = ctx.saved_tensors
        factors, T = ctx.factors, q.shape[2]
        dq, dk = torch.zeros_like(q), torch.zeros_like(k)
        for first, n, c in _tiles(T):
            a, b = _rows(q, first, n, c), _rows(k, first, n, c)
            for left in ctx.sides:
                fq, fk = factors.tile(left, c)
                decay = factors.decay[:c, :c]
                g = _diagonal(grad, first, n, c) * (decay.tril() if left else decay.triu(1))
                _rows(dq, first, n, c).addcmul_(g @ (b * fk), fq)
                _rows(dk, first, n, c).addcmul_(g.mT @ (a * fq), fk)
        for lo, mid, hi in _halvings(0, T):
            for left in ctx.sides:
                rows, cols, fq, fk = factors.block(left, lo, mid, hi)
                g = grad[:, :, rows, cols]
                dq[:, :, rows].addcmul_(g @ (k[:, :, cols] * fk), fq)
                dk[:, :, cols].addcmul_(g.mT @ (q[:, :, rows] * fq), fk)
        ddamping = None
        if out is not None:  # masked logits are -inf and have zero gradient
            gap = torch.arange(T, device=q.device)
            gap = (gap[:, None] - gap).abs().to(q.dtype)
            ddamping = -(torch.where(grad == 0, 0.0, grad * out) * gap).sum()
        return dq, dk, ddamping, None, None, None, None
