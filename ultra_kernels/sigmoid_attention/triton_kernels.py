"""Sigmoid attention in Triton; the contract is in op.py.

With z = -(scale · q·k + b) log2 e a weight is p = 1 / (1 + 2^z): no row needs its largest logit or a second pass, and a
weight near 1/n keeps its relative accuracy, which the hardware's tanh, right to 2^-11 of 1, would take from it. 2^z may
overflow to infinity, whose weight is 0; z has no limits, so that NaN in the inputs stays NaN.

A program holds a tile of rows and streams the other side. Rows beyond a sequence are read as zeros, which no product
shows: p · 0 forward, dP = dO vᵀ = 0 backward. So only tiles on the causal diagonal have masks, and the last tile where
weights are summed. They have a loop of their own.

With dP = dO vᵀ and dS = p (1 - p) dP: dQ = scale · dS K, dK = scale · dSᵀ Q, dV = pᵀ dO and dbias = Σ dS. A normalised
row o = Σ p v / r, r = Σ p + 1e-6, has dV = (p/r)ᵀ dO and dS = p (1 - p) (dP - δ) / r with δ = dO·o. The backward has a
program per tile of queries for dQ and one per tile of keys for dK and dV, so that no sum depends on an order.
Transposed scores are products of their own, k qᵀ: Triton 3.4 to 3.7.0 get a transposed accumulator wrong on Hopper.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from .. import _triton
from .._rows_triton import _load, _readable, _rows, _scores, _sequence, _strides
from .._triton import ARCHS, Configuration


@triton.jit
def _shift(head_bias, h, number, bias_kind, length):
    """-b log2 e, where b is a number (kind 0; it comes as -b log2 e), its head's (1), or -ln of the length (2)."""
    shift = number
    if bias_kind == 1:
        shift = tl.load(head_bias + h) * -1.4426950408889634
    if bias_kind == 2:
        shift = tl.log2(length.to(tl.float32))
    return shift


@triton.jit
def _weights(z):
    """1 / (1 + 2^z). The square of a reciprocal root is one instruction and a product; a division is about six."""
    root = tl.rsqrt(1.0 + tl.exp2(z))
    return root * root


@triton.jit
def _tile(rows, row_ok, d, width, EDGE: tl.constexpr):
    """The tile rows × channels; only at an edge may rows be outside of their sequence."""
    if EDGE:
        return _load(rows, row_ok, d, width)
    else:
        return tl.load(rows[:, None] + d[None, :], mask=(d < width)[None, :], other=0.0)


@triton.jit
def _products(a, a_rows, a_ok, b, b_rows, b_ok, width):
    """a bᵀ. Operands of float32 products lie in registers, so that these read parts of 16 channels at a time."""
    if a.dtype == tl.float32:
        return _scores(a, a_rows, a_ok, b_rows, b_ok, width, 16, False)
    else:
        return tl.dot(a, tl.trans(b))


