"""HoPE attention in Triton; the contract is in op.py.

In light-cone coordinates u = (x1 + x2)/√2, w = (x1 - x2)/√2 of every pair, a logit is Σ e^(-r_u |m-n|) q_u k_u +
e^(-r_w |m-n|) q_w k_w; for keys on the other side the two rates swap. A tile of BLOCK queries and BLOCK keys off the
diagonal splits e^(-r |m-n|) into a factor of each query row up to the edge of its tile, one of each key row up to the
edge of its own, and one of each channel for the gap between the edges, all at most 1. The operand that a program streams
(keys forward and for dq, queries for dk and dv) is turned and shaped for both sides by `shape_kernel` beforehand; the one
that it holds is turned by itself and takes the gap's factor. On the diagonal both rows are seen from the tile's centre,
where the factors reach 2^±(BLOCK log2 e): those products are of float32 operands, and damping, which has no bound,
multiplies them afterwards. Rotary heads turn by other matrices and have rates of 0.

Softmax runs in powers of 2. The backward has a program per tile of queries for dq and one per tile of keys for dk and
dv, so that no sum depends on an order; transposed scores are products of their own, since Triton 3.4 to 3.7.0 get a
transposed accumulator wrong on Hopper. A prefix is few keys without positions: torch's products handle it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from .. import _triton
from .._rows_triton import _load, _readable, _rows, _sequence, _strides
from .._triton import ARCHS, Configuration
from .op import rates


@triton.jit
def _turned(x, row_ok, place, d, K2, row_stride, rotary, cosine, sine):
    """Rows at `x` as the two channels of every pair, in float32; place: positions for rotary heads."""
    ok = row_ok[:, None] & (d < K2)[None, :]
    at = x[:, None] + 2 * d[None, :]
    x1 = tl.load(at, mask=ok, other=0.0).to(tl.float32)
    x2 = tl.load(at + 1, mask=ok, other=0.0).to(tl.float32)
    if rotary != 0:
        where = place.to(tl.int64)[:, None] * row_stride + d[None, :]
        c = tl.load(cosine + where, mask=ok, other=0.0)
        s = tl.load(sine + where, mask=ok, other=0.0)
        u = x1 * c - x2 * s
        w = x2 * c + x1 * s
    else:
        u = (x1 + x2) * 0.7071067811865476
        w = (x1 - x2) * 0.7071067811865476
    return u, w


@triton.jit
def _store_back(x, du, dw, row_ok, place, d, K2, row_stride, rotary, cosine, sine):
    """The transpose of _turned: gradients of both channels into the rows at `x`."""
    ok = row_ok[:, None] & (d < K2)[None, :]
    if rotary != 0:
        where = place.to(tl.int64)[:, None] * row_stride + d[None, :]
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
def _shaped_rows(x, side, batch, h, n, B, T, H, WIDTH: tl.constexpr):
    """Rows of x [2,B,T,H,2,WIDTH]."""
    return x + (((side * B + batch) * T.to(tl.int64) + n) * H + h) * (2 * WIDTH)


_SIZES = [
    "B", "T", "H", "K2", "V16", "num_seqs", "slots", "rotary_heads", "causal", "table_row", "last_first",
    *(f"{x}_{axis}" for x in "xqkvg" for axis in ("batch", "row", "head")),
]  # fmt: skip


@triton.jit(do_not_specialize=_SIZES)
def shape_kernel(
    x, shaped, rate, damping, cosine, sine, cu_seqlens, scale,
    x_batch, x_row, x_head, B, T, H, K2, num_seqs, slots, rotary_heads, table_row, last_first,
    BLOCK: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """shaped `[2,B,T,H,2,WIDTH]` = scale · turned x times its rows' factors, for keys on the left and on the right.

    last_first 1: on the left, rows are seen from their tile's last row (keys); 0: from its first (queries).
    """
    pid = tl.program_id(0)
    slot = pid % slots
    h = pid // slots
    _, batch, begin, end, block = _sequence(cu_seqlens, slot, num_seqs, T, BLOCK)
    i, d = tl.arange(0, BLOCK), tl.arange(0, WIDTH)
    n0 = begin + block * BLOCK
    n = n0 + i
    ok = n < end
    rotary = (h < rotary_heads).to(tl.int32)
    u, w = _turned(
        _raw_rows(x, batch, h, n, x_batch, x_row, x_head), ok, n - begin, d, K2, table_row, rotary, cosine, sine
    )
    near, far, damp = _rates(rate, damping, d, K2, rotary)
    for side in tl.static_range(2):
        away = tl.where(last_first == 1 - side, BLOCK - 1 - i, i).to(tl.float32)[:, None]
        r_u, r_w = (near, far) if side == 0 else (far, near)
        rows = _shaped_rows(shaped, side, batch, h, n, B, T, H, WIDTH)[:, None] + d[None, :]
        tl.store(rows, u * tl.exp2(-away * (r_u + damp)[None, :]) * scale, mask=ok[:, None])
        tl.store(rows + WIDTH, w * tl.exp2(-away * (r_w + damp)[None, :]) * scale, mask=ok[:, None])


@triton.jit
def _gap_factors(near, far, damp, gap, on_left):
    """What each channel loses over `gap` tokens between the edges of two tiles."""
    distance = -gap.to(tl.float32)
    r_u = tl.where(on_left, near, far)
    r_w = tl.where(on_left, far, near)
    return tl.exp2(distance * (r_u + damp)), tl.exp2(distance * (r_w + damp))


@triton.jit
def _centred(u, w, i, near, far, sign, BLOCK: tl.constexpr):
    """Rows seen from the tile's centre: times e^(-sign (i - BLOCK/2) rate)."""
    away = -sign * (i - BLOCK // 2).to(tl.float32)[:, None]
    return u * tl.exp2(away * near[None, :]), w * tl.exp2(away * far[None, :])


@triton.jit
def _diagonal(au, aw, bu, bw, gap, near, far, damp, i, query_first: tl.constexpr, causal, BLOCK: tl.constexpr,
              PRECISION: tl.constexpr):  # fmt: skip
    """Logits of a tile on the diagonal, in powers of 2; gap = m - n as a tile. Rows are queries or, transposed, keys."""
    sign = 1.0 if query_first else -1.0
    lu, lw = _centred(au, aw, i, near, far, sign, BLOCK)
    ku, kw = _centred(bu, bw, i, near, far, -sign, BLOCK)
    left = tl.dot(lu, tl.trans(ku), input_precision=PRECISION)
    left = tl.dot(lw, tl.trans(kw), left, input_precision=PRECISION)
    lu, lw = _centred(au, aw, i, far, near, -sign, BLOCK)
    ku, kw = _centred(bu, bw, i, far, near, sign, BLOCK)
    right = tl.dot(lu, tl.trans(ku), input_precision=PRECISION)
    right = tl.dot(lw, tl.trans(kw), right, input_precision=PRECISION)
    decay = tl.exp2(-tl.abs(gap).to(tl.float32) * damp)
    right = tl.where(causal != 0, float("-inf"), right * decay)
    return tl.where(gap >= 0, left * decay, right)


@triton.jit(do_not_specialize=_SIZES)
def forward_kernel(
    q, k, shaped_k, v, o, lse, rate, damping, cosine, sine, cu_seqlens, scale,
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head,
    B, T, H, K2, V16, num_seqs, slots, rotary_heads, causal, table_row,
    BLOCK: tl.constexpr, WIDTH: tl.constexpr, BLOCK_V: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """o `[B,T,H,V]` and lse `[B,H,T]`, in powers of 2, of one tile of queries. Grid: slots of BLOCK rows, then heads."""
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
    qu, qw = _turned(
        _raw_rows(q, batch, h, m, q_batch, q_row, q_head), m_ok, m - begin, d, K2, table_row, rotary, cosine, sine
    )
    qu, qw = qu * scale, qw * scale

    # the diagonal first: every row sees a key there
    ku, kw = _turned(
        _raw_rows(k, batch, h, m, k_batch, k_row, k_head), m_ok, m - begin, d, K2, table_row, rotary, cosine, sine
    )
    s = _diagonal(qu, qw, ku, kw, i[:, None] - i[None, :], near, far, damp, i, True, causal, BLOCK, PRECISION)
    s = tl.where(m_ok[None, :], s, float("-inf"))
    most = tl.max(s, axis=1)
    p = tl.exp2(s - most[:, None])
    total = tl.sum(p, axis=1)
    values = _load(_rows(v, batch, h, m, v_batch, v_row, v_head), m_ok, e, V)
    acc = tl.dot(p.to(v.dtype.element_ty), values, input_precision="ieee")

    n_left = block
    n_right = tl.where(causal != 0, 0, (tl.maximum(end - n0 - BLOCK, 0) + BLOCK - 1) // BLOCK)
    row_u, row_w = i.to(tl.float32)[:, None], (BLOCK - 1 - i).to(tl.float32)[:, None]
    left_u, left_w = qu * tl.exp2(-row_u * (near + damp)[None, :]), qw * tl.exp2(-row_u * (far + damp)[None, :])
    right_u, right_w = qu * tl.exp2(-row_w * (far + damp)[None, :]), qw * tl.exp2(-row_w * (near + damp)[None, :])
    for t in range(0, n_left + n_right):
        on_left = t < n_left
        key = tl.where(on_left, begin + t * BLOCK, n0 + (t - n_left + 1) * BLOCK)
        gap = tl.where(on_left, n0 - key - BLOCK + 1, key - n0 - BLOCK + 1)
        gap_u, gap_w = _gap_factors(near, far, damp, gap, on_left)
        n = key + i
        n_ok = n < end
        k_rows = _shaped_rows(shaped_k, tl.where(on_left, 0, 1), batch, h, n, B, T, H, WIDTH)
        a = (tl.where(on_left, left_u, right_u) * gap_u[None, :]).to(q.dtype.element_ty)
        b = (tl.where(on_left, left_w, right_w) * gap_w[None, :]).to(q.dtype.element_ty)
        s = tl.dot(a, tl.trans(_load(k_rows, n_ok, d, WIDTH)), input_precision="ieee")
        s = tl.dot(b, tl.trans(_load(k_rows + WIDTH, n_ok, d, WIDTH)), s, input_precision="ieee")
        s = tl.where(n_ok[None, :], s, float("-inf"))
        largest = tl.maximum(most, tl.max(s, axis=1))
        shrink = tl.exp2(most - largest)
        p = tl.exp2(s - largest[:, None])
        total = total * shrink + tl.sum(p, axis=1)
        values = _load(_rows(v, batch, h, n, v_batch, v_row, v_head), n_ok, e, V)
        acc = tl.dot(p.to(v.dtype.element_ty), values, acc * shrink[:, None], input_precision="ieee")
        most = largest

    o_rows = o + ((batch * T.to(tl.int64) + m) * H + h) * V
    tl.store(o_rows[:, None] + e[None, :], acc / total[:, None], mask=m_ok[:, None] & (e < V)[None, :])
    tl.store(lse + (batch * H + h) * T.to(tl.int64) + m, most + tl.log2(total), mask=m_ok)


@triton.jit(do_not_specialize=_SIZES)
def dq_kernel(
    q, k, shaped_k, v, g, dq, ddamping, lse, delta, rate, damping, cosine, sine, cu_seqlens, scale,
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head, g_batch, g_row, g_head,
    B, T, H, K2, V16, num_seqs, slots, rotary_heads, causal, table_row,
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
    qu, qw = _turned(
        _raw_rows(q, batch, h, m, q_batch, q_row, q_head), m_ok, m - begin, d, K2, table_row, rotary, cosine, sine
    )
    qu, qw = qu * scale, qw * scale
    row = (batch * H + h) * T.to(tl.int64) + m
    most = tl.load(lse + row, mask=m_ok, other=float("inf"))[:, None]
    own = tl.load(delta + row, mask=m_ok, other=0.0)[:, None]
    dout = _load(_rows(g, batch, h, m, g_batch, g_row, g_head), m_ok, e, V)

    ku, kw = _turned(
        _raw_rows(k, batch, h, m, k_batch, k_row, k_head), m_ok, m - begin, d, K2, table_row, rotary, cosine, sine
    )
    gap = i[:, None] - i[None, :]
    s = _diagonal(qu, qw, ku, kw, gap, near, far, damp, i, True, causal, BLOCK, PRECISION)
    p = tl.exp2(tl.where(m_ok[None, :], s, float("-inf")) - most)
    values = _load(_rows(v, batch, h, m, v_batch, v_row, v_head), m_ok, e, V)
    ds = p * (tl.dot(dout, tl.trans(values), input_precision="ieee") - own)
    distance = tl.abs(gap).to(tl.float32)
    by_damping = tl.sum(tl.where(p > 0, ds * s, 0.0) * distance, axis=1)
    ds = ds * tl.exp2(-distance * damp)
    below, above = tl.where(gap >= 0, ds, 0.0), tl.where(gap < 0, ds, 0.0)
    bu, bw = _centred(ku, kw, i, near, far, -1.0, BLOCK)
    du = tl.dot(below, bu, input_precision=PRECISION)
    dw = tl.dot(below, bw, input_precision=PRECISION)
    du, dw = _centred(du, dw, i, near, far, 1.0, BLOCK)
    bu, bw = _centred(ku, kw, i, far, near, 1.0, BLOCK)
    au, aw = _centred(
        tl.dot(above, bu, input_precision=PRECISION), tl.dot(above, bw, input_precision=PRECISION), i, far, near, -1.0,
        BLOCK,
    )  # fmt: skip
    du, dw = du + au, dw + aw

    for side in tl.static_range(2):
        # static: each side has sums of its own, which get their rows' factors once
        count = tl.where(causal != 0, 0, (tl.maximum(end - n0 - BLOCK, 0) + BLOCK - 1) // BLOCK) if side else block
        away = ((BLOCK - 1 - i) if side else i).to(tl.float32)[:, None]
        r_u, r_w = (far, near) if side else (near, far)
        factor_u, factor_w = tl.exp2(-away * (r_u + damp)[None, :]), tl.exp2(-away * (r_w + damp)[None, :])
        side_u, side_w = qu * factor_u, qw * factor_w
        sum_u = tl.zeros((BLOCK, WIDTH), tl.float32)
        sum_w = tl.zeros((BLOCK, WIDTH), tl.float32)
        for t in range(0, count):
            key = n0 + (t + 1) * BLOCK if side else begin + t * BLOCK
            between = (key - n0 if side else n0 - key) - BLOCK + 1
            gap_u, gap_w = _gap_factors(r_u, r_w, damp, between, True)
            n = key + i
            n_ok = n < end
            k_rows = _shaped_rows(shaped_k, side, batch, h, n, B, T, H, WIDTH)
            bu, bw = _load(k_rows, n_ok, d, WIDTH), _load(k_rows + WIDTH, n_ok, d, WIDTH)
            a, b = (side_u * gap_u[None, :]).to(q.dtype.element_ty), (side_w * gap_w[None, :]).to(q.dtype.element_ty)
            s = tl.dot(a, tl.trans(bu), input_precision="ieee")
            s = tl.dot(b, tl.trans(bw), s, input_precision="ieee")
            p = tl.exp2(tl.where(n_ok[None, :], s, float("-inf")) - most)
            values = _load(_rows(v, batch, h, n, v_batch, v_row, v_head), n_ok, e, V)
            ds = p * (tl.dot(dout, tl.trans(values), input_precision="ieee") - own)
            by_damping += tl.sum(ds * s * tl.abs(m[:, None] - n[None, :]).to(tl.float32), axis=1)
            ds = ds.to(q.dtype.element_ty)
            sum_u += tl.dot(ds, bu, input_precision="ieee") * gap_u[None, :]
            sum_w += tl.dot(ds, bw, input_precision="ieee") * gap_w[None, :]
        du += sum_u * factor_u
        dw += sum_w * factor_w

    unit = scale * 0.6931471805599453
    rows = dq + ((batch * T.to(tl.int64) + m) * H + h) * (2 * K2)
    _store_back(rows, du * unit, dw * unit, m_ok, m - begin, d, K2, table_row, rotary, cosine, sine)
    total = tl.sum(tl.where(m_ok, by_damping, 0.0), axis=0) * tl.where(rotary != 0, 0.0, 0.6931471805599453)
    tl.store(ddamping + h.to(tl.int64) * slots + slot, total)


@triton.jit(do_not_specialize=_SIZES)
def dkdv_kernel(
    q, k, shaped_q, v, g, dk, dv, lse, delta, rate, damping, cosine, sine, cu_seqlens, scale,
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head, g_batch, g_row, g_head,
    B, T, H, K2, V16, num_seqs, slots, rotary_heads, causal, table_row,
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
    ku, kw = _turned(
        _raw_rows(k, batch, h, n, k_batch, k_row, k_head), n_ok, n - begin, d, K2, table_row, rotary, cosine, sine
    )
    values = _load(_rows(v, batch, h, n, v_batch, v_row, v_head), n_ok, e, V)
    head_row = (batch * H + h) * T.to(tl.int64)

    qu, qw = _turned(
        _raw_rows(q, batch, h, n, q_batch, q_row, q_head), n_ok, n - begin, d, K2, table_row, rotary, cosine, sine
    )
    qu, qw = qu * scale, qw * scale
    gap = i[None, :] - i[:, None]
    most = tl.load(lse + head_row + n, mask=n_ok, other=float("inf"))[None, :]
    own = tl.load(delta + head_row + n, mask=n_ok, other=0.0)[None, :]
    dout = _load(_rows(g, batch, h, n, g_batch, g_row, g_head), n_ok, e, V)
    s = _diagonal(ku, kw, qu, qw, gap, near, far, damp, i, False, causal, BLOCK, PRECISION)
    p = tl.exp2(tl.where(n_ok[:, None], s, float("-inf")) - most)
    dvalues = tl.dot(p.to(v.dtype.element_ty), dout, input_precision="ieee")
    ds = p * (tl.dot(values, tl.trans(dout), input_precision="ieee") - own)
    ds = ds * tl.exp2(-tl.abs(gap).to(tl.float32) * damp)
    below, above = tl.where(gap >= 0, ds, 0.0), tl.where(gap < 0, ds, 0.0)
    bu, bw = _centred(qu, qw, i, near, far, 1.0, BLOCK)
    du = tl.dot(below, bu, input_precision=PRECISION)
    dw = tl.dot(below, bw, input_precision=PRECISION)
    du, dw = _centred(du, dw, i, near, far, -1.0, BLOCK)
    bu, bw = _centred(qu, qw, i, far, near, -1.0, BLOCK)
    au, aw = _centred(
        tl.dot(above, bu, input_precision=PRECISION), tl.dot(above, bw, input_precision=PRECISION), i, far, near, 1.0,
        BLOCK,
    )  # fmt: skip
    du, dw = du + au, dw + aw

    for side in tl.static_range(2):
        # side 0: these keys are on the left of their queries, which come after them
        after = (tl.maximum(end - n0 - BLOCK, 0) + BLOCK - 1) // BLOCK
        count = tl.where(causal != 0, 0, block) if side else after
        away = (i if side else (BLOCK - 1 - i)).to(tl.float32)[:, None]
        r_u, r_w = (far, near) if side else (near, far)
        factor_u, factor_w = tl.exp2(-away * (r_u + damp)[None, :]), tl.exp2(-away * (r_w + damp)[None, :])
        side_u, side_w = ku * factor_u, kw * factor_w
        sum_u = tl.zeros((BLOCK, WIDTH), tl.float32)
        sum_w = tl.zeros((BLOCK, WIDTH), tl.float32)
        for t in range(0, count):
            query = begin + t * BLOCK if side else n0 + (t + 1) * BLOCK
            between = (n0 - query if side else query - n0) - BLOCK + 1
            gap_u, gap_w = _gap_factors(r_u, r_w, damp, between, True)
            m = query + i
            m_ok = m < end
            q_rows = _shaped_rows(shaped_q, side, batch, h, m, B, T, H, WIDTH)
            bu, bw = _load(q_rows, m_ok, d, WIDTH), _load(q_rows + WIDTH, m_ok, d, WIDTH)
            a, b = (side_u * gap_u[None, :]).to(q.dtype.element_ty), (side_w * gap_w[None, :]).to(q.dtype.element_ty)
            s = tl.dot(a, tl.trans(bu), input_precision="ieee")
            s = tl.dot(b, tl.trans(bw), s, input_precision="ieee")
            most = tl.load(lse + head_row + m, mask=m_ok, other=float("inf"))[None, :]
            own = tl.load(delta + head_row + m, mask=m_ok, other=0.0)[None, :]
            dout = _load(_rows(g, batch, h, m, g_batch, g_row, g_head), m_ok, e, V)
            p = tl.exp2(s - most)
            dvalues = tl.dot(p.to(v.dtype.element_ty), dout, dvalues, input_precision="ieee")
            ds = (p * (tl.dot(values, tl.trans(dout), input_precision="ieee") - own)).to(q.dtype.element_ty)
            sum_u += tl.dot(ds, bu, input_precision="ieee") * gap_u[None, :]
            sum_w += tl.dot(ds, bw, input_precision="ieee") * gap_w[None, :]
        du += sum_u * factor_u
        dw += sum_w * factor_w

    ok = n_ok[:, None] & (e < V)[None, :]
    tl.store((dv + ((batch * T.to(tl.int64) + n) * H + h) * V)[:, None] + e[None, :], dvalues, mask=ok)
    rows = dk + ((batch * T.to(tl.int64) + n) * H + h) * (2 * K2)
    unit = 0.6931471805599453
    _store_back(rows, du * unit, dw * unit, n_ok, n - begin, d, K2, table_row, rotary, cosine, sine)


class Tile(NamedTuple):
    block: int
    num_warps: int
    num_stages: int


WIDTHS = (16, 32, 64)  # of half a head: the smallest product of the tensor units is 16 long
VALUES = (16, 32, 64, 128)
# (kernel, half precision) -> tile. Not timed on a GPU yet. Float32 products run on the plain units, which hold the
# operands in registers.
TILES = {
    ("forward", True): Tile(64, 4, 2),
    ("dq", True): Tile(64, 8, 1),
    ("dkdv", True): Tile(64, 8, 1),
    ("forward", False): Tile(32, 8, 1),
    ("dq", False): Tile(32, 8, 1),
    ("dkdv", False): Tile(32, 8, 1),
}
SHAPE_WARPS = 4
FUSION = True  # Triton's own default differs between versions
KERNELS = {"forward": forward_kernel, "dq": dq_kernel, "dkdv": dkdv_kernel}


def _block(half: bool) -> int:
    """Rows of a tile: the same in all kernels of a call, which see rows from the same edges."""
    return TILES["forward", half].block


class Problem(NamedTuple):
    """What the launches of one call share."""

    numbers: dict[str, Any]
    tables: dict[str, torch.Tensor]
    slots: int
    half: bool
    width: int
    block_v: int


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
    block = _block(half)
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
        "table_row": K // 2,
    }  # fmt: skip
    width = next(w for w in WIDTHS if 2 * w >= K)
    block_v = next(w for w in VALUES if w >= V)
    return Problem(numbers, tables, slots, half, width, block_v)


def _shaped(problem: Problem, x: torch.Tensor, scale: float, keys: bool) -> torch.Tensor:
    """x turned and shaped for both sides, in its own dtype."""
    out = x.new_empty(2, *x.shape[:3], 2, problem.width)
    if grid := problem.slots * x.shape[2]:
        shape_kernel[(grid,)](
            x, out, scale=scale, **_named("x", _elements(x)), last_first=int(keys), **problem.numbers, **problem.tables,
            BLOCK=_block(problem.half), WIDTH=problem.width, num_warps=SHAPE_WARPS, enable_fp_fusion=FUSION,
        )  # fmt: skip
    return out


def _elements(x: torch.Tensor) -> list[int]:
    """Strides of the first three axes; those of axes of length 1 mean nothing."""
    return [x.stride(i) if x.shape[i] > 1 else 0 for i in range(3)]


def _named(name: str, strides: list[int]) -> dict[str, int]:
    return dict(zip((f"{name}_batch", f"{name}_row", f"{name}_head"), strides, strict=True))


def _launch(kernel: str, problem: Problem, causal: bool, **arguments: Any) -> None:
    tile = TILES[kernel, problem.half]
    if grid := problem.slots * problem.numbers["H"]:
        KERNELS[kernel][(grid,)](
            **arguments, **problem.numbers, **problem.tables, causal=int(causal), BLOCK=tile.block, WIDTH=problem.width,
            BLOCK_V=problem.block_v, PRECISION="tf32" if problem.half else "ieee", num_warps=tile.num_warps,
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
        "forward", problem, causal, q=q, k=k, shaped_k=_shaped(problem, k, 1.0, keys=True), v=values, o=o, lse=lse,
        scale=scale * LOG2E, **_named("q", _elements(q)), **_named("k", _elements(k)), **_named("v", _strides(values)),
        V16=values.shape[3] // 16,
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
        q=q, k=k, v=values, g=cotangent, lse=lse * LOG2E, delta=delta, scale=scale * LOG2E,
        **_named("q", _elements(q)), **_named("k", _elements(k)), **_named("v", _strides(values)),
        **_named("g", _strides(cotangent)), V16=values.shape[3] // 16,
    )  # fmt: skip
    _launch("dq", problem, causal, shaped_k=_shaped(problem, k, 1.0, keys=True), dq=dq, ddamping=parts, **shared)
    _launch("dkdv", problem, causal, shaped_q=_shaped(problem, q, scale * LOG2E, keys=False), dk=dk, dv=dv, **shared)
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


def configurations() -> Iterator[Configuration]:
    """Every specialisation that the op launches; bfloat16 and float16 differ in the type of the products alone."""
    for dtype in ("bf16", "fp16", "fp32"):
        archs = (90,) if dtype == "fp16" else ARCHS
        half = dtype != "fp32"
        block = _block(half)
        for width in WIDTHS:
            yield _configuration(f"shape-{dtype}-{width}", shape_kernel, dtype, {"BLOCK": block, "WIDTH": width},
                                 SHAPE_WARPS, 3, archs)  # fmt: skip
            for block_v in VALUES:
                for name, kernel in KERNELS.items():
                    tile = TILES[name, half]
                    constexprs = {
                        "BLOCK": tile.block, "WIDTH": width, "BLOCK_V": block_v,
                        "PRECISION": "tf32" if half else "ieee",
                    }  # fmt: skip
                    yield _configuration(f"{name}-{dtype}-{width}-{block_v}", kernel, dtype, constexprs,
                                         tile.num_warps, tile.num_stages, archs)  # fmt: skip


def _configuration(
    name: str,
    kernel: Any,
    dtype: str,
    constexprs: dict[str, Any],
    num_warps: int,
    num_stages: int,
    archs: tuple[int, ...],
) -> Configuration:
    typed = {"x", "shaped", "q", "k", "v", "o", "g", "dq", "dk", "dv", "shaped_k", "shaped_q"}
    signature = {
        a: "i32" if a in _SIZES else "fp32" if a == "scale" else "*i32" if a == "cu_seqlens"
        else f"*{dtype if a in typed else 'fp32'}"
        for a in kernel.arg_names
        if a not in constexprs
    }  # fmt: skip
    addresses = tuple(a for a, t in signature.items() if t.startswith("*"))
    return Configuration(name, kernel, signature, constexprs, addresses, num_warps, num_stages, FUSION, archs)
