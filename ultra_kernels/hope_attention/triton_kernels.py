"""HoPE attention in Triton; the contract is in op.py.

In light-cone coordinates u = (x1 + x2)/√2, w = (x1 - x2)/√2 of every pair, a logit is Σ e^(-r_u |m-n|) q_u k_u +
e^(-r_w |m-n|) q_w k_w; for keys on the other side the two rates swap. A tile of BLOCK queries and BLOCK keys splits
e^(-r |m-n|) into factors of its rows. Off the diagonal each row is seen from the edge of its own tile, and a factor of
each channel covers the gap between the edges: all at most 1. On the diagonal both rows are seen from the tile's centre,
where factors reach e^±(rate BLOCK/2), rate <= 2, and damping, which has no bound, multiplies the logits. A tile is of
one of four kinds:
    0  on the diagonal, keys up to the query      2  on the diagonal, keys after the query
    1  keys on the left                           3  keys on the right
What a program streams (keys forward and for dq, queries for dk and dv) is turned and shaped for each kind by
`shape_kernel` beforehand, in float32 beside float16, which could not hold it; what it holds is shaped in registers.
Rotary heads turn by other matrices and have rates of 0.

Softmax runs in powers of 2. The backward has a program per tile of queries for dq and one per tile of keys for dk and
dv, so that no sum depends on an order; transposed scores are products of their own, since Triton 3.4 to 3.7.0 get a
transposed accumulator wrong on Hopper. A prefix is few keys without positions: torch's products handle it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from .. import _triton
from .._rows_triton import _load, _readable, _rows, _sequence, _strides
from .._triton import ARCHS, Configuration
from .op import rates


@triton.jit
def _turned(x, row_ok, place, d, K2, rotary, cosine, sine):
    """Rows at `x` as the two channels of every pair, in float32; place: positions for rotary heads."""
    ok = row_ok[:, None] & (d < K2)[None, :]
    at = x[:, None] + 2 * d[None, :]
    x1 = tl.load(at, mask=ok, other=0.0).to(tl.float32)
    x2 = tl.load(at + 1, mask=ok, other=0.0).to(tl.float32)
    if rotary != 0:
        where = place.to(tl.int64)[:, None] * K2 + d[None, :]
        c = tl.load(cosine + where, mask=ok, other=0.0)
        s = tl.load(sine + where, mask=ok, other=0.0)
        u = x1 * c - x2 * s
        w = x2 * c + x1 * s
    else:
        u = (x1 + x2) * 0.7071067811865476
        w = (x1 - x2) * 0.7071067811865476
    return u, w


@triton.jit
def _store_back(x, du, dw, row_ok, place, d, K2, rotary, cosine, sine):
    """The transpose of _turned: gradients of both channels into the rows at `x`."""
    ok = row_ok[:, None] & (d < K2)[None, :]
    if rotary != 0:
        where = place.to(tl.int64)[:, None] * K2 + d[None, :]
        c = tl.load(cosine + where, mask=ok, other=0.0)
        s = tl.load(sine + where, mask=ok, other=0.0)
        d1 = du * c + dw * s
        d2 = dw * c - du * s
    else:
        d1 = (du + dw) * 0.7071067811865476
        d2 = (du - dw) * 0.7071067811865476
    at = x[:, None] + 2 * d[None, :]
    tl.store(at, d1, mask=ok)
    tl.store(at + 1, d2, mask=ok)


@triton.jit
def _rates(rate, damping, d, K2, rotary):
    """log2 of what the two channels of a pair lose per token to keys on the left, and of the damping alone."""
    near = tl.load(rate + d, mask=d < K2, other=0.0)
    far = tl.load(rate + K2 + d, mask=d < K2, other=0.0)
    damp = tl.load(damping)
    used = tl.where(rotary != 0, 0.0, 1.4426950408889634)
    return near * used, far * used, damp * used


@triton.jit
def _raw_rows(x, batch, h, n, stride_batch, stride_row, stride_head):
    return x + (batch * stride_batch.to(tl.int64) + h * stride_head.to(tl.int64) + n * stride_row.to(tl.int64))


@triton.jit
def _shaped_rows(x, kind, batch, h, n, B, T, H, WIDTH: tl.constexpr):
    """Rows of x [4,B,T,H,2,WIDTH]."""
    return x + (((kind * B + batch) * T.to(tl.int64) + n) * H + h) * (2 * WIDTH)


@triton.jit
def _of_kind(kind, near, far, damp):
    """Rates of the two channels of a pair for tiles of one kind."""
    damped = tl.where(kind % 2 == 1, damp, 0.0)
    return tl.where(kind < 2, near, far) + damped, tl.where(kind < 2, far, near) + damped


@triton.jit
def _factors(kind, keys, i, r_u, r_w, BLOCK: tl.constexpr):
    """Factors of the rows of a tile of queries, or of keys (keys 1), as tiles [BLOCK, channels]."""
    centre = tl.where((kind == 0) == (keys != 0), i - BLOCK // 2, BLOCK // 2 - i)
    edge = tl.where((kind == 1) == (keys != 0), i - BLOCK + 1, -i)
    power = tl.where(kind % 2 == 0, centre, edge).to(tl.float32)[:, None]
    return tl.exp2(power * r_u[None, :]), tl.exp2(power * r_w[None, :])


_SIZES = [
    "B", "T", "H", "K2", "V16", "num_seqs", "slots", "rotary_heads", "causal", "keys",
    *(f"{x}_{axis}" for x in "xqkvg" for axis in ("batch", "row", "head")),
]  # fmt: skip


@triton.jit(do_not_specialize=_SIZES)
def shape_kernel(
    x, shaped, rate, damping, cosine, sine, cu_seqlens, scale,
    x_batch, x_row, x_head, B, T, H, K2, num_seqs, slots, rotary_heads, keys,
    BLOCK: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """shaped `[4,B,T,H,2,WIDTH]` = scale · turned x times its rows' factors, for each kind; keys 1: x are keys."""
    pid = tl.program_id(0)
    slot = pid % slots
    h = pid // slots
    _, batch, begin, end, block = _sequence(cu_seqlens, slot, num_seqs, T, BLOCK)
    i, d = tl.arange(0, BLOCK), tl.arange(0, WIDTH)
    n = begin + block * BLOCK + i
    ok = n < end
    rotary = (h < rotary_heads).to(tl.int32)
    u, w = _turned(_raw_rows(x, batch, h, n, x_batch, x_row, x_head), ok, n - begin, d, K2, rotary, cosine, sine)
    near, far, damp = _rates(rate, damping, d, K2, rotary)
    for kind in range(0, 4):
        r_u, r_w = _of_kind(kind, near, far, damp)
        f_u, f_w = _factors(kind, keys, i, r_u, r_w, BLOCK)
        rows = _shaped_rows(shaped, kind, batch, h, n, B, T, H, WIDTH)[:, None] + d[None, :]
        tl.store(rows, u * f_u * scale, mask=ok[:, None])
        tl.store(rows + WIDTH, w * f_w * scale, mask=ok[:, None])


