"""Attention with hyperbolic positions in PyTorch; the contract is in op.py.

Logits are exact and need no tensor larger than the [T,T] scores. In light-cone coordinates every channel c of
q_m·k_n carries e^(-r_c |m-n|). Above and below the diagonal the range of positions is halved again and again: queries
right of the middle and keys left of it meet at the middle, e^(-r(m-n)) = e^(-r(m-mid)) e^(-r(mid-n)), so each off-diagonal
block is one product of two operands that only shrank. What remains are diagonal tiles of at most 32 positions, where the same
split around the tile's centre stays within e^(±32).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

from .._packed import Group, by_sequence
from ..rotary.reference import rotary

_TILE = 32  # rates are at most 2 per position: e^(2·16) keeps products of both sides within float32


def hope_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    base: float = 10000.0,
    damping: float | torch.Tensor = 0.01,
    mode: str = "per_pair",
    scale: float | None = None,
    causal: bool = False,
    rotary_heads: int = 0,
    rotary_theta: float = 10000.0,
    prefix_k: torch.Tensor | None = None,
    prefix_v: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
) -> torch.Tensor:
    wide = torch.promote_types(q.dtype, torch.float32)
    alpha = q.shape[-1] ** -0.5 if scale is None else scale
    if not isinstance(damping, torch.Tensor):
        damping = torch.tensor(damping, dtype=wide, device=q.device)
    R = rotary_heads
    prefix = None if prefix_k is None or prefix_v is None else (prefix_k.to(wide), prefix_v.to(wide))

    def dense(group: Group, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        L = q.shape[1]
        parts = []
        if R:
            positions = torch.arange(L, device=q.device)
            turned = (rotary(x[:, :, :R], positions, rotary_theta) for x in (q, k))
            q_r, k_r, v_r = (x.transpose(1, 2) for x in (*turned, v[:, :, :R]))
            masked = _masked(group, L, causal, q.device)
            if prefix is not None:
                k_r, v_r = _prepended(k_r, prefix[0][:, :R]), _prepended(v_r, prefix[1][:, :R])
                masked = None if masked is None else F.pad(masked, (prefix[0].shape[0], 0))
            allowed = None if masked is None else ~masked
            parts.append(F.scaled_dot_product_attention(q_r, k_r, v_r, attn_mask=allowed, scale=alpha))
        if q.shape[2] > R:
            q_h, k_h, v_h = (x[:, :, R:].transpose(1, 2) for x in (q, k, v))
            pads = group.key_mask()
            logits = _Logits.apply(
                _light_cone(q_h, alpha), _light_cone(k_h), damping.to(wide), pads, base, mode, causal
            )
            if prefix is not None:
                keys = prefix[0][:, R:].permute(1, 2, 0)  # [H,K,P]
                logits = torch.cat([(q_h * alpha) @ keys, logits], -1)
                v_h = _prepended(v_h, prefix[1][:, R:])
            parts.append(logits.softmax(-1) @ v_h)
        o = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        return o.transpose(1, 2)

    rows = q.to(wide), k.to(wide), v.to(wide)
    if cu_seqlens is None:
        B, T = q.shape[:2]
        o = dense(Group(torch.arange(B, device=q.device), B, T, None), *rows)
    else:
        o = by_sequence(dense, cu_seqlens, *rows)
    return o.to(q.dtype)


def _prepended(x: torch.Tensor, prefix: torch.Tensor) -> torch.Tensor:
    """x [S,H,L,K] after prefix [P,H,K]: [S,H,P+L,K]."""
    P, H, K = prefix.shape
    return torch.cat([prefix.transpose(0, 1).expand(x.shape[0], H, P, K), x], 2)


def _masked(group: Group, L: int, causal: bool, device: torch.device) -> torch.Tensor | None:
    """[S or 1, 1, L, L], True where a query must not see a key."""
    future = torch.ones(L, L, dtype=torch.bool, device=device).triu_(1)[None, None] if causal else None
    pads = group.key_mask()
    if pads is None:
        return future
    padded = pads[:, None, None, :].expand(-1, 1, L, -1)
    return padded if future is None else padded | future


def _light_cone(x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """Pairs (x1, x2) as all (x1+x2)/√2, then all (x1-x2)/√2, times scale."""
    c = scale * 0.5**0.5
    x1, x2 = x[..., 0::2] * c, x[..., 1::2] * c
    return torch.cat([x1 + x2, x1 - x2], -1).contiguous()


def _rates(K: int, base: float, mode: str, device: torch.device) -> torch.Tensor:
    """Decay per position of every light-cone channel for keys on the left, without the damping: [K] float64.

    For keys on the right the two halves swap.
    """
    exact = torch.float32 if device.type == "mps" else torch.float64
    theta = base ** (torch.arange(0, K, 2, device=device, dtype=exact) / -K)
    top = theta if mode == "per_pair" else theta[0]
    return torch.cat([top - theta, top + theta])


def _ranges(lo: int, hi: int) -> Iterator[tuple[int, int, int]]:
    """The halving of [lo, hi): (lo, mid, hi) for two off-diagonal blocks, (lo, hi, hi) for a diagonal tile."""
    if hi - lo <= _TILE:
        if hi > lo:
            yield lo, hi, hi
        return
    mid = (lo + hi) // 2
    yield lo, mid, hi
    yield from _ranges(lo, mid)
    yield from _ranges(mid, hi)


class _Factors:
    """e^(-r·j): the scalings of queries and keys before their products."""

    def __init__(self, T: int, K: int, base: float, mode: str, dtype: torch.dtype, device: torch.device) -> None:
        rates = _rates(K, base, mode, device)
        exponent = -torch.arange(T // 2 + 2, device=device)[:, None] * rates
        # powers below the smallest normal number count as 0: products with denormal numbers run 50 times slower on CPUs
        keep = exponent > math.log(torch.finfo(dtype).tiny)
        left = torch.where(keep, exponent, -math.inf).exp().to(dtype)
        self.shrink = {True: left, False: left.roll(K // 2, 1)}  # key on the left of the query, or on the right
        self.grow = {side: x[:_TILE].reciprocal() for side, x in self.shrink.items()}

    def tile(self, c: int, left: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Factors [c,K] of query and key rows around the centre of a diagonal tile."""
        mid = c // 2
        shrink, grow = self.shrink[left], self.grow[left]
        down = torch.cat([grow[1 : mid + 1].flip(0), shrink[: c - mid]])  # e^(-r(j-mid))
        up = torch.cat([shrink[1 : mid + 1].flip(0), grow[: c - mid]])
        return (down, up) if left else (up, down)


