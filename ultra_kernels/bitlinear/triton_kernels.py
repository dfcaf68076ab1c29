"""BitLinear in Triton: quantisers of tokens and weights, the int8 product, what the backward dequantises.

Contracts are in op.py; the arithmetic of the quantisers is that of reference.py. They are compiled without fused
multiply-adds: a code is rounded by adding 1.5 · 2^23 to a product, which a fused one would round from other numbers.
Every sum of floats is cut by the shape alone and added up in order.

The forward product is of int8 codes, exact in int32. The products of the backward are torch's, or with groups those of
_groups_triton.py, of operands that one kernel dequantises to the product's dtype; x̂ is kept between the passes as int8
codes. Launches depend on shapes alone: where groups end is read on the device.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from .._dispatch import full_precision
from .._groups_triton import _group, grouped_linear, grouped_sums, grouped_weight_grad, tiles_of_rows
from .._triton import Configuration


@triton.jit
def tokens_kernel(
    x, gain, codes, step, rstd, totals, K, width,
    NORM: tl.constexpr, PANELS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """codes int8 `[M, width]`, 0 from K on, and step `[M]` of a row of x `[M, K]`. Grid: rows.

    NORM: of gain · x · rstd, rstd `[M]` the factor of the RMS norm. PANELS: the codes of 128 columns lie in the order
    of the slots of PackedTernary, 4 of every 16 at a time; totals `[M]` are the rows' sums of codes.
    """
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    x_row = x + row * K
    most = tl.zeros((BLOCK,), tl.int32)  # bits of absolute values are in their order, and those of NaN above all
    squares = tl.zeros((BLOCK,), tl.float32)
    for k0 in range(0, K, BLOCK):
        k = k0 + i
        v = tl.load(x_row + k, mask=k < K, other=0.0).to(tl.float32)
        if NORM:
            squares += v * v
            v = v * tl.load(gain + k, mask=k < K, other=0.0)
        most = tl.maximum(most, tl.abs(v).to(tl.int32, bitcast=True))
    absmax = tl.max(most, axis=0).to(tl.float32, bitcast=True)
    if NORM:
        norm = tl.rsqrt(tl.sum(squares, axis=0) / K + 1e-6)
        tl.store(rstd + row, norm)
        absmax = absmax * norm
    absmax = tl.where(absmax < 1e-5, 1e-5, absmax)  # NaN stays
    factor = tl.div_rn(1.0, absmax) * 127.0  # as torch has 127 / absmax
    tl.store(step + row, tl.div_rn(absmax, 127.0))
    total = tl.zeros((BLOCK,), tl.int32)
    for k0 in range(0, width, BLOCK):
        k = k0 + i
        v = tl.load(x_row + k, mask=k < K, other=0.0).to(tl.float32)
        if NORM:
            v = v * norm * tl.load(gain + k, mask=k < K, other=0.0)
        code = (v * factor + 12582912.0) - 12582912.0
        code = tl.where(code == code, code, 0.0).to(tl.int8)
        at = k
        if PANELS:
            at = k // 128 * 128 + k % 16 // 4 * 32 + k % 128 // 16 * 4 + k % 4
            total += code.to(tl.int32)
        tl.store(codes + row * width + at, code, mask=k < width)
    if PANELS:
        tl.store(totals + row, tl.sum(total, axis=0))


@triton.jit
def magnitudes_kernel(weight, parts, count, per_program, BLOCK: tl.constexpr):
    """parts `[matrices, programs]`: sums of |weight| over per_program elements each. Grid: programs × matrices."""
    pid = tl.program_id(0)
    weight += tl.program_id(1).to(tl.int64) * count
    parts += tl.program_id(1) * tl.num_programs(0)
    begin = pid.to(tl.int64) * per_program
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(begin, tl.minimum(begin + per_program, count), BLOCK):
        at = first + tl.arange(0, BLOCK)
        total += tl.abs(tl.load(weight + at, mask=at < count, other=0.0).to(tl.float32))
    tl.store(parts + pid, tl.sum(total, axis=0))


@triton.jit(do_not_specialize=["num_parts"])
def levels_kernel(weight, parts, gamma, codes, divisor, count, num_parts, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """gamma = Σ parts / divisor, and codes of weight in {-1, 0, 1}. Grid: blocks × matrices.

    RN(w / d) above 1/2, which rounds to 1, is 2w above d: the quotient of two floats is not nearer to 1/2 than that.
    """
    matrix, j = tl.program_id(1), tl.arange(0, PARTS)
    parts += matrix * num_parts
    weight += matrix.to(tl.int64) * count
    codes += matrix.to(tl.int64) * count
    mean = tl.div_rn(tl.sum(tl.load(parts + j, mask=j < num_parts, other=0.0), axis=0), divisor)
    if tl.program_id(0) == 0:
        tl.store(gamma + matrix, mean)
    d = mean + 1e-5
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    w = tl.load(weight + at, mask=at < count, other=0.0).to(tl.float32)
    w = w + w
    code = tl.where(w > d, 1, tl.where(w < -d, -1, 0))
    tl.store(codes + at, code.to(tl.int8), mask=at < count)


@triton.jit
def _rows(ends, tile, M, E, SIZE):
    """A tile's group, its first row and the end of its rows; without groups, E = 0, of M rows."""
    if E == 0:
        group, end, first = 0, M, tile * SIZE
    else:
        group, _, end, first = _group(ends, tile, E, SIZE)
    return tl.cast(group, tl.int64), first, end  # a constant where the interpreter has found one group