@triton.jit
def _tiles(kind, block, n0, begin, end, queries, BLOCK: tl.constexpr):
    """How many tiles of this kind a block meets, and where the first starts; queries 1: the block is of keys."""
    before = kind == tl.where(queries != 0, 3, 1)
    after = (tl.maximum(end - n0 - BLOCK, 0) + BLOCK - 1) // BLOCK
    count = tl.where(kind % 2 == 0, 1, tl.where(before, block, after))
    first = tl.where(kind % 2 == 0, n0, tl.where(before, begin, n0 + BLOCK))
    return count, first


@triton.jit
def _logits(s, kind, m, n, n_ok, damp):
    """Logits of a tile from its products: damping and the side of a tile on the diagonal; -inf where no key is seen."""
    if kind % 2 == 0:
        gap = m - n
        s = s * tl.exp2(-tl.abs(gap).to(tl.float32) * damp)
        s = tl.where(tl.where(kind == 0, gap >= 0, gap < 0) & n_ok, s, float("-inf"))
    else:
        s = tl.where(n_ok, s, float("-inf"))
    return s


@triton.jit(do_not_specialize=_SIZES)
def forward_kernel(
    q, shaped_k, v, o, lse, rate, damping, cosine, sine, cu_seqlens, scale,
    q_batch, q_row, q_head, v_batch, v_row, v_head,
    B, T, H, K2, V16, num_seqs, slots, rotary_heads, causal,
    BLOCK: tl.constexpr, WIDTH: tl.constexpr, BLOCK_V: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """o `[B,T,H,V]` and lse `[B,H,T]`, in powers of 2, of a tile of queries. Grid: slots of BLOCK rows, then heads."""
    pid = tl.program_id(0)
    slot = pid % slots
    h = pid // slots
    _, batch, begin, end, block = _sequence(cu_seqlens, slot, num_seqs, T, BLOCK)
    n0 = begin + block * BLOCK
    if n0 >= end:
        return
    V = V16 * 16
    i, d, e = tl.arange(0, BLOCK), tl.arange(0, WIDTH), tl.arange(0, BLOCK_V)
    m = n0 + i
    m_ok = m < end
    rotary = (h < rotary_heads).to(tl.int32)
    near, far, damp = _rates(rate, damping, d, K2, rotary)
    qu, qw = _turned(_raw_rows(q, batch, h, m, q_batch, q_row, q_head), m_ok, m - begin, d, K2, rotary, cosine, sine)
    qu, qw = qu * scale, qw * scale

    most = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    acc = tl.zeros((BLOCK, BLOCK_V), tl.float32)
    for kind in range(0, 4 - 2 * causal):  # the first shows every row its own key
        r_u, r_w = _of_kind(kind, near, far, damp)
        f_u, f_w = _factors(kind, 0, i, r_u, r_w, BLOCK)
        held_u, held_w = qu * f_u, qw * f_w
        count, first = _tiles(kind, block, n0, begin, end, 0, BLOCK)
        for t in range(0, count):
            n0_key = first + t * BLOCK
            between = tl.maximum(tl.abs(n0_key - n0) - BLOCK + 1, 0).to(tl.float32)
            n = n0_key + i
            n_ok = n < end
            k_rows = _shaped_rows(shaped_k, kind, batch, h, n, B, T, H, WIDTH)
            a = (held_u * tl.exp2(-between * r_u)[None, :]).to(shaped_k.dtype.element_ty)
            b = (held_w * tl.exp2(-between * r_w)[None, :]).to(shaped_k.dtype.element_ty)
            s = tl.dot(a, tl.trans(_load(k_rows, n_ok, d, WIDTH)), input_precision=PRECISION)
            s = tl.dot(b, tl.trans(_load(k_rows + WIDTH, n_ok, d, WIDTH)), s, input_precision=PRECISION)
            s = _logits(s, kind, m[:, None], n[None, :], n_ok[None, :], damp)
            largest = tl.maximum(most, tl.max(s, axis=1))
            shrink = tl.exp2(most - largest)
            p = tl.exp2(s - largest[:, None])
            total = total * shrink + tl.sum(p, axis=1)
            values = _load(_rows(v, batch, h, n, v_batch, v_row, v_head), n_ok, e, V)
            acc = tl.dot(p.to(v.dtype.element_ty), values, acc * shrink[:, None], input_precision=PRECISION)
            most = largest

    o_rows = o + ((batch * T.to(tl.int64) + m) * H + h) * V
    tl.store(o_rows[:, None] + e[None, :], acc / total[:, None], mask=m_ok[:, None] & (e < V)[None, :])
    tl.store(lse + (batch * H + h) * T.to(tl.int64) + m, most + tl.log2(total), mask=m_ok)


@triton.jit(do_not_specialize=_SIZES)
def dq_kernel(
    q, shaped_k, v, g, dq, ddamping, lse, delta, rate, damping, cosine, sine, cu_seqlens, scale,
    q_batch, q_row, q_head, v_batch, v_row, v_head, g_batch, g_row, g_head,
    B, T, H, K2, V16, num_seqs, slots, rotary_heads, causal,
    BLOCK: tl.constexpr, WIDTH: tl.constexpr, BLOCK_V: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq `[B,T,H,2 K2]` of one tile of queries, and in ddamping `[H,slots]` its Σ dlogit · logit · |m-n|."""
    pid = tl.program_id(0)
    slot = pid % slots
    h = pid // slots
    _, batch, begin, end, block = _sequence(cu_seqlens, slot, num_seqs, T, BLOCK)
    n0 = begin + block * BLOCK
    if n0 >= end:
        return
    V = V16 * 16
    i, d, e = tl.arange(0, BLOCK), tl.arange(0, WIDTH), tl.arange(0, BLOCK_V)
    m = n0 + i
    m_ok = m < end
    rotary = (h < rotary_heads).to(tl.int32)
    near, far, damp = _rates(rate, damping, d, K2, rotary)
    qu, qw = _turned(_raw_rows(q, batch, h, m, q_batch, q_row, q_head), m_ok, m - begin, d, K2, rotary, cosine, sine)
    qu, qw = qu * scale, qw * scale
    row = (batch * H + h) * T.to(tl.int64) + m
    most = tl.load(lse + row, mask=m_ok, other=float("inf"))[:, None]
    own = tl.load(delta + row, mask=m_ok, other=0.0)[:, None]
    dout = _load(_rows(g, batch, h, m, g_batch, g_row, g_head), m_ok, e, V)

    du = tl.zeros((BLOCK, WIDTH), tl.float32)
    dw = tl.zeros((BLOCK, WIDTH), tl.float32)
    by_damping = tl.zeros((BLOCK,), tl.float32)
    for kind in range(0, 4 - 2 * causal):
        r_u, r_w = _of_kind(kind, near, far, damp)
        f_u, f_w = _factors(kind, 0, i, r_u, r_w, BLOCK)
        held_u, held_w = qu * f_u, qw * f_w
        sum_u = tl.zeros((BLOCK, WIDTH), tl.float32)
        sum_w = tl.zeros((BLOCK, WIDTH), tl.float32)
        count, first = _tiles(kind, block, n0, begin, end, 0, BLOCK)
        for t in range(0, count):
            n0_key = first + t * BLOCK
            between = tl.maximum(tl.abs(n0_key - n0) - BLOCK + 1, 0).to(tl.float32)
            g_u, g_w = tl.exp2(-between * r_u)[None, :], tl.exp2(-between * r_w)[None, :]
            n = n0_key + i
            n_ok = n < end
            k_rows = _shaped_rows(shaped_k, kind, batch, h, n, B, T, H, WIDTH)
            b_u, b_w = _load(k_rows, n_ok, d, WIDTH), _load(k_rows + WIDTH, n_ok, d, WIDTH)
            s = tl.dot((held_u * g_u).to(b_u.dtype), tl.trans(b_u), input_precision=PRECISION)
            s = tl.dot((held_w * g_w).to(b_w.dtype), tl.trans(b_w), s, input_precision=PRECISION)
            s = _logits(s, kind, m[:, None], n[None, :], n_ok[None, :], damp)
            values = _load(_rows(v, batch, h, n, v_batch, v_row, v_head), n_ok, e, V)
            ds = tl.exp2(s - most) * (tl.dot(dout, tl.trans(values), input_precision=PRECISION) - own)
            distance = tl.abs(m[:, None] - n[None, :]).to(tl.float32)
            by_damping += tl.sum(tl.where(s > float("-inf"), ds * s * distance, 0.0), axis=1)
            if kind % 2 == 0:
                ds = ds * tl.exp2(-distance * damp)
            rounded = ds.to(b_u.dtype)
            sum_u += tl.dot(rounded, b_u, input_precision=PRECISION) * g_u
            sum_w += tl.dot(rounded, b_w, input_precision=PRECISION) * g_w
        du += sum_u * f_u
        dw += sum_w * f_w

    unit = scale * 0.6931471805599453
    rows = dq + ((batch * T.to(tl.int64) + m) * H + h) * (2 * K2)
    _store_back(rows, du * unit, dw * unit, m_ok, m - begin, d, K2, rotary, cosine, sine)
    total = tl.sum(tl.where(m_ok, by_damping, 0.0), axis=0) * tl.where(rotary != 0, 0.0, 0.6931471805599453)
    tl.store(ddamping + h.to(tl.int64) * slots + slot, total)


@triton.jit(do_not_specialize=_SIZES)
def dkdv_kernel(
    k, shaped_q, v, g, dk, dv, lse, delta, rate, damping, cosine, sine, cu_seqlens,
    k_batch, k_row, k_head, v_batch, v_row, v_head, g_batch, g_row, g_head,
    B, T, H, K2, V16, num_seqs, slots, rotary_heads, causal,
    BLOCK: tl.constexpr, WIDTH: tl.constexpr, BLOCK_V: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk `[B,T,H,2 K2]` and dv `[B,T,H,V]` of one tile of keys; scores are transposed, keys by queries."""
    pid = tl.program_id(0)
    slot = pid % slots
    h = pid // slots
    _, batch, begin, end, block = _sequence(cu_seqlens, slot, num_seqs, T, BLOCK)
    n0 = begin + block * BLOCK
    if n0 >= end:
        return
    V = V16 * 16
    i, d, e = tl.arange(0, BLOCK), tl.arange(0, WIDTH), tl.arange(0, BLOCK_V)
    n = n0 + i
    n_ok = n < end
    rotary = (h < rotary_heads).to(tl.int32)
    near, far, damp = _rates(rate, damping, d, K2, rotary)
    ku, kw = _turned(_raw_rows(k, batch, h, n, k_batch, k_row, k_head), n_ok, n - begin, d, K2, rotary, cosine, sine)
    values = _load(_rows(v, batch, h, n, v_batch, v_row, v_head), n_ok, e, V)
    head_row = (batch * H + h) * T.to(tl.int64)

    du = tl.zeros((BLOCK, WIDTH), tl.float32)
    dw = tl.zeros((BLOCK, WIDTH), tl.float32)
    dvalues = tl.zeros((BLOCK, BLOCK_V), tl.float32)
    for kind in range(0, 4 - 2 * causal):
        r_u, r_w = _of_kind(kind, near, far, damp)
        f_u, f_w = _factors(kind, 1, i, r_u, r_w, BLOCK)
        held_u, held_w = ku * f_u, kw * f_w
        sum_u = tl.zeros((BLOCK, WIDTH), tl.float32)
        sum_w = tl.zeros((BLOCK, WIDTH), tl.float32)
        count, first = _tiles(kind, block, n0, begin, end, 1, BLOCK)
        for t in range(0, count):
            n0_query = first + t * BLOCK
            between = tl.maximum(tl.abs(n0_query - n0) - BLOCK + 1, 0).to(tl.float32)
            g_u, g_w = tl.exp2(-between * r_u)[None, :], tl.exp2(-between * r_w)[None, :]
            m = n0_query + i
            m_ok = m < end
            q_rows = _shaped_rows(shaped_q, kind, batch, h, m, B, T, H, WIDTH)
            b_u, b_w = _load(q_rows, m_ok, d, WIDTH), _load(q_rows + WIDTH, m_ok, d, WIDTH)
            s = tl.dot((held_u * g_u).to(b_u.dtype), tl.trans(b_u), input_precision=PRECISION)
            s = tl.dot((held_w * g_w).to(b_w.dtype), tl.trans(b_w), s, input_precision=PRECISION)
            s = _logits(s, kind, m[None, :], n[:, None], n_ok[:, None], damp)
            most = tl.load(lse + head_row + m, mask=m_ok, other=float("inf"))[None, :]
            own = tl.load(delta + head_row + m, mask=m_ok, other=0.0)[None, :]
            dout = _load(_rows(g, batch, h, m, g_batch, g_row, g_head), m_ok, e, V)
            p = tl.exp2(s - most)
            dvalues = tl.dot(p.to(v.dtype.element_ty), dout, dvalues, input_precision=PRECISION)
            ds = p * (tl.dot(values, tl.trans(dout), input_precision=PRECISION) - own)
            if kind % 2 == 0:
                ds = ds * tl.exp2(-tl.abs(m[None, :] - n[:, None]).to(tl.float32) * damp)
            rounded = ds.to(b_u.dtype)
            sum_u += tl.dot(rounded, b_u, input_precision=PRECISION) * g_u
            sum_w += tl.dot(rounded, b_w, input_precision=PRECISION) * g_w
        du += sum_u * f_u
        dw += sum_w * f_w

    ok = n_ok[:, None] & (e < V)[None, :]
    tl.store((dv + ((batch * T.to(tl.int64) + n) * H + h) * V)[:, None] + e[None, :], dvalues, mask=ok)
    rows = dk + ((batch * T.to(tl.int64) + n) * H + h) * (2 * K2)
    unit = 0.6931471805599453
    _store_back(rows, du * unit, dw * unit, n_ok, n - begin, d, K2, rotary, cosine, sine)


# The head dimensions up to which a tile serves (half of one is the inner length of a product) -> rows of a tile, the
# same in all kernels of a call, which see rows from the same edges. By architecture, the oldest that a table is for: a
# tile of 64 rows of 64 channels spills on sm_80 and sm_100.
HALF = {80: {32: 32, 128: 32}, 90: {32: 64, 64: 64, 128: 32}, 100: {32: 64, 128: 32}}
SINGLE = {64: 16, 128: 16}


class Tile(NamedTuple):
    num_warps: int
    num_stages: int = 1
    precision: str = "tf32x3"  # of float32 operands


# (kernel, half precision) -> head dimension -> tile. Not timed on a GPU yet. Beside float16 the shaped operands are
# float32, and tf32 holds as many bits as float16. Three such products are exact to 2^-22 of each operand; plain units
# ("ieee") hold the operands of whole tiles in registers, and spill in other cases than the tensor units do.
TILES = {
    # a second stage makes the compiler of Triton 3.6 fail for 64 rows on sm_90
    ("forward", True): {32: Tile(4, 1, "tf32"), 64: Tile(8, 1, "tf32"), 128: Tile(8, 2, "tf32")},
    ("dq", True): {32: Tile(8, 1, "tf32"), 64: Tile(8, 1, "tf32"), 128: Tile(8, 1, "tf32")},
    ("dkdv", True): {32: Tile(8, 1, "tf32"), 64: Tile(8, 1, "tf32"), 128: Tile(8, 1, "tf32")},
    ("forward", False): {64: Tile(2), 128: Tile(8)},
    ("dq", False): {64: Tile(8), 128: Tile(8)},
    ("dkdv", False): {64: Tile(8), 128: Tile(4, 1, "ieee")},
}
SHAPE_WARPS = 4
FUSION = True  # Triton's own default differs between versions
KERNELS = {"forward": forward_kernel, "dq": dq_kernel, "dkdv": dkdv_kernel}


class Problem(NamedTuple):
    """What the launches of one call share."""

    numbers: dict[str, Any]
    tables: dict[str, torch.Tensor]
    slots: int
    half: bool
    head: int
    block: int


def _problem(
    q: torch.Tensor,
    v: torch.Tensor,
    damping: torch.Tensor,
    base: float,
    mode: str,
    causal: bool,
    rotary_heads: int,
    rotary_theta: float,
    cu_seqlens: torch.Tensor | None,
) -> Problem:
    (B, T, H, K), V = q.shape, v.shape[3]
    half = q.dtype != torch.float32
    borders = q.new_empty(0, dtype=torch.int32) if cu_seqlens is None else cu_seqlens.int().contiguous()
    num_seqs = 0 if cu_seqlens is None else borders.numel() - 1
    table = HALF[max(arch for arch in HALF if arch <= max(_triton.arch_of(q), min(HALF)))] if half else SINGLE
    head, block = next(sizes for sizes in table.items() if sizes[0] >= max(K, V))
    slots = B * triton.cdiv(T, block) if cu_seqlens is None else T // block + num_seqs
    own = rates(K, base, mode).view(-1, 2).T.contiguous()  # near and far, [2, K/2]
    angle = torch.zeros(1, K // 2, dtype=torch.float64, device=q.device)
    if rotary_heads:
        frequency = rotary_theta ** (torch.arange(0, K, 2, dtype=torch.float64, device=q.device) / -K)
        angle = torch.arange(max(T, 1), dtype=torch.float64, device=q.device)[:, None] * frequency
    tables = {
        "rate": own.to(q.device, torch.float32), "damping": damping.detach().float().reshape(1).contiguous(),
        "cosine": angle.cos().float(), "sine": angle.sin().float(), "cu_seqlens": borders,
    }  # fmt: skip
    numbers = {
        "B": B, "T": T, "H": H, "K2": K // 2, "num_seqs": num_seqs, "slots": slots, "rotary_heads": rotary_heads,
    }  # fmt: skip
    return Problem(numbers, tables, slots, half, head, block)


def _shaped(problem: Problem, x: torch.Tensor, scale: float, keys: bool) -> torch.Tensor:
    """x turned and shaped for each kind of tile: float16 would overflow on the diagonal."""
    out = x.new_empty(4, *x.shape[:3], problem.head, dtype=torch.float32 if x.dtype == torch.float16 else x.dtype)
    if grid := problem.slots * x.shape[2]:
        shape_kernel[(grid,)](
            x, out, scale=scale, **_named("x", _elements(x)), keys=int(keys), **problem.numbers, **problem.tables,
            BLOCK=problem.block, WIDTH=problem.head // 2, num_warps=SHAPE_WARPS, enable_fp_fusion=FUSION,
        )  # fmt: skip
    return out


def _elements(x: torch.Tensor) -> list[int]:
    """Strides of the first three axes; those of axes of length 1 mean nothing."""
    return [x.stride(i) if x.shape[i] > 1 else 0 for i in range(3)]


def _named(name: str, strides: list[int]) -> dict[str, int]:
    return dict(zip((f"{name}_batch", f"{name}_row", f"{name}_head"), strides, strict=True))


def _launch(kernel: str, problem: Problem, causal: bool, **arguments: Any) -> None:
    tile = TILES[kernel, problem.half][problem.head]
    if grid := problem.slots * problem.numbers["H"]:
        KERNELS[kernel][(grid,)](
            **arguments, **problem.numbers, **problem.tables, causal=int(causal), BLOCK=problem.block,
            WIDTH=problem.head // 2, BLOCK_V=problem.head, PRECISION=tile.precision, num_warps=tile.num_warps,
            num_stages=tile.num_stages, enable_fp_fusion=FUSION,
        )  # fmt: skip


LOG2E = 1.4426950408889634


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
    problem = _problem(q, v, damping, base, mode, causal, rotary_heads, rotary_theta, cu_seqlens)
    q, k = _dense_rows(q), _dense_rows(k)
    values = _readable(v)
    B, T, H, _ = q.shape
    o = torch.empty_like(values, memory_format=torch.contiguous_format)
    lse = q.new_empty((B, H, T), dtype=torch.float32)
    _launch(
        "forward", problem, causal, q=q, shaped_k=_shaped(problem, k, 1.0, keys=True), v=values, o=o, lse=lse,
        scale=scale * LOG2E, **_named("q", _elements(q)), **_named("v", _strides(values)), V16=values.shape[3] // 16,
    )  # fmt: skip
    o, lse = o[..., : v.shape[3]], lse / LOG2E
    if prefix_k is None or prefix_v is None:
        return o.contiguous(), lse
    # a softmax over both parts is the mean of the two, weighted by their sums of exponentials
    logits = torch.einsum("bthk,phk->bhtp", q, prefix_k.to(q.dtype)).float() * scale
    before = logits.logsumexp(-1)
    both = torch.logaddexp(lse, before)
    weights = (logits - both[..., None]).exp().to(v.dtype)
    share = (lse - both).exp().transpose(1, 2)[..., None]
    o = (o.float() * share + torch.einsum("bhtp,phv->bthv", weights, prefix_v.to(v.dtype)).float()).to(q.dtype)
    return o.contiguous(), both


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
    problem = _problem(q, v, damping, base, mode, causal, rotary_heads, rotary_theta, cu_seqlens)
    q, k = _dense_rows(q), _dense_rows(k)
    grad = grad.to(q.dtype)
    values, cotangent = _readable(v), _readable(grad)
    delta = (grad.float() * o.float()).sum(-1).transpose(1, 2).contiguous()
    dq, dk = q.new_empty(q.shape), k.new_empty(k.shape)
    dv = torch.empty_like(values, memory_format=torch.contiguous_format)
    parts = q.new_zeros((q.shape[2], max(problem.slots, 1)), dtype=torch.float32)
    shared = dict(
        v=values, g=cotangent, lse=lse * LOG2E, delta=delta, **_named("v", _strides(values)),
        **_named("g", _strides(cotangent)), V16=values.shape[3] // 16,
    )  # fmt: skip
    _launch(
        "dq", problem, causal, q=q, shaped_k=_shaped(problem, k, 1.0, keys=True), dq=dq, ddamping=parts,
        scale=scale * LOG2E, **_named("q", _elements(q)), **shared,
    )  # fmt: skip
    _launch(
        "dkdv", problem, causal, k=k, shaped_q=_shaped(problem, q, scale * LOG2E, keys=False), dk=dk, dv=dv,
        **_named("k", _elements(k)), **shared,
    )  # fmt: skip
    none = q.new_empty(0, dtype=torch.float32)
    ddamping = -parts.sum() if wants_damping else none
    dv = dv[..., : v.shape[3]].contiguous()
    if prefix_k is None or prefix_v is None:
        return dq, dk, dv, ddamping, none, none
    keys, seen = prefix_k.to(q.dtype), prefix_v.to(v.dtype)
    p = (torch.einsum("bthk,phk->bhtp", q, keys).float() * scale - lse[..., None]).exp()
    ds = p * (torch.einsum("bthv,phv->bhtp", grad, seen).float() - delta[..., None]) * scale
    half_ds, half_p = ds.to(q.dtype), p.to(v.dtype)
    dq = (dq.float() + torch.einsum("bhtp,phk->bthk", half_ds, keys).float()).to(q.dtype)
    dprefix_k = torch.einsum("bhtp,bthk->phk", half_ds, q).float()
    dprefix_v = torch.einsum("bhtp,bthv->phv", half_p, grad).float()
    return dq, dk, dv, ddamping, dprefix_k, dprefix_v


def _dense_rows(x: torch.Tensor) -> torch.Tensor:
    """x itself where its last axis is contiguous."""
    return x if x.stride(3) == 1 else x.contiguous()


def configurations() -> list[Configuration]:
    """Every specialisation that the op launches."""
    return list(_configurations())


def _configurations() -> Iterator[Configuration]:
    def tiled(dtype: str, table: dict[int, int], suffix: str, archs: tuple[int, ...]) -> Iterator[Configuration]:
        for head, block in table.items():
            shape, name = {"BLOCK": block, "WIDTH": head // 2}, f"{dtype}{suffix}-{head}"
            yield _configuration(f"shape-{name}", shape_kernel, dtype, shape, Tile(SHAPE_WARPS, 3), archs)
            for kernel in KERNELS:
                tile = TILES[kernel, dtype != "fp32"][head]
                constexprs = shape | {"BLOCK_V": head, "PRECISION": tile.precision}
                yield _configuration(f"{kernel}-{name}", KERNELS[kernel], dtype, constexprs, tile, archs)

    for arch, table in HALF.items():
        for dtype in ("bf16", "fp16"):
            yield from tiled(dtype, table, f"-sm{arch}", (arch,))
    yield from tiled("fp32", SINGLE, "", ARCHS)


def _configuration(
    name: str,
    kernel: Any,
    dtype: str,
    constexprs: dict[str, Any],
    tile: Tile,
    archs: tuple[int, ...],
) -> Configuration:
    typed, shaped = {"x", *"qkvog", "dq", "dk", "dv"}, "fp32" if dtype == "fp16" else dtype
    signature = {
        a: "i32" if a in _SIZES else "fp32" if a == "scale" else "*i32" if a == "cu_seqlens"
        else f"*{shaped if a.startswith('shaped') else dtype if a in typed else 'fp32'}"
        for a in kernel.arg_names
        if a not in constexprs
    }  # fmt: skip
    addresses = tuple(a for a, t in signature.items() if t.startswith("*"))
    return Configuration(name, kernel, signature, constexprs, addresses, tile.num_warps, tile.num_stages, FUSION, archs)