class _Logits(torch.autograd.Function):
    """[S,H,L,L] from light-cone q, k [S,H,L,K]; -inf at pads [S,L] and, when causal, above the diagonal."""

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
        out = q.new_empty(S, H, T, T)
        factors = _Factors(T, K, base, mode, q.dtype, q.device)
        gap = torch.arange(T, device=q.device)
        gap = (gap[:, None] - gap).to(q.dtype)
        decay = (-damping * gap.abs()).exp()
        for lo, mid, hi in _ranges(0, T):
            if mid == hi:
                (fq, fk), (bq, bk) = (factors.tile(hi - lo, left) for left in (True, False))
                a, b = q[:, :, lo:hi], k[:, :, lo:hi]
                tile = (a * fq) @ (b * fk).mT
                below = gap[lo:hi, lo:hi] >= 0
                other = -math.inf if causal else (a * bq) @ (b * bk).mT
                tile = torch.where(below, tile, other)
                torch.mul(tile, decay[lo:hi, lo:hi], out=out[:, :, lo:hi, lo:hi])
                continue
            near, far = factors.shrink[True][: hi - mid], factors.shrink[True][1 : mid - lo + 1].flip(0)
            block = (q[:, :, mid:hi] * near) @ (k[:, :, lo:mid] * far).mT
            torch.mul(block, decay[mid:hi, lo:mid], out=out[:, :, mid:hi, lo:mid])
            if causal:
                out[:, :, lo:mid, mid:hi] = -math.inf
                continue
            near, far = factors.shrink[False][: hi - mid], factors.shrink[False][1 : mid - lo + 1].flip(0)
            block = (q[:, :, lo:mid] * far) @ (k[:, :, mid:hi] * near).mT
            torch.mul(block, decay[lo:mid, mid:hi], out=out[:, :, lo:mid, mid:hi])
        if pads is not None:
            out.masked_fill_(pads[:, None, None, :], -math.inf)
        ctx.causal, ctx.factors = causal, factors
        ctx.save_for_backward(q, k, decay, gap, out if ctx.needs_input_grad[2] else None)
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        q, k, decay, gap, out = ctx.saved_tensors
        factors, T = ctx.factors, q.shape[2]
        dq, dk = torch.zeros_like(q), torch.zeros_like(k)
        for lo, mid, hi in _ranges(0, T):
            if mid == hi:
                g = grad[:, :, lo:hi, lo:hi] * decay[lo:hi, lo:hi]
                a, b = q[:, :, lo:hi], k[:, :, lo:hi]
                for left in (True,) if ctx.causal else (True, False):
                    fq, fk = factors.tile(hi - lo, left)
                    half = g.tril() if left else g.triu(1)
                    dq[:, :, lo:hi] += (half @ (b * fk)) * fq
                    dk[:, :, lo:hi] += (half.mT @ (a * fq)) * fk
                continue
            for left in (True,) if ctx.causal else (True, False):
                near, far = factors.shrink[left][: hi - mid], factors.shrink[left][1 : mid - lo + 1].flip(0)
                rows, cols = (slice(mid, hi), slice(lo, mid)) if left else (slice(lo, mid), slice(mid, hi))
                fq, fk = (near, far) if left else (far, near)
                g = grad[:, :, rows, cols] * decay[rows, cols]
                dq[:, :, rows] += (g @ (k[:, :, cols] * fk)) * fq
                dk[:, :, cols] += (g.mT @ (q[:, :, rows] * fq)) * fk
        ddamping = None
        if out is not None:  # masked logits are -inf and have zero gradient
            ddamping = -(torch.where(grad == 0, 0.0, grad * out) * gap.abs()).sum()
        return dq, dk, ddamping, None, None, None, None
