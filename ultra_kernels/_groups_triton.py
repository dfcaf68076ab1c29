"""Products of grouped rows in Triton: the rows ends[e-1] <= r < ends[e] belong to matrix e of `[E, N, K]`.

ends int64 `[E]` lies on the device and is never read by the host: a launch has S // BLOCK_M + E tiles of rows whatever
the groups are, and a tile without rows returns at once. Every sum is in one program, in the order of its terms, so that
a row's result depends on the height of the tiles and on nothing beside it.

Rows may be listed by pairs (moe_ffn): order int64 `[S]` holds at each row the number of its pair. gather = k reads row
order[r] // k of a tensor of rows instead of row r; scatter writes row order[r] instead of row r.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ._triton import ARCHS, Configuration


@triton.jit
def _group(ends, tile, E, SIZE):
    """tile -> its group, the group's rows [begin, end), and the tile's first row, which is beyond them if none is left.

    Group e owns the tiles from begin // SIZE + e on, of which the last may be empty.
    """
    group = 0
    for first in range(0, E - 1, 128):
        e = first + tl.arange(0, 128)
        border = tl.load(ends + e, mask=e < E - 1, other=0).to(tl.int32)
        group += tl.sum(((border // SIZE + e < tile) & (e < E - 1)).to(tl.int32), axis=0)
    begin = tl.load(ends + group - 1, mask=group > 0, other=0).to(tl.int32)
    end = tl.load(ends + group).to(tl.int32)
    return group, begin, end, begin + (tile - begin // SIZE - group) * SIZE


@triton.jit
def _listed(order, m, end, divisor):
    """order[m] // divisor for m < end, or m where divisor is 0."""
    pair = tl.load(order + m, mask=m < tl.where(divisor != 0, end, 0), other=0).to(tl.int32)
    return tl.where(divisor != 0, pair // tl.maximum(divisor, 1), m)


@triton.jit
def _multiply(
    acc, x_rows, m_ok, weight, n, n_ok, N, K,
    TRANSPOSED: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """acc + x wᵀ for rows n of w `[N, K]`, or acc + x w for columns n of w `[K, N]` (TRANSPOSED)."""
    j = tl.arange(0, BLOCK_K)
    for k0 in range(0, K, BLOCK_K):
        k = k0 + j
        k_ok = k < K
        a = tl.load(x_rows[:, None] + k[None, :], mask=m_ok[:, None] & k_ok[None, :], other=0.0)
        if TRANSPOSED:
            at = k.to(tl.int64)[:, None] * N + n[None, :]
        else:
            at = n.to(tl.int64)[None, :] * K + k[:, None]
        b = tl.load(weight + at, mask=k_ok[:, None] & n_ok[None, :], other=0.0)
        acc = tl.dot(a, b, acc, input_precision="ieee")
    return acc


# Sizes come in units of UNIT elements, 16 where all are multiples of it, which tells the compiler that loads of 16
# bytes are in order; so nothing is specialised on a size.
SIZES = ["E", "n_units", "k_units", "num_bias", "gather", "scatter", "weighted", "gather_left", "gather_right"]


@triton.jit(do_not_specialize=SIZES)
def product_kernel(
    x, weight, bias, ends, order, gates, y, E, n_units, k_units, num_bias, gather, scatter, weighted,
    UNIT: tl.constexpr, TRANSPOSED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A tile of y = (x weight[e]ᵀ + bias[e]) · gates[pair], weight `[E, N, K]`, or `[E, K, N]` (TRANSPOSED).

    Grid: tiles of rows × tiles of columns, these first, since the rows of neighbours are then the same. bias float32
    `[E, N]` where num_bias is N, none where it is 0; gates float32 by pair where weighted, and then scatter, is 1.
    """
    N, K = n_units * UNIT, k_units * UNIT
    pid, across = tl.program_id(0), tl.cdiv(N, BLOCK_N)
    group, _, end, first = _group(ends, pid // across, E, BLOCK_M)
    if first >= end:
        return
    e = group.to(tl.int64)
    m = first + tl.arange(0, BLOCK_M)
    n = pid % across * BLOCK_N + tl.arange(0, BLOCK_N)
    m_ok = m < end
    x_rows = x + _listed(order, m, end, gather).to(tl.int64) * K
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    acc = _multiply(acc, x_rows, m_ok, weight + e * N * K, n, n < N, N, K, TRANSPOSED, BLOCK_K)
    acc += tl.load(bias + e * N + n, mask=n < num_bias, other=0.0)[None, :]
    to = _listed(order, m, end, scatter)
    acc *= tl.load(gates + to, mask=m < tl.where(weighted != 0, end, 0), other=1.0)[:, None]
    tl.store(y + to.to(tl.int64)[:, None] * N + n[None, :], acc, mask=m_ok[:, None] & (n < N)[None, :])


@triton.jit(do_not_specialize=SIZES)
def weight_grad_kernel(
    left, right, ends, order, dw, E, n_units, k_units, gather_left, gather_right,
    UNIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dw `[E, N, K]`: the sum over a group's rows of left `[., N]` times right `[., K]`, BLOCK_M at a time.

    Persistent: of the tiles, groups × tiles of N × tiles of K, program p of P takes p, p + P, ….
    """
    N, K = n_units * UNIT, k_units * UNIT
    down, across = tl.cdiv(N, BLOCK_N), tl.cdiv(K, BLOCK_K)
    for tile in range(tl.program_id(0), E * down * across, tl.num_programs(0)):
        group = tile // (down * across)
        n = tile // across % down * BLOCK_N + tl.arange(0, BLOCK_N)
        k = tile % across * BLOCK_K + tl.arange(0, BLOCK_K)
        n_ok, k_ok = n < N, k < K
        begin = tl.load(ends + group - 1, mask=group > 0, other=0).to(tl.int32)
        end = tl.load(ends + group).to(tl.int32)
        acc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
        for first in range(begin, end, BLOCK_M):
            m = first + tl.arange(0, BLOCK_M)
            m_ok = m < end
            left_rows = left + _listed(order, m, end, gather_left).to(tl.int64) * N
            right_rows = right + _listed(order, m, end, gather_right).to(tl.int64) * K
            a = tl.load(left_rows[None, :] + n[:, None], mask=m_ok[None, :] & n_ok[:, None], other=0.0)
            b = tl.load(right_rows[:, None] + k[None, :], mask=m_ok[:, None] & k_ok[None, :], other=0.0)
            acc = tl.dot(a, b, acc, input_precision="ieee")
        dw_rows = dw + (group.to(tl.int64) * N + n) * K
        tl.store(dw_rows[:, None] + k[None, :], acc, mask=n_ok[:, None] & k_ok[None, :])


@triton.jit(do_not_specialize=SIZES)
def column_sums_kernel(
    x, ends, order, gates, parts, E, n_units, gather, weighted,
    UNIT: tl.constexpr, SPAN: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """parts `[tiles of SPAN rows, N]`: sums of x's rows, times gates[pair] where weighted. Grid: tiles, columns."""
    N = n_units * UNIT
    _, _, end, first = _group(ends, tl.program_id(0), E, SPAN)
    n = tl.program_id(1) * COLS + tl.arange(0, COLS)
    total = tl.zeros((ROWS, COLS), tl.float32)
    for m0 in range(first, tl.minimum(first + SPAN, end), ROWS):
        m = m0 + tl.arange(0, ROWS)
        m_ok = m < end
        x_rows = x + _listed(order, m, end, gather).to(tl.int64) * N
        v = tl.load(x_rows[:, None] + n[None, :], mask=m_ok[:, None] & (n < N)[None, :], other=0.0).to(tl.float32)
        pair = _listed(order, m, end, weighted)
        total += v * tl.load(gates + pair, mask=m < tl.where(weighted != 0, end, 0), other=1.0)[:, None]
    tl.store(parts + tl.program_id(0).to(tl.int64) * N + n, tl.sum(total, axis=0), mask=n < N)


@triton.jit(do_not_specialize=SIZES)
def group_sums_kernel(parts, ends, sums, n_units, UNIT: tl.constexpr, SPAN: tl.constexpr, COLS: tl.constexpr):
    """sums `[E, N]` of each group's parts, those of column_sums_kernel. Grid: groups, tiles of columns."""
    N = n_units * UNIT
    group = tl.program_id(0)
    n = tl.program_id(1) * COLS + tl.arange(0, COLS)
    begin = tl.load(ends + group - 1, mask=group > 0, other=0).to(tl.int32)
    end = tl.load(ends + group).to(tl.int32)
    part = parts + (begin // SPAN + group).to(tl.int64) * N + n
    total = tl.zeros((COLS,), tl.float32)
    for _ in range(0, tl.cdiv(end - begin, SPAN)):
        total += tl.load(part, mask=n < N, other=0.0)
        part += N
    tl.store(sums + group.to(tl.int64) * N + n, total, mask=n < N)


class Tile(NamedTuple):
    block_m: int  # rows
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int

    @property
    def blocks(self) -> dict[str, int]:
        return {"BLOCK_M": self.block_m, "BLOCK_N": self.block_n, "BLOCK_K": self.block_k}

    @property
    def options(self) -> dict[str, Any]:
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": FUSION}


# Rows per group up to which a tile serves; the last serves more. Below some 250 rows per group an H100 reads weights
# for longer than it multiplies them, so that heights between 16 and 64 would gain nothing. Not timed on a GPU yet. None
# spills with Triton 3.6 or 3.9. Float32 products run on the plain units, which hold their operands in registers.
HALF = {
    16: Tile(16, 128, 64, 4, 4),
    128: Tile(64, 128, 64, 8, 3),
    256: Tile(128, 128, 64, 8, 3),
}
SINGLE = {128: Tile(32, 64, 16, 8, 2)}
ODD = Tile(32, 32, 32, 4, 2)  # loads of single elements, whose addresses fill the registers of a larger tile
# Tiles of a weight's gradient by the side of their square: 132 of 128 × 128 are one per multiprocessor of an H100.
GRAD_HALF = {64: Tile(64, 64, 64, 4, 4), 128: Tile(32, 128, 128, 8, 5)}
GRAD_SINGLE = {64: Tile(16, 64, 64, 8, 3)}
MANY_TILES = 132
SPAN, ROWS, COLS, SUM_WARPS = 256, 16, 128, 4  # of column sums
FUSION = True  # Triton's own default differs between versions


def unit_of(*sizes: int) -> int:
    return 1 if any(size % 16 for size in sizes) else 16


def tile_of(
    dtype: torch.dtype, S: int, E: int, unit: int, half: Mapping[int, Tile], single: Mapping[int, Tile]
) -> Tile:
    """For S rows in E groups: known to the host, unlike the groups."""
    if unit == 1:
        return ODD
    table = single if dtype == torch.float32 else half
    return table[next((rows for rows in table if S <= rows * E), max(table))]


def tiles_of_rows(S: int, E: int, size: int) -> int:
    """How many tiles a launch has for any E groups of S rows in all."""
    return S // size + E


def grouped_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    ends: torch.Tensor,
    *,
    transposed: bool = False,
    order: torch.Tensor | None = None,
    gather: int = 0,
    scatter: bool = False,
    gates: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """y `[S, N]` = x weight[e]ᵀ + bias[e]; x `[S, K]`, weight `[E, N, K]`, bias `[E, N]`, in x's dtype.

    transposed: y `[S, K]` = x weight[e] for x `[S, N]`. order, gather, scatter: as above; gates float32 `[S]` by pair
    multiply the rows of y.
    """
    x, weight = x.contiguous(), weight.contiguous()
    (E, *shape), S = weight.shape, len(x if order is None else order)
    N, K = shape[::-1] if transposed else shape
    y, unit = x.new_empty(S, N) if out is None else out, unit_of(N, K)
    none = x.new_empty(0, dtype=torch.float32)  # what is not used is an address of its type
    tile = tile_of(x.dtype, S, E, unit, HALF, SINGLE)
    if S and N:
        product_kernel[(tiles_of_rows(S, E, tile.block_m) * triton.cdiv(N, tile.block_n),)](
            x, weight, none if bias is None else bias.float().contiguous(), ends, ends if order is None else order,
            none if gates is None else gates, y, E, N // unit, K // unit, 0 if bias is None else N, gather,
            int(scatter), int(gates is not None), UNIT=unit, TRANSPOSED=transposed, **tile.blocks, **tile.options,
        )  # fmt: skip
    return y


def grouped_weight_grad(
    left: torch.Tensor,
    right: torch.Tensor,
    ends: torch.Tensor,
    *,
    out: torch.Tensor | None = None,
    order: torch.Tensor | None = None,
    gather_left: int = 0,
    gather_right: int = 0,
) -> torch.Tensor:
    """dw `[E, N, K]`: leftᵀ right over each group's rows, 0 where it has none; left `[S, N]`, right `[S, K]`."""
    left, right = left.contiguous(), right.contiguous()
    E, N, K = len(ends), left.shape[1], right.shape[1]
    dw = left.new_empty(E, N, K) if out is None else out
    unit = unit_of(N, K)
    table = GRAD_SINGLE if left.dtype == torch.float32 else GRAD_HALF
    many = E * triton.cdiv(N, 128) * triton.cdiv(K, 128) >= MANY_TILES
    tile = ODD if unit == 1 else table[max(table) if many else min(table)]
    if dw.numel():
        tiles = E * triton.cdiv(N, tile.block_n) * triton.cdiv(K, tile.block_k)
        weight_grad_kernel[(min(tiles, resident_programs(dw.device)),)](
            left, right, ends, ends if order is None else order, dw, E, N // unit, K // unit, gather_left, gather_right,
            UNIT=unit, **tile.blocks, **tile.options,
        )  # fmt: skip
    return dw


def resident_programs(device: torch.device) -> int:
    """How many programs a persistent kernel has: two for each multiprocessor."""
    return 2 * torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 256


def grouped_sums(
    x: torch.Tensor,
    ends: torch.Tensor,
    *,
    out: torch.Tensor | None = None,
    order: torch.Tensor | None = None,
    gather: int = 0,
    gates: torch.Tensor | None = None,
) -> torch.Tensor:
    """float32 `[E, N]`: the sum of each group's rows of x `[S, N]`, times gates by pair."""
    x = x.contiguous()
    E, N, S = len(ends), x.shape[1], len(x if order is None else order)
    sums = x.new_empty(E, N, dtype=torch.float32) if out is None else out
    unit, columns, options = unit_of(N), triton.cdiv(N, COLS), {"num_warps": SUM_WARPS, "num_stages": 1}
    parts = sums.new_empty(tiles_of_rows(S, E, SPAN), N)
    column_sums_kernel[(len(parts), columns)](
        x, ends, ends if order is None else order, parts if gates is None else gates, parts, E, N // unit, gather,
        int(gates is not None), UNIT=unit, SPAN=SPAN, ROWS=ROWS, COLS=COLS, enable_fp_fusion=FUSION, **options,
    )  # fmt: skip
    group_sums_kernel[(E, columns)](
        parts, ends, sums, N // unit, UNIT=unit, SPAN=SPAN, COLS=COLS, enable_fp_fusion=FUSION, **options
    )
    return sums


def configuration(
    name: str, kernel: Any, dtype: str, float32: Sequence[str], unit: int, constexprs: Mapping[str, Any],
    num_warps: int, num_stages: int, archs: tuple[int, ...] = ARCHS,
) -> Configuration:  # fmt: skip
    """`float32`: tensors that are not of `dtype`; ends and order are int64, sizes, which nothing looks at, int32."""
    constexprs = {"UNIT": unit, **constexprs}
    sizes = [p.name for p in kernel.params if p.do_not_specialize]
    signature = {
        a: "i32" if a in sizes else "*i64" if a in ("ends", "order") else f"*{'fp32' if a in float32 else dtype}"
        for a in kernel.arg_names
        if a not in constexprs
    }
    aligned = tuple(a for a, t in signature.items() if t.startswith("*"))
    name = f"{name}-{dtype}{'-odd' * (unit == 1)}"
    return Configuration(name, kernel, signature, constexprs, aligned, num_warps, num_stages, FUSION, archs)


def archs_of(dtype: str, unit: int) -> tuple[int, ...]:
    """bfloat16 and float16 differ in the type of the products alone, and tiles of odd sizes are far from any limit."""
    return ARCHS if unit == 16 and dtype != "fp16" else (90,)


def tile_configurations(
    name: str, kernel: Any, half: Mapping[int, Tile], single: Mapping[int, Tile], float32: Sequence[str] = (),
    constexprs: Mapping[str, Any] = MappingProxyType({}),
) -> Iterator[Configuration]:  # fmt: skip
    """Every dtype and tile of a kernel."""
    for dtype in ("fp32", "bf16", "fp16"):
        tiles = [(16, tile) for tile in (single if dtype == "fp32" else half).values()]
        for unit, tile in [*tiles, (1, ODD)]:
            yield configuration(
                f"{name}-{tile.block_m}x{tile.block_n}", kernel, dtype, float32, unit, {**constexprs, **tile.blocks},
                tile.num_warps, tile.num_stages, archs_of(dtype, unit),
            )  # fmt: skip


def row_configurations(
    name: str, kernel: Any, num_warps: int, float32: Sequence[str], constexprs: Mapping[str, Any]
) -> Iterator[Configuration]:
    """Every dtype of a kernel without products, which for one architecture is much as for another."""
    for dtype, unit in ((d, u) for d in ("fp32", "bf16", "fp16") for u in (16, 1)):
        archs = ARCHS if dtype == "bf16" and unit == 16 else (90,)
        yield configuration(name, kernel, dtype, float32, unit, constexprs, num_warps, 1, archs)


def configurations() -> Iterator[Configuration]:
    """What the functions above launch."""
    for transposed in (False, True):
        name = f"product{'-transposed' * transposed}"
        constexprs = {"TRANSPOSED": transposed}
        yield from tile_configurations(name, product_kernel, HALF, SINGLE, ("bias", "gates"), constexprs)
    yield from tile_configurations("weight-grad", weight_grad_kernel, GRAD_HALF, GRAD_SINGLE)
    sums = {"SPAN": SPAN, "COLS": COLS}
    rows = {"ROWS": ROWS, **sums}
    yield from row_configurations("column-sums", column_sums_kernel, SUM_WARPS, ("gates", "parts"), rows)
    for unit in (16, 1):
        yield configuration("group-sums", group_sums_kernel, "fp32", (), unit, sums, SUM_WARPS, 1)
