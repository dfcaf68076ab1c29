"""Retention in Triton; the contract is in op.py.

One kernel computes a tile of rows of o = scale · Σ_m gamma^|n-m| (q_n·k_m) v_m as flash attention does, without the
softmax. It is its own backward: dQ = Ret(dO, V, K), dK = Retᵀ(V, dO, Q), dV = Retᵀ(K, Q, dO), where ᵀ swaps the sides;
no accumulator is transposed, which Triton 3.4 to 3.7.0 get wrong on Hopper. Direction, packing and states are run-time
values, so that one kernel per dtype and head dimension serves all of them. A prologue on q and k (rotary) belongs into
`_load`'s callers, an epilogue (norm, gate) before the last store; a tile then has to cover V.

Off the diagonal gamma^|n-m| is a product of a row, a column and a tile factor, each at most 1; the tiles on the
diagonal compute the powers. Keys further away than gamma^24 halvings are skipped: what that leaves out of a row is at
most 2^-24 / (1 - gamma) times its largest term, half a float32 rounding of the whole sum were its terms alike.

In the chunkwise form `state_kernel` walks along each sequence and leaves the state Σ gamma^.. k vᵀ at chunk borders,
for one side or both; the tile kernel then looks at keys of its own chunk and multiplies its queries with the states of
the two borders. The parallel form is one chunk. A state that enters from the left is S = Σ_{m < c0} gamma^(c0-1-m) k vᵀ
and meets query n with gamma^(n-c0+1); one from the right is S = Σ_{m >= c1} gamma^(m-c1+1) k vᵀ and meets it with
gamma^(c1-1-n). So the gradient of a final state enters from the right as it is, and what leaves on the left is the
gradient of the initial state.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from .. import _triton
from .._rows_triton import _load, _readable, _rows, _scores, _sequence, _strides
from .._triton import ARCHS, Configuration


@triton.jit
def _first_slot(sequence, begin, num_seqs, T, SIZE):
    """The slot of a sequence's first block of SIZE rows."""
    if num_seqs > 0:
        slot = begin // SIZE + sequence
    else:
        slot = sequence * ((T + SIZE - 1) // SIZE)
    return slot


@triton.jit
def _decay(log_decay, h):
    """log2 gamma, finite: 0 · inf would be NaN."""
    return tl.maximum(tl.load(log_decay + h) * 1.4426950408889634, -16384.0)


@triton.jit
def _state_unit(g, T):
    """States are stored times this, as averages: float16 then holds them wherever it holds k v^T."""
    return tl.maximum(1.0 - tl.exp2(g), 1.0 / tl.maximum(T, 1))


def _stride_names(names: str) -> list[str]:
    return [f"{name}_{axis}" for name in names for axis in ("batch", "row", "head")]


# What no kernel is specialised on. Strides come in units of 8 elements and head dimensions in units of 16, which tells
# the compiler that loads of 16 bytes are in order.
_SHAPE = ["T", "H", "K16", "V16", "num_seqs", "v_tiles", "chunk", "state_slots", "left", "right", "scale_first"]
_TILE_SIZES = [*_stride_names("qkvr"), *_SHAPE, "slots", "has_states", "wants_dscale"]
_STATE_SIZES = [*_stride_names("kv"), *_SHAPE, "k_tiles", "has_initial", "wants_final"]


@triton.jit(do_not_specialize=_TILE_SIZES)
def tile_kernel(
    q, k, v, o, r, states, log_decay, scale, dscale, cu_seqlens,
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head, r_batch, r_row, r_head,
    T, H, K16, V16, num_seqs, slots, v_tiles, chunk, state_slots,
    left, right, has_states, scale_first, wants_dscale,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    WHOLE_K: tl.constexpr,
):  # fmt: skip
    """o[n] from the keys of n's chunk on the wanted sides and from the states at the chunk's borders.

    Grid: v tiles, then slots of BLOCK_M rows, then heads. scale multiplies o or, with scale_first, all but the states'
    part. dscale `[H, slots, v_tiles]` receives Σ o·r / scale of each tile, r `[B,T,H,V]`.
    """
    BLOCK_D: tl.constexpr = min(BLOCK_K, 64)
    pid = tl.program_id(0)
    v_tile = pid % v_tiles
    slot = pid // v_tiles % slots
    h = pid // v_tiles // slots
    K, V = K16 * 16, V16 * 16
    sequence, batch, begin, end, block = _sequence(cu_seqlens, slot, num_seqs, T, BLOCK_M)
    n0 = begin + block * BLOCK_M
    if n0 >= end:
        return
    c = block * BLOCK_M // chunk
    c0 = begin + c * chunk
    c1 = tl.minimum(c0 + chunk, end)
    g = _decay(log_decay, h)
    factor = tl.load(scale + h)
    inner = tl.where(scale_first != 0, factor, 1.0)
    a, j = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    e = v_tile * BLOCK_V + tl.arange(0, BLOCK_V)
    n = n0 + a
    n_ok = n < end
    q_rows = _rows(q, batch, h, n, q_batch, q_row, q_head)
    acc = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)

    if has_states != 0:
        entry = (_first_slot(sequence, begin, num_seqs, T, chunk) + c).to(tl.int64) * H + h
        for side in range(0, left + right):
            power = tl.where(side < left, n - c0 + 1, c1 - 1 - n)
            row = tl.exp2(tl.maximum(power, 0).to(tl.float32) * g)
            state = states + (side * state_slots.to(tl.int64) * H + entry) * K * V
            for d0 in range(0, K, BLOCK_D):
                d = d0 + tl.arange(0, BLOCK_D)
                q_part = _load(q_rows, n_ok, d, K).to(tl.float32) * row[:, None]
                s_part = _load(state + d * V, d < K, e, V)
                acc = tl.dot(q_part.to(q.dtype.element_ty), s_part, acc, input_precision="ieee")
        acc = acc / _state_unit(g, T)

    # keys of the tile's own rows
    q_tile = 0.0
    if WHOLE_K:
        q_tile = _load(q_rows, n_ok, tl.arange(0, BLOCK_K), K)
    for m0 in range(n0, n0 + BLOCK_M, BLOCK_N):
        m = m0 + j
        m_ok = m < end
        k_rows = _rows(k, batch, h, m, k_batch, k_row, k_head)
        s = _scores(q_tile, q_rows, n_ok, k_rows, m_ok, K, BLOCK_K, WHOLE_K)
        gap = n[:, None] - m[None, :]
        wanted = ((gap >= 0) & (left != 0)) | ((gap <= 0) & (right != 0))
        s = tl.where(wanted, s * inner * tl.exp2(tl.abs(gap).to(tl.float32) * g), 0.0)
        values = _load(_rows(v, batch, h, m, v_batch, v_row, v_head), m_ok, e, V)
        acc = tl.dot(s.to(v.dtype.element_ty), values, acc, input_precision="ieee")

    # keys before, then keys after: gamma^distance of the nearest pair, of each row to it, of each key to it
    reach = tl.minimum(24.0 / tl.maximum(-g, 1e-7), 1e9).to(tl.int32) + 1
    n_left = left * ((tl.minimum(n0 - c0, reach) + BLOCK_N - 1) // BLOCK_N)
    n_right = right * ((tl.minimum(tl.maximum(c1 - n0 - BLOCK_M, 0), reach) + BLOCK_N - 1) // BLOCK_N)
    row_left, row_right = tl.exp2(a.to(tl.float32) * g), tl.exp2((BLOCK_M - 1 - a).to(tl.float32) * g)
    key_left, key_right = tl.exp2((BLOCK_N - 1 - j).to(tl.float32) * g), tl.exp2(j.to(tl.float32) * g)
    for i in range(0, n_left + n_right):
        before = i < n_left
        away = tl.where(before, i, i - n_left) * BLOCK_N
        m = tl.where(before, n0 - BLOCK_N - away, n0 + BLOCK_M + away) + j
        m_ok = m < c1
        k_rows = _rows(k, batch, h, m, k_batch, k_row, k_head)
        s = _scores(q_tile, q_rows, n_ok, k_rows, m_ok, K, BLOCK_K, WHOLE_K)
        row = tl.where(before, row_left, row_right) * (inner * tl.exp2((away + 1).to(tl.float32) * g))
        s = s * row[:, None] * tl.where(before, key_left, key_right)[None, :]
        values = _load(_rows(v, batch, h, m, v_batch, v_row, v_head), m_ok, e, V)
        acc = tl.dot(s.to(v.dtype.element_ty), values, acc, input_precision="ieee")

    if wants_dscale != 0:
        r_tile = _load(_rows(r, batch, h, n, r_batch, r_row, r_head), n_ok, e, V)
        # flattened: Triton 3.6 cannot reduce a tile of sm_100's tensor memory along an axis
        total = tl.sum(tl.ravel(acc * r_tile.to(tl.float32)), axis=0)
        tl.store(dscale + (h.to(tl.int64) * slots + slot) * v_tiles + v_tile, total)
    acc = acc * tl.where(scale_first != 0, 1.0, factor)
    o_rows = o + ((batch * T.to(tl.int64) + n) * H + h) * V
    tl.store(o_rows[:, None] + e[None, :], acc, mask=n_ok[:, None] & (e < V)[None, :])


@triton.jit(do_not_specialize=_STATE_SIZES)
def state_kernel(
    k, v, states, initial, final, log_decay, scale, cu_seqlens,
    k_batch, k_row, k_head, v_batch, v_row, v_head,
    T, H, K16, V16, num_seqs, k_tiles, v_tiles, chunk, state_slots,
    left, right, scale_first, has_initial, wants_final,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """states `[sides, state_slots, H, K, V]`: what enters each chunk from the left, from the right, or from each.

    Grid: k tiles, then v tiles, sides, heads, sequences. initial and final `[num_seqs,H,K,V]` are the state at either
    end of a sequence, in the order of the walk. With scale_first k vᵀ is scaled.
    """
    pid = tl.program_id(0)
    k_tile = pid % k_tiles
    v_tile = pid // k_tiles % v_tiles
    side = pid // k_tiles // v_tiles % (left + right)
    h = pid // k_tiles // v_tiles // (left + right) % H
    sequence = pid // k_tiles // v_tiles // (left + right) // H
    K, V = K16 * 16, V16 * 16
    if num_seqs > 0:
        batch = 0
        begin = tl.load(cu_seqlens + sequence)
        end = tl.load(cu_seqlens + sequence + 1)
    else:
        batch = sequence
        begin = 0
        end = T
    from_left = side < left
    g = _decay(log_decay, h)
    unit = _state_unit(g, T)
    factor = tl.load(scale + h) if scale_first != 0 else 1.0
    d = k_tile * BLOCK_K + tl.arange(0, BLOCK_K)
    e = v_tile * BLOCK_V + tl.arange(0, BLOCK_V)
    j = tl.arange(0, BLOCK_T)
    inside = (d < K)[:, None] & (e < V)[None, :]
    at = d[:, None] * V + e[None, :]
    end_at = (sequence.to(tl.int64) * H + h) * K * V + at
    first_slot = side * state_slots.to(tl.int64) + _first_slot(sequence, begin, num_seqs, T, chunk)
    acc = tl.zeros((BLOCK_K, BLOCK_V), tl.float32)
    if has_initial != 0:
        acc = tl.load(initial + end_at, mask=inside, other=0.0)
    blocks = (end - begin + BLOCK_T - 1) // BLOCK_T
    per_chunk = chunk // BLOCK_T
    for i in range(0, blocks):
        block = tl.where(from_left, i, blocks - 1 - i)
        place = block % per_chunk
        if tl.where(from_left, place == 0, (place == per_chunk - 1) | (i == 0)):
            tl.store(states + ((first_slot + block // per_chunk) * H + h) * K * V + at, acc * unit, mask=inside)
        m0 = begin + block * BLOCK_T
        m1 = tl.minimum(m0 + BLOCK_T, end)
        m_ok = m0 + j < m1
        k_rows = _rows(k, batch, h, m0 + j, k_batch, k_row, k_head)
        v_rows = _rows(v, batch, h, m0 + j, v_batch, v_row, v_head)
        keys = tl.load(k_rows[None, :] + d[:, None], mask=m_ok[None, :] & (d < K)[:, None], other=0.0)
        power = tl.where(from_left, m1 - m0 - 1 - j, j + 1).to(tl.float32)
        weight = tl.exp2(tl.maximum(power, 0.0) * g) * factor
        keys = (keys.to(tl.float32) * weight[None, :]).to(k.dtype.element_ty)
        acc = acc * tl.exp2((m1 - m0).to(tl.float32) * g)
        acc = tl.dot(keys, _load(v_rows, m_ok, e, V), acc, input_precision="ieee")
    if wants_final != 0:
        tl.store(final + end_at, acc, mask=inside)


@triton.jit(do_not_specialize=["H", "K"])
def step_kernel(
    q, k, v, state, o, new_state, log_decay, scale, H, K, V,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """One token of one head, BLOCK_V columns of its state per program; everything is contiguous."""
    v_tiles = (V + BLOCK_V - 1) // BLOCK_V
    row = (tl.program_id(0) // v_tiles).to(tl.int64)
    h = row % H
    e = tl.program_id(0) % v_tiles * BLOCK_V + tl.arange(0, BLOCK_V)
    values = tl.load(v + row * V + e, mask=e < V, other=0.0).to(tl.float32)
    gamma = tl.exp2(_decay(log_decay, h))
    products = tl.zeros((BLOCK_K, BLOCK_V), tl.float32)
    for d0 in range(0, K, BLOCK_K):
        d = d0 + tl.arange(0, BLOCK_K)
        inside = (d < K)[:, None] & (e < V)[None, :]
        at = (row * K + d)[:, None] * V + e[None, :]
        keys = tl.load(k + row * K + d, mask=d < K, other=0.0).to(tl.float32)
        s = gamma * tl.load(state + at, mask=inside, other=0.0) + keys[:, None] * values[None, :]
        tl.store(new_state + at, s, mask=inside)
        products += tl.load(q + row * K + d, mask=d < K, other=0.0).to(tl.float32)[:, None] * s
    tl.store(o + row * V + e, tl.sum(products, axis=0) * tl.load(scale + h), mask=e < V)


class Tile(NamedTuple):
    block_m: int
    block_n: int
    block_k: int
    block_v: int
    num_warps: int
    num_stages: int


class StateTile(NamedTuple):
    block_t: int
    block_k: int
    block_v: int
    num_warps: int
    num_stages: int


# (width that scores sum over, width of the output), up to which a half-precision tile serves.
WIDTHS = ((32, 32), (64, 64), (64, 128), (128, 64), (128, 128), (256, 128))
# By architecture, the oldest that a tile is for; not timed on a GPU yet. sm_80 spills at 128 rows, and at 64 keys for
# small heads.
HALF = {
    80: {(k, v): Tile(64, 32, k, v, 4, 2) if k + v <= 128 else Tile(64, 64, k, v, 8, 2) for k, v in WIDTHS},
    90: {(k, v): Tile(128, 64, k, v, 4 if k == 32 else 8, 2) for k, v in WIDTHS},
}
# Float32 products run on the plain units, which hold the operands of a whole block in registers: 64 rows spill with
# Triton 3.6 on sm_80 and sm_90.
SINGLE = Tile(32, 32, 16, 64, 8, 1)
HALF_STATE = StateTile(64, 64, 64, 4, 2)
SINGLE_STATE = StateTile(32, 32, 32, 4, 1)
STEP = StateTile(1, 64, 64, 4, 1)
FUSION = True  # Triton's own default differs between versions


def tile_of(q: torch.Tensor, K: int, V: int) -> Tile:
    """K is the width that scores sum over, V that of the output; a wider output takes several tiles."""
    if q.dtype == torch.float32:
        return SINGLE
    table = HALF[max(arch for arch in HALF if arch <= max(_triton.arch_of(q), min(HALF)))]
    return table[next((k, v) for k, v in WIDTHS if k >= K and (v >= V or v == 128))]


def chunk_length(length: int, K: int, V: int) -> int | None:
    """None: the parallel form, which is taken while its products are at most twice those of the chunkwise form.

    The factor is for the states' way through memory and the second launch. Chunks are long enough that the states of
    one side have at most as many elements as k and v.
    """
    chunk = max(128, 2 * min(K, V))
    parallel, chunkwise = length * (K + V), chunk * (K + V) + 4 * K * V
    return None if parallel <= 2 * chunkwise else chunk


class Problem(NamedTuple):
    """What the launches of one call share."""

    log_decay: torch.Tensor  # [H] float32
    scale: torch.Tensor  # [H] float32
    cu_seqlens: torch.Tensor  # int32; empty without packing
    packed: bool
    sequences: int
    chunk: int | None  # as asked for


def forward(
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
    """o and the final state, empty unless asked for. `chunk` is rounded up to a multiple of the tile's rows."""
    problem = _problem(q, log_decay, scale, head_scale, cu_seqlens, chunk)
    left, right = direction != "backward", direction != "forward"
    o, final, _ = _retention(problem, q, k, v, left, right, initial=initial_state, wants_final=output_final_state)
    return o, final


def backward(
    grad: torch.Tensor,
    grad_final: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor,
    scale: float,
    head_scale: torch.Tensor | None,
    direction: str,
    cu_seqlens: torch.Tensor | None,
    initial_state: torch.Tensor | None,
    chunk: int | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """dq, dk, dv; in float32 dhead_scale and dinitial_state, each empty where its input is None."""
    problem = _problem(q, log_decay, scale, head_scale, cu_seqlens, chunk)
    left, right = direction != "backward", direction != "forward"
    before, after = (None if state is None else state.mT for state in (initial_state, grad_final))
    dscale_rows = None if head_scale is None else q
    dq, _, dscale = _retention(problem, grad, v, k, left, right, initial=before, dscale_rows=dscale_rows)
    dk, _, _ = _retention(problem, v, grad, q, right, left, scale_first=True, initial=after)
    dv, dinitial, _ = _retention(
        problem, k, q, grad, right, left, scale_first=True, initial=grad_final, wants_final=initial_state is not None
    )
    return dq, dk, dv, dscale, dinitial


def _problem(
    q: torch.Tensor,
    log_decay: torch.Tensor,
    scale: float,
    head_scale: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    chunk: int | None,
) -> Problem:
    B, _, H, _ = q.shape
    factors = q.new_full((H,), scale, dtype=torch.float32) if head_scale is None else _float32(head_scale)
    packed = cu_seqlens is not None
    borders = q.new_empty(0, dtype=torch.int32) if cu_seqlens is None else cu_seqlens.int().contiguous()
    return Problem(_float32(log_decay), factors, borders, packed, borders.numel() - 1 if packed else B, chunk)


def _retention(
    problem: Problem,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    left: bool,
    right: bool,
    *,
    scale_first: bool = False,
    initial: torch.Tensor | None = None,
    wants_final: bool = False,
    dscale_rows: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """o [B,T,H,V] of q, k [B,T,H,K] and v [B,T,H,V], the final states, and dscale [H] where its rows are given."""
    (B, T, H, K), V = q.shape, v.shape[3]
    q, k, v = _readable(q), _readable(k), _readable(v)
    r = q if dscale_rows is None else _readable(dscale_rows)
    tile, rows = tile_of(q, K, V), max(T, 1)
    chunk = problem.chunk or chunk_length(T // max(problem.sequences, 1) if problem.packed else T, K, V) or rows
    chunk = triton.cdiv(min(chunk, rows), tile.block_m) * tile.block_m
    num_seqs = problem.sequences if problem.packed else 0

    def slots_of(size: int) -> int:
        return T // size + num_seqs if problem.packed else B * triton.cdiv(T, size)

    has_states = chunk < T or initial is not None or wants_final
    shape = dict(
        T=T, H=H, K16=triton.cdiv(K, 16), V16=triton.cdiv(V, 16), num_seqs=num_seqs, chunk=chunk,
        state_slots=slots_of(chunk), left=int(left), right=int(right), scale_first=int(scale_first),
    )  # fmt: skip
    states, final = v, problem.scale  # what is not used is an address of its type
    if has_states:
        states, final = _states(problem, k, v, shape, initial, wants_final)
    o = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    slots, v_tiles = slots_of(tile.block_m), triton.cdiv(V, tile.block_v)
    dscale = problem.scale if dscale_rows is None else problem.scale.new_zeros(H, slots, v_tiles)
    if grid := v_tiles * slots * H:
        tile_kernel[(grid,)](
            q, k, v, o, r, states, problem.log_decay, problem.scale, dscale, problem.cu_seqlens,
            *_strides(q), *_strides(k), *_strides(v), *_strides(r), slots=slots, v_tiles=v_tiles,
            has_states=int(has_states), wants_dscale=int(dscale_rows is not None),
            BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k, BLOCK_V=tile.block_v,
            WHOLE_K=q.dtype != torch.float32, num_warps=tile.num_warps, num_stages=tile.num_stages,
            enable_fp_fusion=FUSION, **shape,
        )  # fmt: skip
    none = problem.scale.new_empty(0)
    return (
        o[..., :V].contiguous(),
        final[..., :K, :V].contiguous() if wants_final else none,
        none if dscale_rows is None else dscale.sum((1, 2)),
    )


def _states(
    problem: Problem,
    k: torch.Tensor,
    v: torch.Tensor,
    shape: dict[str, int],
    initial: torch.Tensor | None,
    wants_final: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What enters every chunk, and the final states [sequences,H,K,V]; K and V are multiples of 16."""
    (H, K), V, sides = k.shape[2:], v.shape[3], shape["left"] + shape["right"]
    tile = SINGLE_STATE if k.dtype == torch.float32 else HALF_STATE
    states = v.new_empty(sides, shape["state_slots"], H, K, V)
    start, final = problem.scale, problem.scale
    if initial is not None:
        start = F.pad(initial.float(), (0, V - initial.shape[3], 0, K - initial.shape[2])).contiguous()
    if wants_final:
        final = v.new_empty(problem.sequences, H, K, V, dtype=torch.float32)
    k_tiles, v_tiles = triton.cdiv(K, tile.block_k), triton.cdiv(V, tile.block_v)
    if grid := k_tiles * v_tiles * sides * H * problem.sequences:
        state_kernel[(grid,)](
            k, v, states, start, final, problem.log_decay, problem.scale, problem.cu_seqlens,
            *_strides(k), *_strides(v), k_tiles=k_tiles, v_tiles=v_tiles,
            has_initial=int(initial is not None), wants_final=int(wants_final),
            BLOCK_T=tile.block_t, BLOCK_K=tile.block_k, BLOCK_V=tile.block_v,
            num_warps=tile.num_warps, num_stages=tile.num_stages, enable_fp_fusion=FUSION, **shape,
        )  # fmt: skip
    return states, final


def _float32(x: torch.Tensor) -> torch.Tensor:
    return x.detach().float().contiguous()


def step_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor,
    state: torch.Tensor,
    scale: float,
    head_scale: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    (B, H, K), V = q.shape, v.shape[2]
    factors = q.new_full((H,), scale, dtype=torch.float32) if head_scale is None else _float32(head_scale)
    o, new_state = v.new_empty(v.shape), state.new_empty(state.shape, dtype=torch.float32)
    if grid := B * H * triton.cdiv(V, STEP.block_v):
        step_kernel[(grid,)](
            q.contiguous(), k.contiguous(), v.contiguous(), _float32(state), o, new_state, _float32(log_decay), factors,
            H, K, V, BLOCK_K=STEP.block_k, BLOCK_V=STEP.block_v, num_warps=STEP.num_warps, num_stages=STEP.num_stages,
            enable_fp_fusion=FUSION,
        )  # fmt: skip
    return o, new_state


def configurations() -> list[Configuration]:
    """Every specialisation that the ops of this folder launch.

    bfloat16 and float16 differ in the type of the products alone, so that one is compiled for every architecture.
    """
    return [*_configurations(), *_step_configurations()]


def _compiled(dtype: str) -> tuple[int, ...]:
    return (90,) if dtype == "fp16" else ARCHS


def _configurations() -> Iterator[Configuration]:
    def tiled(name: str, tile: Tile, dtype: str, archs: tuple[int, ...]) -> Configuration:
        types = dict.fromkeys(("q", "k", "v", "o", "r", "states"), dtype)
        blocks = {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k, "BLOCK_V": tile.block_v}
        constexprs = blocks | {"WHOLE_K": dtype != "fp32"}
        return _configuration(f"tile-{name}", tile_kernel, types, constexprs, tile.num_warps, tile.num_stages, archs)

    newest = (*list(HALF)[1:], max(ARCHS) + 1)
    for dtype in ("bf16", "fp16"):
        for (oldest, table), until in zip(HALF.items(), newest, strict=True):
            archs = tuple(a for a in ARCHS if oldest <= a < until and a in _compiled(dtype))
            for (k, v), tile in table.items():
                yield tiled(f"{dtype}-sm{oldest}-{k}-{v}", tile, dtype, archs)
    yield tiled("fp32", SINGLE, "fp32", ARCHS)
    for dtype, block in (("bf16", HALF_STATE), ("fp16", HALF_STATE), ("fp32", SINGLE_STATE)):
        types = dict.fromkeys(("k", "v", "states"), dtype)
        blocks = {"BLOCK_T": block.block_t, "BLOCK_K": block.block_k, "BLOCK_V": block.block_v}
        yield _configuration(
            f"state-{dtype}", state_kernel, types, blocks, block.num_warps, block.num_stages, _compiled(dtype)
        )


def _step_configurations() -> Iterator[Configuration]:
    for dtype in ("bf16", "fp16", "fp32"):
        for odd in (False, True):
            types, blocks = dict.fromkeys("qkvo", dtype), {"BLOCK_K": STEP.block_k, "BLOCK_V": STEP.block_v}
            name = f"step-{dtype}{'-odd' if odd else ''}"
            aligned = () if odd else ("V",)
            yield _configuration(
                name, step_kernel, types, blocks, STEP.num_warps, STEP.num_stages, _compiled(dtype), aligned
            )


def _configuration(
    name: str,
    kernel: Any,
    types: dict[str, str],
    constexprs: dict[str, Any],
    num_warps: int,
    num_stages: int,
    archs: tuple[int, ...],
    aligned: tuple[str, ...] = (),
) -> Configuration:
    """`types` of the tensors that are neither float32 nor the borders; numbers have capitals or are in the lists."""
    numbers = {*_TILE_SIZES, *_STATE_SIZES, "K", "V"}
    signature = {
        a: "i32" if a in numbers else "*i32" if a == "cu_seqlens" else f"*{types.get(a, 'fp32')}"
        for a in kernel.arg_names
        if a not in constexprs
    }
    addresses = tuple(a for a, t in signature.items() if t.startswith("*"))
    return Configuration(
        name, kernel, signature, constexprs, (*addresses, *aligned), num_warps, num_stages, FUSION, archs
    )
