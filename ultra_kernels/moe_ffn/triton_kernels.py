"""The experts of a mixture in Triton; the contract is in op.py, routing in _routes_triton.py.

Rows are pairs (token, choice) in the order of their experts. The first product gathers its tokens as it loads them and
applies bias and activation as it stores; the second writes each row, times its gate, to the place of its pair, so that
a token's k rows lie side by side and are added up in order. The backward is the same with other operands: rows of dy
are gathered, those of dx lie side by side. What the activation gave is computed again from `hidden`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from .. import _groups_triton as groups
from .. import _routes_triton
from .._groups_triton import FUSION, Tile, _group, _listed, _multiply
from .._routes_triton import route, route_backward
from .._triton import Configuration
from .reference import ACTIVATIONS, Experts, Routes

__all__ = ["backward", "configurations", "forward", "route", "route_backward"]


@triton.jit
def _activate(x, which):
    """Value and derivative, of silu (0), gelu (1), relu (2) or relu2 (3)."""
    if which == 0:
        s = tl.sigmoid(x)
        value = x * s
        slope = s + value * (1.0 - s)
    elif which == 1:
        cdf = 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)
        value = x * cdf
        slope = cdf + x * 0.3989422804014327 * tl.exp(x * x * -0.5)
    else:
        value = tl.where(x <= 0.0, 0.0, x)  # NaN stays NaN
        slope = tl.where(x <= 0.0, 0.0, 1.0)
        if which == 3:
            slope = value + value
            value = value * value
    return value, slope


@triton.jit
def _tile(x, first, i, n, width):
    """Addresses of the rows first + i and columns n of x `[., width]`: 32 bits beside one of 64 spare registers."""
    return x + first.to(tl.int64) * width + (i[:, None] * width + n[None, :])


@triton.jit
def _hidden(hidden, first, i, i_ok, n, F, activation, gated):
    """Of what stands before the activation: its value, its derivative, and the factor from the other half, 1 if none.

    hidden `[S, F or 2F]`, each F padded to a multiple of 32.
    """
    width = (F + 31) // 32 * 32
    at = _tile(hidden, first, i, n, width * (1 + gated))
    x = tl.load(at, mask=i_ok[:, None] & (n < F)[None, :], other=0.0).to(tl.float32)
    value, slope = _activate(x, activation)
    second = i_ok[:, None] & (n < tl.where(gated != 0, F, 0))[None, :]
    return value, slope, tl.load(at + width, mask=second, other=1.0).to(tl.float32)


@triton.jit
def _norm_factor(squares, F):
    return tl.rsqrt(tl.sum(squares, axis=1) / F + 1e-6)


_SIZES = [*groups.SIZES, "S", "activation", "gated", "kept", "num_parts", "top_k", "T"]


@triton.jit(do_not_specialize=_SIZES)
def up_kernel(
    x, weight, bias, ends, order, hidden, inner, E, n_units, k_units, num_bias, gather, activation, kept,
    UNIT: tl.constexpr, GATED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A tile of hidden = x[token] weight[e]ᵀ + bias[e] and of inner `[S, F]`, the activation of it, where kept is F.

    GATED: gate and up of a column are neighbours in the product's tile, so that one thread has both.
    """
    F, D = n_units * UNIT, k_units * UNIT
    width = (F + 31) // 32 * 32
    PARTS: tl.constexpr = 2 if GATED else 1
    pid, across = tl.program_id(0), tl.cdiv(width, BLOCK_N // PARTS)
    group, _, end, first = _group(ends, pid // across, E, BLOCK_M)
    if first >= end:
        return
    e = group.to(tl.int64) * PARTS * F
    i = tl.arange(0, BLOCK_M)
    m = first + i
    m_ok = m < end
    c, n0 = tl.arange(0, BLOCK_N), pid % across * (BLOCK_N // PARTS)
    column = n0 + c // PARTS
    row = column + c % PARTS * F
    x_rows = x + _listed(order, m, end, gather).to(tl.int64) * D
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    acc = _multiply(acc, x_rows, m_ok, weight + e * D, row, column < F, PARTS * F, D, False, BLOCK_K)
    acc += tl.load(bias + e + row, mask=column < tl.where(num_bias != 0, F, 0), other=0.0)[None, :]
    n = n0 + tl.arange(0, BLOCK_N // PARTS)
    to = _tile(hidden, first, i, n, PARTS * width)
    padded = m_ok[:, None] & (n < width)[None, :]  # zeros beyond F
    if GATED:
        gate, up = tl.split(tl.reshape(acc, (BLOCK_M, BLOCK_N // 2, 2)))
        tl.store(to, gate, mask=padded)
        tl.store(to + width, up, mask=padded)
        value, _ = _activate(gate, activation)
        value *= up
    else:
        tl.store(to, acc, mask=padded)
        value, _ = _activate(acc, activation)
    tl.store(_tile(inner, first, i, n, F), value, mask=m_ok[:, None] & (n < kept)[None, :])


@triton.jit(do_not_specialize=_SIZES)
def norm_kernel(
    hidden, gain, inner, S, n_units, activation, gated,
    UNIT: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """inner `[S, F]`: gain · RMSNorm of the activations, ROWS rows per program."""
    F = n_units * UNIT
    first = tl.program_id(0) * ROWS
    i, j = tl.arange(0, ROWS), tl.arange(0, COLS)
    i_ok = i < S - first
    squares = tl.zeros((ROWS, COLS), tl.float32)
    for n0 in range(0, F, COLS):
        value, _, other = _hidden(hidden, first, i, i_ok, n0 + j, F, activation, gated)
        squares += value * other * (value * other)
    r = _norm_factor(squares, F)
    for n0 in range(0, F, COLS):
        n = n0 + j
        value, _, other = _hidden(hidden, first, i, i_ok, n, F, activation, gated)
        normal = value * other * r[:, None] * tl.load(gain + n, mask=n < F, other=0.0)[None, :]
        tl.store(_tile(inner, first, i, n, F), normal, mask=i_ok[:, None] & (n < F)[None, :])


@triton.jit(do_not_specialize=_SIZES)
def combine_kernel(
    rows, y, T, n_units, top_k,
    UNIT: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """y `[T, D]`: the sum of the k rows of every token; rows `[T · k, D]`."""
    D = n_units * UNIT
    t = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    n = tl.program_id(1) * COLS + tl.arange(0, COLS)
    inside = (t < T)[:, None] & (n < D)[None, :]
    total = tl.zeros((ROWS, COLS), tl.float32)
    for j in range(0, top_k):
        row = t.to(tl.int64) * top_k + j
        total += tl.load(rows + row[:, None] * D + n[None, :], mask=inside, other=0.0).to(tl.float32)
    tl.store(y + t.to(tl.int64)[:, None] * D + n[None, :], total, mask=inside)


@triton.jit
def _store_gradients(dvalue, value, slope, other, scale, dhidden, inner, first, i, i_ok, n, F, gated, kept):
    """dhidden `[S, F or 2F]` of dvalue, the gradient of value · other; where kept is F also inner `[S, F]` · scale."""
    tl.store(_tile(inner, first, i, n, F), value * other * scale, mask=i_ok[:, None] & (n < kept)[None, :])
    to = _tile(dhidden, first, i, n, F * (1 + gated))
    tl.store(to + F, dvalue * value, mask=i_ok[:, None] & (n < tl.where(gated != 0, F, 0))[None, :])
    tl.store(to, dvalue * slope * other, mask=i_ok[:, None] & (n < F)[None, :])


@triton.jit(do_not_specialize=_SIZES)
def inner_grad_kernel(
    dy, weight, hidden, ends, order, gates, dhidden, inner, parts, S, E, n_units, k_units, gather, activation, gated,
    kept, UNIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """From dinner = dy[token] weight[e], weight `[E, D, F]`: dhidden, inner · gate, and parts `[tiles of F, S]`.

    parts are what <dinner, inner>, a gate's gradient, is the sum of.
    """
    F, D = n_units * UNIT, k_units * UNIT
    pid, across = tl.program_id(0), tl.cdiv(F, BLOCK_N)
    group, _, end, first = _group(ends, pid // across, E, BLOCK_M)
    if first >= end:
        return
    i = tl.arange(0, BLOCK_M)
    m = first + i
    m_ok = m < end
    n = pid % across * BLOCK_N + tl.arange(0, BLOCK_N)
    dy_rows = dy + _listed(order, m, end, gather).to(tl.int64) * D
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    acc = _multiply(acc, dy_rows, m_ok, weight + group.to(tl.int64) * D * F, n, n < F, F, D, True, BLOCK_K)
    gate = tl.load(gates + _listed(order, m, end, 1), mask=m_ok, other=0.0)[:, None]
    value, slope, other = _hidden(hidden, first, i, m_ok, n, F, activation, gated)
    _store_gradients(acc * gate, value, slope, other, gate, dhidden, inner, first, i, m_ok, n, F, gated, kept)
    dots = tl.sum(acc * (value * other), axis=1)
    tl.store(parts + (pid % across).to(tl.int64) * S + m, dots, mask=m_ok)


@triton.jit(do_not_specialize=_SIZES)
def norm_grad_kernel(
    dinner, hidden, gain, order, gates, dhidden, inner, parts, dgain, S, n_units, activation, gated, kept,
    UNIT: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """The same from dinner `[S, F]` where inner is gain · RMSNorm: parts `[S]`; dgain `[blocks of rows, F]`, sums."""
    F = n_units * UNIT
    first = tl.program_id(0) * ROWS
    i, j = tl.arange(0, ROWS), tl.arange(0, COLS)
    m, i_ok = first + i, i < S - first
    squares = tl.zeros((ROWS, COLS), tl.float32)
    along = tl.zeros((ROWS, COLS), tl.float32)
    for n0 in range(0, F, COLS):
        n = n0 + j
        value, _, other = _hidden(hidden, first, i, i_ok, n, F, activation, gated)
        d = tl.load(_tile(dinner, first, i, n, F), mask=i_ok[:, None] & (n < F)[None, :], other=0.0).to(tl.float32)
        squares += value * other * (value * other)
        along += value * other * (d * tl.load(gain + n, mask=n < F, other=0.0)[None, :])
    r = _norm_factor(squares, F)
    dots = tl.sum(along, axis=1) * r
    tl.store(parts + m, dots, mask=i_ok)
    r, mean = r[:, None], (dots / F)[:, None]
    gate = tl.load(gates + _listed(order, m, S, 1), mask=i_ok, other=0.0)[:, None]
    sums = dgain + tl.program_id(0).to(tl.int64) * F
    for n0 in range(0, F, COLS):
        n = n0 + j
        value, slope, other = _hidden(hidden, first, i, i_ok, n, F, activation, gated)
        d = tl.load(_tile(dinner, first, i, n, F), mask=i_ok[:, None] & (n < F)[None, :], other=0.0).to(tl.float32)
        g = tl.load(gain + n, mask=n < F, other=0.0)[None, :]
        normal = value * other * r
        tl.store(sums + n, tl.sum(d * normal * gate, axis=0), mask=n < F)
        dvalue = (d * g - normal * mean) * (r * gate)
        _store_gradients(dvalue, value, slope, other, r * g * gate, dhidden, inner, first, i, i_ok, n, F, gated, kept)


@triton.jit(do_not_specialize=_SIZES)
def gates_grad_kernel(
    parts, dy, bias, ends, order, dgates, S, E, num_parts, num_bias, gather,
    UNIT: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """dgates by pair: the sum of parts `[num_parts, S]`, and <dy[token], bias[e]> where num_bias is D. Grid: tiles."""
    group, _, end, first = _group(ends, tl.program_id(0), E, ROWS)
    if first >= end:
        return
    D = num_bias // UNIT * UNIT
    m = first + tl.arange(0, ROWS)
    j = tl.arange(0, COLS)
    total = tl.zeros((ROWS,), tl.float32)
    for _ in range(0, num_parts):
        total += tl.load(parts + m, mask=m < end, other=0.0)
        parts += S
    dy_rows = dy + _listed(order, m, end, gather).to(tl.int64)[:, None] * D
    along = tl.zeros((ROWS, COLS), tl.float32)
    for n0 in range(0, D, COLS):
        n = n0 + j
        d = tl.load(dy_rows + n[None, :], mask=(m < end)[:, None] & (n < D)[None, :], other=0.0).to(tl.float32)
        along += d * tl.load(bias + group.to(tl.int64) * D + n, mask=n < D, other=0.0)[None, :]
    total += tl.sum(along, axis=1)
    tl.store(dgates + _listed(order, m, end, 1), total, mask=m < end)


# Rows per expert -> the tile, as in _groups_triton; here several tiles of numbers lie beside the accumulator.
INNER_GRAD = {
    16: Tile(16, 128, 64, 4, 4),
    128: Tile(64, 128, 64, 8, 3),
    256: Tile(128, 64, 64, 8, 3),
}
ROWS, COLS, WARPS = 16, 128, 8  # rows and columns of kernels without products


def forward(x: torch.Tensor, routes: Routes, experts: Experts, hidden: torch.Tensor) -> torch.Tensor:
    """y `[T, D]`; fills `hidden`."""
    w_in, w_out, b_in, b_out, sub_norm, activation, gated = experts
    x, w_in = x.contiguous(), w_in.contiguous()
    (T, D), (E, _, F), k = x.shape, w_out.shape, routes.gates.shape[1]
    S, which = T * k, list(ACTIVATIONS).index(activation)
    inner, unit = x.new_empty(S, F), groups.unit_of(D, F)
    tile = groups.tile_of(x.dtype, S, E, unit, groups.HALF, groups.SINGLE)
    if not S:
        return torch.empty_like(x)
    columns = triton.cdiv(triton.cdiv(F, 32) * 32, tile.block_n // (2 if gated else 1))
    up_kernel[(groups.tiles_of_rows(S, E, tile.block_m) * columns,)](
        x, w_in, routes.gates if b_in is None else b_in.contiguous(), routes.ends, routes.order, hidden, inner, E,
        F // unit, D // unit, 0 if b_in is None else F, k, which, F if sub_norm is None else 0, UNIT=unit, GATED=gated,
        **tile.blocks, **tile.options,
    )  # fmt: skip
    if sub_norm is not None:
        unit = groups.unit_of(F)
        norm_kernel[(triton.cdiv(S, ROWS),)](
            hidden, sub_norm.contiguous(), inner, S, F // unit, which, int(gated), UNIT=unit, **_ROW_OPTIONS
        )
    rows = groups.grouped_linear(inner, w_out, b_out, routes.ends, order=routes.order, scatter=True, gates=routes.gates)
    return rows if k == 1 else _combined(rows, x.new_empty(x.shape))


def backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    routes: Routes,
    experts: Experts,
    hidden: torch.Tensor,
    grads: list[torch.Tensor | None],
) -> None:
    """Fills the gradients of x, gates, w_in, w_out, b_in, b_out and sub_norm; None: not wanted, but for the gates'."""
    w_in, w_out, _, b_out, sub_norm, activation, gated = experts
    dy, w_out = dy.contiguous(), w_out.contiguous()
    (T, D), (E, _, F), k = x.shape, w_out.shape, routes.gates.shape[1]
    S, which, parts_of_F = T * k, list(ACTIVATIONS).index(activation), 2 if gated else 1
    dx, dgates, dw_in, dw_out, db_in, db_out, dsub_norm = grads
    gates, order, _, ends = routes
    dhidden, inner = x.new_empty(S, parts_of_F * F), x.new_empty(S if dw_out is not None else 0, F)
    kept = 0 if dw_out is None else F
    if S and sub_norm is None:
        unit = groups.unit_of(D, F)
        tile = groups.tile_of(x.dtype, S, E, unit, INNER_GRAD, groups.SINGLE)
        across = triton.cdiv(F, tile.block_n)
        parts = gates.new_empty(across, S)
        inner_grad_kernel[(groups.tiles_of_rows(S, E, tile.block_m) * across,)](
            dy, w_out, hidden, ends, order, gates, dhidden, inner, parts, S, E, F // unit, D // unit, k, which,
            int(gated), kept, UNIT=unit, **tile.blocks, **tile.options,
        )  # fmt: skip
    elif S:
        assert sub_norm is not None
        unit, blocks = groups.unit_of(F), triton.cdiv(S, ROWS)
        dinner = groups.grouped_linear(dy, w_out, None, ends, transposed=True, order=order, gather=k)
        parts, dgain = gates.new_empty(1, S), gates.new_empty(blocks, F)
        norm_grad_kernel[(blocks,)](
            dinner, hidden, sub_norm.contiguous(), order, gates, dhidden, inner, parts, dgain, S, F // unit, which,
            int(gated), kept, UNIT=unit, **_ROW_OPTIONS,
        )  # fmt: skip
        if dsub_norm is not None:
            torch.sum(dgain, 0, out=dsub_norm)
    elif dsub_norm is not None:
        dsub_norm.zero_()
    if S and dgates is not None:
        unit = groups.unit_of(D)
        gates_grad_kernel[(groups.tiles_of_rows(S, E, ROWS),)](
            parts, dy, gates if b_out is None else b_out.contiguous(), ends, order, dgates, S, E, len(parts),
            0 if b_out is None else D, k, UNIT=unit, **_ROW_OPTIONS,
        )  # fmt: skip
    if db_in is not None:
        groups.grouped_sums(dhidden, ends, out=db_in)
    if db_out is not None:
        groups.grouped_sums(dy, ends, out=db_out, order=order, gather=k, gates=gates)
    if dw_out is not None:
        groups.grouped_weight_grad(dy, inner, ends, out=dw_out, order=order, gather_left=k)
    if dw_in is not None:
        groups.grouped_weight_grad(dhidden, x, ends, out=dw_in, order=order, gather_right=k)
    if dx is not None and S:
        rows = dx if k == 1 else x.new_empty(S, D)
        groups.grouped_linear(dhidden, w_in, None, ends, transposed=True, order=order, scatter=True, out=rows)
        if k > 1:
            _combined(rows, dx)


def _combined(rows: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """y `[T, D]`, filled with the sums of each token's rows."""
    (T, D), unit = y.shape, groups.unit_of(y.shape[1])
    combine_kernel[(triton.cdiv(T, ROWS), triton.cdiv(D, COLS))](
        rows, y, T, D // unit, len(rows) // T, UNIT=unit, **_ROW_OPTIONS
    )
    return y


_ROW_OPTIONS = {"ROWS": ROWS, "COLS": COLS, "num_warps": WARPS, "num_stages": 1, "enable_fp_fusion": FUSION}


def configurations() -> list[Configuration]:
    """What the functions above launch: every dtype and tile, sizes divisible by 16 or not."""
    return list(_configurations())


def _configurations() -> Iterator[Configuration]:
    yield from _routes_triton.configurations()
    yield from groups.configurations()
    single = ("bias", "gates", "parts", "gain", "dgain", "dgates")
    for gated in (False, True):
        name = f"up{'-gated' * gated}"
        yield from groups.tile_configurations(name, up_kernel, groups.HALF, groups.SINGLE, single, {"GATED": gated})
    yield from groups.tile_configurations("inner-grad", inner_grad_kernel, INNER_GRAD, groups.SINGLE, single)
    for kernel in (norm_kernel, combine_kernel, norm_grad_kernel, gates_grad_kernel):
        name = kernel.fn.__name__.removesuffix("_kernel").replace("_", "-")
        yield from groups.row_configurations(name, kernel, WARPS, single, {"ROWS": ROWS, "COLS": COLS})