@triton.jit(do_not_specialize=["M", "N", "E", "num_bias"])
def product_kernel(
    x, weight, step, gamma, bias, ends, y, M, N, K, E, num_bias,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A tile of y `[M, N]` = (x weight[e]ᵀ) · step · gamma[e] + bias[e], x `[M, K]` and weight `[E, N, K]` int8.

    e is the group of the rows, ends `[E]`; E = 0: there is one matrix. Grid: tiles of rows × tiles of columns.
    """
    pid = tl.program_id(0)
    tiles = tl.cdiv(N, BLOCK_N)
    e, first, end = _rows(ends, pid // tiles, M, E, BLOCK_M)
    m = first + tl.arange(0, BLOCK_M)
    n = pid % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    j = tl.arange(0, BLOCK_K)
    m_ok, n_ok = m < end, n < N
    x_rows = x + m.to(tl.int64)[:, None] * K
    w_rows = weight + e * N * K + n.to(tl.int64)[:, None] * K
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    # Nothing is multiplied where no rows are left: a return before the loop takes twice the registers.
    for k0 in range(0, tl.where(first < end, K, 0), BLOCK_K):
        k = k0 + j
        a = tl.load(x_rows + k[None, :], mask=m_ok[:, None] & (k < K)[None, :], other=0)
        b = tl.load(w_rows + k[None, :], mask=n_ok[:, None] & (k < K)[None, :], other=0)
        acc = tl.dot(a, tl.trans(b), acc, out_dtype=tl.int32)
    _finish(acc, step, gamma + e, bias + e * N, y, m, n, end, N, num_bias)


@triton.jit
def _finish(acc, step, gamma, bias, y, m, n, M, N, num_bias):
    """Stores a tile of y; there is a bias where num_bias is N, none where it is 0."""
    scale = tl.load(step + m, mask=m < M, other=0.0) * tl.load(gamma)
    out = acc.to(tl.float32) * scale[:, None] + tl.load(bias + n, mask=n < num_bias, other=0.0)[None, :]
    tl.store(y + m.to(tl.int64)[:, None] * N + n[None, :], out, mask=(m < M)[:, None] & (n < N)[None, :])


@triton.jit(do_not_specialize=["M", "rows_per_scale"])
def dequantize_kernel(codes, scale, out, M, K, rows_per_scale, ROWS: tl.constexpr, COLS: tl.constexpr):
    """out `[M, K]` = codes · scale, one for every rows_per_scale rows."""
    m = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    k = tl.program_id(1) * COLS + tl.arange(0, COLS)
    at = m.to(tl.int64)[:, None] * K + k[None, :]
    inside = (m < M)[:, None] & (k < K)[None, :]
    s = tl.load(scale + m // rows_per_scale, mask=m < M, other=0.0)
    tl.store(out + at, tl.load(codes + at, mask=inside, other=0).to(tl.float32) * s[:, None], mask=inside)


@triton.jit
def norm_backward_kernel(grad, x, gain, rstd, dx, K, BLOCK: tl.constexpr):
    """dx of a row of gain · x · rstd: rstd · (g - x · rstd² · mean(g x)), g = gain · grad. Grid: rows."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    r = tl.load(rstd + row)
    along = tl.zeros((BLOCK,), tl.float32)
    for k0 in range(0, K, BLOCK):
        k = k0 + i
        g = tl.load(grad + row * K + k, mask=k < K, other=0.0).to(tl.float32) * tl.load(gain + k, mask=k < K, other=0.0)
        along += g * tl.load(x + row * K + k, mask=k < K, other=0.0).to(tl.float32)
    mean = tl.sum(along, axis=0) / K * r * r
    for k0 in range(0, K, BLOCK):
        k = k0 + i
        g = tl.load(grad + row * K + k, mask=k < K, other=0.0).to(tl.float32) * tl.load(gain + k, mask=k < K, other=0.0)
        v = tl.load(x + row * K + k, mask=k < K, other=0.0).to(tl.float32)
        tl.store(dx + row * K + k, r * (g - v * mean), mask=k < K)


@triton.jit(do_not_specialize=["M", "rows_per_block"])
def dgain_kernel(grad, x, rstd, parts, M, rows_per_block, K, ROWS: tl.constexpr, COLS: tl.constexpr):
    """parts `[blocks, K]`: Σ grad · x · rstd over a block of rows. Grid: blocks, tiles of columns."""
    block = tl.program_id(0)
    k = tl.program_id(1) * COLS + tl.arange(0, COLS)
    begin = block * rows_per_block
    end = tl.minimum(begin + rows_per_block, M)
    total = tl.zeros((ROWS, COLS), tl.float32)
    for first in range(begin, end, ROWS):
        m = first + tl.arange(0, ROWS)
        at = m.to(tl.int64)[:, None] * K + k[None, :]
        inside = (m < end)[:, None] & (k < K)[None, :]
        g = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
        v = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        total += g * v * tl.load(rstd + m, mask=m < end, other=0.0)[:, None]
    tl.store(parts + block.to(tl.int64) * K + k, tl.sum(total, axis=0), mask=k < K)


class Tile(NamedTuple):
    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


# Not timed on a GPU yet. None spills with Triton 3.6 or 3.9.
ROW, ROW_WARPS = 1024, 4  # columns that a program has in registers at a time
FLAT, FLAT_WARPS = 1024, 4  # elements of a weight
MAX_PARTS = 512
TILE_ROWS, TILE_COLS, TILE_WARPS = 8, 256, 4
BLOCK_K = 64
PRODUCT = {32: Tile(32, 32, 4, 2), 64: Tile(64, 64, 4, 4), 128: Tile(128, 128, 8, 4)}
MANY_TILES = 132  # of 128 × 128 elements, from which on every multiprocessor of an H100 has one


def product_tile(M: int, N: int, K: int, E: int = 0) -> Tile:
    """For M rows, in E groups."""
    if K % 16:  # loads of single bytes, whose addresses fill the registers of a larger tile
        return PRODUCT[32]
    many = tiles_of(M, 128, E) * triton.cdiv(N, 128) >= MANY_TILES and M > 64 * E
    return PRODUCT[128 if many else 64]


def tiles_of(M: int, size: int, E: int) -> int:
    """How many tiles of `size` rows a launch has."""
    return tiles_of_rows(M, E, size) if E else triton.cdiv(M, size)


def quantize_weight(weight: torch.Tensor, scale: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes int8 `[N, K]` in {-1, 0, 1}, γ float32 `[]`), or with E of each for `[E, N, K]`."""
    weight = weight.contiguous()
    *several, N, K = weight.shape
    count, E = N * K, math.prod(several)
    gamma = weight.new_empty(several, dtype=torch.float32)
    codes = weight.new_empty(weight.shape, dtype=torch.int8)
    if scale == "mean":
        per_program = triton.cdiv(triton.cdiv(count, MAX_PARTS), FLAT) * FLAT
        parts = gamma.new_empty(E, triton.cdiv(count, per_program))
        magnitudes_kernel[(parts.shape[1], E)](
            weight, parts, count, per_program, BLOCK=FLAT, num_warps=FLAT_WARPS, num_stages=1, enable_fp_fusion=False
        )
    else:  # sorted: `median` along an axis has no deterministic kernel on a GPU
        ascending = weight.detach().float().abs().view(E, count).sort(-1).values
        largest, middle = ascending[:, -1:], ascending[:, (count - 1) // 2 :][:, :1]
        parts = torch.where(largest.isnan(), largest, middle)
    levels_kernel[(triton.cdiv(count, FLAT), E)](
        weight, parts, gamma, codes, float(count) if scale == "mean" else 1.0, count, parts.shape[1],
        PARTS=MAX_PARTS, BLOCK=FLAT, num_warps=FLAT_WARPS, num_stages=1, enable_fp_fusion=False,
    )  # fmt: skip
    return codes, gamma


def quantize_tokens(
    x: torch.Tensor, gain: torch.Tensor | None = None, panels: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(codes int8 `[M, K]`, step `[M]`, rstd `[M]` or empty) of x `[M, K]`.

    panels: codes `[M, K up to a multiple of 128]` in the order of slots, and the rows' sums of codes in place of rstd.
    """
    x, (M, K) = x.contiguous(), x.shape
    width = K + -K % 128 if panels else K
    codes, step = x.new_empty(M, width, dtype=torch.int8), x.new_empty(M, dtype=torch.float32)
    rstd = x.new_empty(0 if gain is None else M, dtype=torch.float32)
    totals = x.new_empty(M if panels else 0, dtype=torch.int32)
    if M:
        tokens_kernel[(M,)](
            x, rstd if gain is None else gain.float().contiguous(), codes, step, rstd, totals, K, width,
            NORM=gain is not None, PANELS=panels, BLOCK=ROW, num_warps=ROW_WARPS, num_stages=1, enable_fp_fusion=False,
        )  # fmt: skip
    return codes, step, totals if panels else rstd


def forward(
    x: torch.Tensor,
    quantised: torch.Tensor,
    gamma: torch.Tensor,
    N: int,
    bias: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    ends: torch.Tensor | None,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(y `[M, N]`, codes, step, rstd)."""
    codes, step, rstd = quantize_tokens(x, norm_weight)
    (M, K), y = x.shape, x.new_empty(x.shape[0], N, dtype=dtype)
    E = 0 if ends is None else len(ends)
    tile = product_tile(M, N, K, E)
    if M:
        product_kernel[(tiles_of(M, tile.block_m, E) * triton.cdiv(N, tile.block_n),)](
            codes, quantised, step, gamma, gamma if bias is None else bias.float().contiguous(), ends_or_none(x, ends),
            y, M, N, K, E, 0 if bias is None else N,
            BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=BLOCK_K, num_warps=tile.num_warps,
            num_stages=tile.num_stages, enable_fp_fusion=False,
        )  # fmt: skip
    return y, codes, step, rstd


def ends_or_none(x: torch.Tensor, ends: torch.Tensor | None) -> torch.Tensor:
    """What is not used is an address of its type."""
    return x.new_empty(0, dtype=torch.int64) if ends is None else ends


def backward(
    dy: torch.Tensor,
    codes: torch.Tensor,
    step: torch.Tensor,
    rstd: torch.Tensor,
    x: torch.Tensor | None,
    quantised: torch.Tensor,
    gamma: torch.Tensor,
    weight_shape: Sequence[int],
    norm_weight: torch.Tensor | None,
    ends: torch.Tensor | None,
    wants: Sequence[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dx, dweight, dbias, dnorm_weight), empty where not wanted; products have dy's dtype."""
    (M, K), none = (dy.shape[0], weight_shape[-1]), dy.new_empty(0)
    dx = dweight = dbias = dgain = none
    with full_precision(dy):
        if wants[0] or wants[3]:
            w_hat = _dequantize(quantised, gamma, dy.dtype)
            dx = dy @ w_hat if ends is None else grouped_linear(dy, w_hat, None, ends, transposed=True)
        if wants[1]:
            x_hat = _dequantize(codes, step, dy.dtype)
            dweight = dy.t() @ x_hat if ends is None else grouped_weight_grad(dy, x_hat, ends)
    if wants[2]:
        dbias = dy.sum(0, dtype=torch.float32) if ends is None else grouped_sums(dy, ends)
    if norm_weight is not None and (wants[0] or wants[3]):
        assert x is not None
        x, normal = x.contiguous(), dx
        if wants[3]:
            blocks = max(1, min(triton.cdiv(M, 64), 256))
            parts = rstd.new_empty(blocks, K)
            dgain_kernel[(blocks, triton.cdiv(K, TILE_COLS))](
                normal, x, rstd, parts, M, triton.cdiv(M, blocks), K, ROWS=TILE_ROWS, COLS=TILE_COLS,
                num_warps=TILE_WARPS, num_stages=1, enable_fp_fusion=True,
            )  # fmt: skip
            dgain = parts.sum(0)
        if wants[0]:
            dx = x.new_empty(x.shape)
            if M:
                norm_backward_kernel[(M,)](
                    normal, x, norm_weight.float().contiguous(), rstd, dx, K, BLOCK=ROW, num_warps=ROW_WARPS,
                    num_stages=1, enable_fp_fusion=True,
                )  # fmt: skip
    return dx if wants[0] else none, dweight, dbias, dgain


def _dequantize(codes: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    K, out = codes.shape[-1], codes.new_empty(codes.shape, dtype=dtype)
    M = codes.shape[:-1].numel()
    if M:
        dequantize_kernel[(triton.cdiv(M, TILE_ROWS), triton.cdiv(K, TILE_COLS))](
            codes, scale, out, M, K, M // scale.numel(), ROWS=TILE_ROWS, COLS=TILE_COLS, num_warps=TILE_WARPS,
            num_stages=1, enable_fp_fusion=True,
        )  # fmt: skip
    return out


DTYPES = ("fp32", "bf16", "fp16")
SIZES = (
    "M", "N", "K", "E", "width", "count", "per_program", "num_parts", "num_bias", "rows_per_scale", "rows_per_block",
)  # fmt: skip


def configuration(
    name: str, kernel: Any, types: dict[str, str], constexprs: dict[str, Any], odd: Sequence[str],
    num_warps: int, num_stages: int = 1, fusion: bool = False,
) -> Configuration:  # fmt: skip
    """`types` of tensors other than float32; `odd`: sizes that are no multiples of 16, or not looked at."""
    signature = {a: types.get(a, "i32" if a in SIZES else "*fp32") for a in kernel.arg_names if a not in constexprs}
    aligned = tuple(a for a in signature if a not in odd and signature[a] != "fp32")
    return Configuration(name, kernel, signature, constexprs, aligned, num_warps, num_stages, fusion)


def token_configurations(norm: bool, panels: bool) -> Iterator[Configuration]:
    for dtype, odd in ((d, odd) for d in DTYPES for odd in (False, True)):
        yield configuration(
            f"tokens-{dtype}{'-norm' * norm}{'-panels' * panels}{'-odd' * odd}",
            tokens_kernel,
            {"x": f"*{dtype}", "codes": "*i8", "totals": "*i32"},
            {"NORM": norm, "PANELS": panels, "BLOCK": ROW},
            () if not odd else ("K",) if panels else ("K", "width"),
            ROW_WARPS,
        )


def weight_configurations() -> Iterator[Configuration]:
    for dtype, odd in ((d, odd) for d in DTYPES for odd in (False, True)):
        sizes, suffix = (("count",) if odd else ()), f"{dtype}{'-odd' * odd}"
        types = {"weight": f"*{dtype}", "codes": "*i8", "divisor": "fp32"}
        yield configuration(f"magnitudes-{suffix}", magnitudes_kernel, types, {"BLOCK": FLAT}, sizes, FLAT_WARPS)
        blocks = {"PARTS": MAX_PARTS, "BLOCK": FLAT}
        yield configuration(f"levels-{suffix}", levels_kernel, types, blocks, (*sizes, "num_parts"), FLAT_WARPS)


def configurations() -> Iterator[Configuration]:
    """What the functions above launch: every dtype and tile, K divisible by 16 or not."""
    yield from token_configurations(norm=False, panels=False)
    yield from token_configurations(norm=True, panels=False)
    yield from weight_configurations()
    block, tile = {"BLOCK": ROW}, {"ROWS": TILE_ROWS, "COLS": TILE_COLS}
    for dtype, odd in ((d, odd) for d in DTYPES for odd in (False, True)):
        io, suffix, sizes = f"*{dtype}", f"{dtype}{'-odd' * odd}", ("M", "N", "E", "num_bias", *(("K",) if odd else ()))
        for rows, t in PRODUCT.items():
            if odd != (rows == 32):
                continue
            types = {"x": "*i8", "weight": "*i8", "ends": "*i64", "y": io}
            shape = {"BLOCK_M": t.block_m, "BLOCK_N": t.block_n, "BLOCK_K": BLOCK_K}
            yield configuration(
                f"product-{rows}-{suffix}", product_kernel, types, shape, sizes, t.num_warps, t.num_stages
            )
        types, rest = {"codes": "*i8", "out": io}, (*sizes, "rows_per_scale", "rows_per_block")
        yield configuration(f"dequantize-{suffix}", dequantize_kernel, types, tile, rest, TILE_WARPS, fusion=True)
        types = {"grad": io, "x": io, "dx": io}
        yield configuration(f"norm-{suffix}", norm_backward_kernel, types, block, rest, ROW_WARPS, fusion=True)
        yield configuration(f"dgain-{suffix}", dgain_kernel, types, tile, rest, TILE_WARPS, fusion=True)