@triton.jit
def _keys(begin, end, m0, causal, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The keys of queries m0 .. m0 + BLOCK_M: whole tiles that all of them see end at the first number, the rest at
    the second."""
    seen = tl.where(causal != 0, m0, end)
    last = tl.where(causal != 0, tl.minimum(m0 + BLOCK_M, end), end)
    return begin + (seen - begin) // BLOCK_N * BLOCK_N, last


# What no kernel is specialised on. Strides come in units of 8 elements and head dimensions in units of 16, which tells
# the compiler that loads of 16 bytes are in order.
_SIZES = [
    "T", "H", "K16", "V16", "num_seqs", "slots", "bias_kind", "causal", "normalize",
    *(f"{x}_{axis}" for x in "qkvg" for axis in ("batch", "row", "head")),
]  # fmt: skip


@triton.jit(do_not_specialize=_SIZES)
def forward_kernel(
    q, k, v, o, sums, head_bias, cu_seqlens, unit, number,
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head,
    T, H, K16, V16, num_seqs, slots, bias_kind, causal,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, EXTRA: tl.constexpr,
):  # fmt: skip
    """o `[B,T,H,V]` of one tile of queries; EXTRA: normalised, with the rows' sums `[B,H,T]`.

    Grid: slots of BLOCK_M rows, then heads. unit is -scale · log2 e.
    """
    pid = tl.program_id(0)
    slot = pid % slots
    h = pid // slots
    _, batch, begin, end, block = _sequence(cu_seqlens, slot, num_seqs, T, BLOCK_M)
    m0 = begin + block * BLOCK_M
    if m0 >= end:
        return
    K, V = K16 * 16, V16 * 16
    shift = _shift(head_bias, h, number, bias_kind, end - begin)
    d, j = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_N)
    m = m0 + tl.arange(0, BLOCK_M)
    m_ok = m < end
    q_rows = _rows(q, batch, h, m, q_batch, q_row, q_head)
    queries = _load(q_rows, m_ok, d, K)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    whole, last = _keys(begin, end, m0, causal, BLOCK_M, BLOCK_N)
    for edge in tl.static_range(2):
        first, stop = (whole, last) if edge else (begin, whole)
        for n0 in range(first, stop, BLOCK_N):
            n = n0 + j
            n_ok = n < end
            k_rows = _rows(k, batch, h, n, k_batch, k_row, k_head)
            s = _products(queries, q_rows, m_ok, _tile(k_rows, n_ok, d, K, edge), k_rows, n_ok, K)
            p = _weights(s * unit + shift)
            if edge:
                p = tl.where(n_ok[None, :] & ((causal == 0) | (m[:, None] >= n[None, :])), p, 0.0)
            if EXTRA:
                total += tl.sum(p, axis=1)
            values = _tile(_rows(v, batch, h, n, v_batch, v_row, v_head), n_ok, d, V, edge)
            acc = tl.dot(p.to(v.dtype.element_ty), values, acc, input_precision="ieee")
    if EXTRA:
        acc = acc / (total + 1e-6)[:, None]
        tl.store(sums + (batch * H + h) * T.to(tl.int64) + m, total, mask=m_ok)
    o_rows = o + ((batch * T.to(tl.int64) + m) * H + h) * V
    tl.store(o_rows[:, None] + d[None, :], acc, mask=m_ok[:, None] & (d < V)[None, :])


@triton.jit(do_not_specialize=_SIZES)
def dq_kernel(
    q, k, v, g, o, dq, sums, delta, factors, dbias, head_bias, cu_seqlens, unit, number, scale,
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head, g_batch, g_row, g_head,
    T, H, K16, V16, num_seqs, slots, bias_kind, causal, normalize,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, EXTRA: tl.constexpr,
):  # fmt: skip
    """dq `[B,T,H,K]` of one tile of queries from its gradient g.

    EXTRA: with normalize also δ and factors = 1/r `[B,H,T]`, from o `[B,T,H,V]` and sums; with a bias of each head Σ dS
    of the tile in dbias `[H,slots]`.
    """
    pid = tl.program_id(0)
    slot = pid % slots
    h = pid // slots
    _, batch, begin, end, block = _sequence(cu_seqlens, slot, num_seqs, T, BLOCK_M)
    m0 = begin + block * BLOCK_M
    if m0 >= end:
        return
    K, V = K16 * 16, V16 * 16
    shift = _shift(head_bias, h, number, bias_kind, end - begin)
    d, j = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_N)
    m = m0 + tl.arange(0, BLOCK_M)
    m_ok = m < end
    q_rows = _rows(q, batch, h, m, q_batch, q_row, q_head)
    g_rows = _rows(g, batch, h, m, g_batch, g_row, g_head)
    queries, cotangent = _load(q_rows, m_ok, d, K), _load(g_rows, m_ok, d, V)
    if EXTRA:
        by_row = tl.zeros((BLOCK_M,), tl.float32)
        normalized = m < tl.where(normalize != 0, end, begin)
        o_rows = o + ((batch * T.to(tl.int64) + m) * H + h) * V
        own = tl.sum(cotangent.to(tl.float32) * _load(o_rows, normalized, d, V).to(tl.float32), axis=1)
        head_rows = (batch * H + h) * T.to(tl.int64) + m
        factor = 1.0 / (tl.load(sums + head_rows, mask=normalized, other=1.0) + tl.where(normalize != 0, 1e-6, 0.0))
        tl.store(delta + head_rows, own, mask=normalized)
        tl.store(factors + head_rows, factor, mask=normalized)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    whole, last = _keys(begin, end, m0, causal, BLOCK_M, BLOCK_N)
    for edge in tl.static_range(2):
        first, stop = (whole, last) if edge else (begin, whole)
        for n0 in range(first, stop, BLOCK_N):
            n = n0 + j
            n_ok = n < end
            k_rows = _rows(k, batch, h, n, k_batch, k_row, k_head)
            v_rows = _rows(v, batch, h, n, v_batch, v_row, v_head)
            keys, values = _tile(k_rows, n_ok, d, K, edge), _tile(v_rows, n_ok, d, V, edge)
            p = _weights(_products(queries, q_rows, m_ok, keys, k_rows, n_ok, K) * unit + shift)
            if edge:
                p = tl.where((causal == 0) | (m[:, None] >= n[None, :]), p, 0.0)
            dp = _products(cotangent, g_rows, m_ok, values, v_rows, n_ok, V)
            if EXTRA:
                ds = (p - p * p) * (dp - own[:, None])  # beyond the sequence -p (1 - p) δ, of keys that are zero
                by_row += tl.sum(ds, axis=1)
            else:
                ds = (p - p * p) * dp
            acc = tl.dot(ds.to(k.dtype.element_ty), keys, acc, input_precision="ieee")
    if EXTRA:
        acc = acc * factor[:, None]
        if bias_kind == 1:
            tl.store(dbias + h.to(tl.int64) * slots + slot, tl.sum(by_row, axis=0))
    dq_rows = dq + ((batch * T.to(tl.int64) + m) * H + h) * K
    tl.store(dq_rows[:, None] + d[None, :], acc * scale, mask=m_ok[:, None] & (d < K)[None, :])


@triton.jit(do_not_specialize=_SIZES)
def dkdv_kernel(
    q, k, v, g, dk, dv, delta, factors, head_bias, cu_seqlens, unit, number, scale,
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head, g_batch, g_row, g_head,
    T, H, K16, V16, num_seqs, slots, bias_kind, causal,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, EXTRA: tl.constexpr,
):  # fmt: skip
    """dk `[B,T,H,K]` and dv `[B,T,H,V]` of one tile of BLOCK_M keys; scores are transposed, keys by BLOCK_N queries.

    EXTRA: normalised, with δ and factors `[B,H,T]`.
    """
    pid = tl.program_id(0)
    slot = pid % slots
    h = pid // slots
    _, batch, begin, end, block = _sequence(cu_seqlens, slot, num_seqs, T, BLOCK_M)
    n0 = begin + block * BLOCK_M
    if n0 >= end:
        return
    K, V = K16 * 16, V16 * 16
    shift = _shift(head_bias, h, number, bias_kind, end - begin)
    d, i = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_N)
    n = n0 + tl.arange(0, BLOCK_M)
    n_ok = n < end
    k_rows = _rows(k, batch, h, n, k_batch, k_row, k_head)
    v_rows = _rows(v, batch, h, n, v_batch, v_row, v_head)
    keys, values = _load(k_rows, n_ok, d, K), _load(v_rows, n_ok, d, V)
    dkeys = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    dvalues = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    head_rows = (batch * H + h) * T.to(tl.int64)
    # queries from the first that sees a key: tiles on the diagonal, whole tiles, and what is left
    start = tl.where(causal != 0, n0, begin)
    diagonal = tl.where(causal != 0, (tl.minimum(BLOCK_M, end - n0) + BLOCK_N - 1) // BLOCK_N, 0)
    after = start + diagonal * BLOCK_N
    whole = tl.maximum(end - after, 0) // BLOCK_N
    rest = after + whole * BLOCK_N
    edges = diagonal + (rest < end).to(tl.int32)
    for edge in tl.static_range(2):
        count = edges if edge else whole
        for t in range(0, count):
            m0 = tl.where(t < diagonal, start + t * BLOCK_N, rest) if edge else after + t * BLOCK_N
            m = m0 + i
            m_ok = m < end
            q_rows = _rows(q, batch, h, m, q_batch, q_row, q_head)
            g_rows = _rows(g, batch, h, m, g_batch, g_row, g_head)
            queries, cotangent = _tile(q_rows, m_ok, d, K, edge), _tile(g_rows, m_ok, d, V, edge)
            p = _weights(_products(keys, k_rows, n_ok, queries, q_rows, m_ok, K) * unit + shift)
            if edge:
                p = tl.where((causal == 0) | (m[None, :] >= n[:, None]), p, 0.0)
            dp = _products(values, v_rows, n_ok, cotangent, g_rows, m_ok, V)
            if EXTRA:
                own = tl.load(delta + head_rows + m, mask=m_ok, other=0.0)
                share = p * tl.load(factors + head_rows + m, mask=m_ok, other=0.0)[None, :]
                ds = (share - share * p) * (dp - own[None, :])
            else:
                share = p
                ds = (p - p * p) * dp
            dvalues = tl.dot(share.to(v.dtype.element_ty), cotangent, dvalues, input_precision="ieee")
            dkeys = tl.dot(ds.to(k.dtype.element_ty), queries, dkeys, input_precision="ieee")
    row = (batch * T.to(tl.int64) + n) * H + h
    tl.store((dk + row * K)[:, None] + d[None, :], dkeys * scale, mask=n_ok[:, None] & (d < K)[None, :])
    tl.store((dv + row * V)[:, None] + d[None, :], dvalues, mask=n_ok[:, None] & (d < V)[None, :])


class Tile(NamedTuple):
    block_m: int  # rows that a program holds
    block_n: int  # rows that it streams
    num_warps: int
    num_stages: int


# By architecture, the oldest that a table is for; kernel -> head dimension, the larger of K and V, up to which a tile
# serves. Not timed on a GPU yet. None spills with Triton 3.6 or 3.9; dkdv of 64 × 64 rows does on sm_80 at 64 channels,
# and normalised on sm_90 at 128. On sm_100 accumulators lie in tensor memory.
HALF = {
    80: {
        "forward": dict.fromkeys((16, 32, 64, 128), Tile(128, 64, 8, 2)),
        "dq": dict.fromkeys((16, 32, 64, 128), Tile(64, 64, 8, 2)),
        "dkdv": {**dict.fromkeys((16, 32, 64), Tile(64, 32, 4, 2)), 128: Tile(64, 32, 8, 2)},
    },
    90: {
        "forward": dict.fromkeys((16, 32, 64, 128), Tile(128, 64, 8, 2)),
        "dq": {**dict.fromkeys((16, 32, 64), Tile(128, 64, 8, 2)), 128: Tile(64, 64, 8, 2)},
        "dkdv": {**dict.fromkeys((16, 32, 64), Tile(128, 64, 8, 2)), 128: Tile(64, 32, 8, 2)},
    },
    100: {
        "forward": dict.fromkeys((16, 32, 64, 128), Tile(128, 64, 4, 2)),
        "dq": dict.fromkeys((16, 32, 64, 128), Tile(64, 64, 8, 2)),
        "dkdv": dict.fromkeys((16, 32, 64, 128), Tile(64, 64, 8, 2)),
    },
}
# Float32 products run on the plain units, which hold their operands in registers. dq at 128 channels spills 12 bytes
# with Triton 3.6 where rows are normalised or heads have biases.
SINGLE = {
    "forward": {32: Tile(32, 32, 8, 1), 64: Tile(64, 16, 8, 1), 128: Tile(32, 32, 8, 1)},
    "dq": {32: Tile(32, 32, 8, 1), 64: Tile(32, 32, 8, 1), 128: Tile(32, 32, 4, 1)},
    "dkdv": {32: Tile(32, 32, 8, 1), 64: Tile(32, 16, 8, 1), 128: Tile(64, 16, 8, 1)},
}
KERNELS = {"forward": forward_kernel, "dq": dq_kernel, "dkdv": dkdv_kernel}
LOG2E = 1.4426950408889634
FUSION = True  # Triton's own default differs between versions


class Problem(NamedTuple):
    """What the launches of one call share."""

    tensors: dict[str, torch.Tensor]
    numbers: dict[str, Any]
    tiles: dict[str, Tile]  # of each kernel
    width: int  # of the head dimensions that they serve


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    bias: float | None,
    head_bias: torch.Tensor | None,
    normalize: bool,
    causal: bool,
    cu_seqlens: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(o, the sums of each row's weights, or an empty tensor without normalize)."""
    problem = _problem(q, k, v, scale, bias, head_bias, normalize, causal, cu_seqlens)
    B, T, H, V = v.shape
    o = _like(problem.tensors["v"])
    sums = q.new_empty((B, H, T) if normalize else (0,), dtype=torch.float32)
    _launch("forward", problem, normalize, o=o, sums=sums)
    return o[..., :V].contiguous(), sums


def backward(
    grad: torch.Tensor,
    o: torch.Tensor | None,
    sums: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    bias: float | None,
    head_bias: torch.Tensor | None,
    normalize: bool,
    causal: bool,
    cu_seqlens: torch.Tensor | None,
) -> tuple[torch.Tensor, ...]:
    """Gradients of q, k, v, and in float32 of head_bias, empty where there is none."""
    problem = _problem(q, k, v, scale, bias, head_bias, normalize, causal, cu_seqlens)
    (B, T, H, K), V = q.shape, v.shape[3]
    tensors = problem.tensors
    g = _readable(grad.to(q.dtype))
    none = q.new_empty(0, dtype=torch.float32)  # what is not used is an address of its type
    out = g if o is None else _readable(o).contiguous()
    sums = none if sums is None else sums
    delta, factors = (none.new_empty((B, H, T) if normalize else (0,)) for _ in range(2))
    dq, dk, dv = _like(tensors["q"]), _like(tensors["k"]), _like(tensors["v"])
    dbias = none
    if head_bias is not None:
        dbias = none.new_zeros(H, _slots(problem, problem.tiles["dq"].block_m))
    shared = {"g": g, "delta": delta, "factors": factors, "scale": scale}
    own = {"o": out, "dq": dq, "sums": sums, "dbias": dbias, "normalize": int(normalize)}
    _launch("dq", problem, normalize or head_bias is not None, **own, **shared)
    _launch("dkdv", problem, normalize, dk=dk, dv=dv, **shared)
    return (
        dq[..., :K].contiguous(),
        dk[..., :K].contiguous(),
        dv[..., :V].contiguous(),
        none if head_bias is None else dbias.sum(1),
    )


def table_of(q: torch.Tensor) -> dict[str, dict[int, Tile]]:
    """Kernel -> head dimension -> tile, for the dtype and the architecture of q."""
    if q.dtype == torch.float32:
        return SINGLE
    return HALF[max(arch for arch in HALF if arch <= max(_triton.arch_of(q), min(HALF)))]


def _problem(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    bias: float | None,
    head_bias: torch.Tensor | None,
    normalize: bool,
    causal: bool,
    cu_seqlens: torch.Tensor | None,
) -> Problem:
    _, T, H, K = q.shape
    borders = q.new_empty(0, dtype=torch.int32) if cu_seqlens is None else cu_seqlens.int().contiguous()
    heads = q.new_empty(0, dtype=torch.float32) if head_bias is None else head_bias.detach().float().contiguous()
    number = 0.0 if normalize or bias is None else bias
    rows = {"q": _readable(q), "k": _readable(k), "v": _readable(v)}
    numbers = {
        "unit": -scale * LOG2E, "number": -number * LOG2E, "T": T, "H": H, "causal": int(causal),
        "K16": rows["k"].shape[3] // 16, "V16": rows["v"].shape[3] // 16,
        "num_seqs": 0 if cu_seqlens is None else borders.numel() - 1,
        "bias_kind": 0 if normalize or bias is not None else 2 if head_bias is None else 1,
    }  # fmt: skip
    table = table_of(q)
    width = next(width for width in table["forward"] if width >= max(K, v.shape[3]))
    tiles = {kernel: by_width[width] for kernel, by_width in table.items()}
    return Problem(rows | {"head_bias": heads, "cu_seqlens": borders}, numbers, tiles, width)


def _slots(problem: Problem, size: int) -> int:
    """Blocks of `size` rows, of all sequences."""
    (B, T), num_seqs = problem.tensors["q"].shape[:2], problem.numbers["num_seqs"]
    return T // size + num_seqs if num_seqs else B * triton.cdiv(T, size)


def _launch(kernel: str, problem: Problem, extra: bool, **arguments: Any) -> None:
    tile = problem.tiles[kernel]
    tensors = problem.tensors | {name: x for name, x in arguments.items() if isinstance(x, torch.Tensor)}
    strides = {
        f"{x}_{axis}": stride
        for x in ("qkvg" if "g" in tensors else "qkv")
        for axis, stride in zip(("batch", "row", "head"), _strides(tensors[x]), strict=True)
    }
    slots = _slots(problem, tile.block_m)
    if grid := slots * problem.numbers["H"]:
        KERNELS[kernel][(grid,)](
            **problem.tensors, **arguments, **problem.numbers, **strides, slots=slots, BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n, BLOCK_D=problem.width, EXTRA=extra, num_warps=tile.num_warps,
            num_stages=tile.num_stages, enable_fp_fusion=FUSION,
        )  # fmt: skip


def _like(rows: torch.Tensor) -> torch.Tensor:
    return torch.empty(rows.shape, dtype=rows.dtype, device=rows.device)


def configurations() -> list[Configuration]:
    """Every specialisation that the op launches.

    bfloat16 and float16 differ in the type of the products alone, so that one is compiled for every architecture.
    """
    return list(_configurations())


def _configurations() -> Iterator[Configuration]:
    newest = (*list(HALF)[1:], max(ARCHS) + 1)
    tables: list[tuple[str, str, tuple[int, ...], dict[str, dict[int, Tile]]]] = [("fp32", "fp32", ARCHS, SINGLE)]
    for dtype, compiled in (("bf16", ARCHS), ("fp16", (90,))):
        for (oldest, table), until in zip(HALF.items(), newest, strict=True):
            archs = tuple(a for a in compiled if oldest <= a < until)
            tables.append((f"{dtype}-sm{oldest}", dtype, archs, table))
    for prefix, dtype, archs, table in tables:
        for kernel, extra in itertools.product(KERNELS, (False, True)):
            for width, tile in table[kernel].items():
                name = f"{kernel}-{prefix}-{width}{'-extra' if extra else ''}"
                yield _configuration(name, KERNELS[kernel], dtype, tile, width, extra, archs)


def _configuration(
    name: str, kernel: Any, dtype: str, tile: Tile, width: int, extra: bool, archs: tuple[int, ...]
) -> Configuration:
    constexprs = {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_D": width, "EXTRA": extra}
    single = {"sums", "delta", "factors", "dbias", "head_bias"}
    signature = {
        a: "i32" if a in _SIZES else "fp32" if a in ("unit", "number", "scale") else "*i32" if a == "cu_seqlens"
        else f"*{'fp32' if a in single else dtype}"
        for a in kernel.arg_names
        if a not in constexprs
    }  # fmt: skip
    addresses = tuple(a for a, t in signature.items() if t.startswith("*"))
    return Configuration(name, kernel, signature, constexprs, addresses, tile.num_warps, tile.num_stages, FUSION, archs)
