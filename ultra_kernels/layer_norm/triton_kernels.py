"""Layer normalisation in Triton; the contract is in op.py.

Rows that a tile has room for are whole in registers, some to a program; a longer one is read again from the L2 cache,
tile by tile. The normalised row is (x - mean) · rstd + shift: a float32 mean of 1e4 is off by up to 5e-4, and shift is
what it lacks.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .._norms import new_outputs
from .._norms_triton import (
    FUSION,
    Tile,
    added,
    configuration,
    float32,
    row_blocks,
    sum_blocks,
    sum_configurations,
)
from .._triton import Configuration


@triton.jit
def _numbers(first, second, D, eps):
    """rstd and shift from the sums of x - mean and of its square."""
    rest = first / D
    square = second / D - rest * rest
    rstd = 1.0 / tl.sqrt(tl.where(square < 0.0, 0.0, square) + eps)  # below 0: constant rows, by rounding
    return rstd, -rest * rstd


@triton.jit
def _keep(stats, row, mean, rstd, shift, mask):
    tl.store(stats + row * 3, mean, mask=mask)
    tl.store(stats + row * 3 + 1, rstd, mask=mask)
    tl.store(stats + row * 3 + 2, shift, mask=mask)


@triton.jit
def _kept(stats, row, mask):
    mean = tl.load(stats + row * 3, mask=mask, other=0.0)
    rstd = tl.load(stats + row * 3 + 1, mask=mask, other=0.0)
    shift = tl.load(stats + row * 3 + 2, mask=mask, other=0.0)
    return mean, rstd, shift


@triton.jit(do_not_specialize=["rows"])
def forward_kernel(
    x, residual, weight, bias, y, total, stats, rows, D, eps,
    RESIDUAL: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, COLS)
    at = row[:, None] * D + col[None, :]
    inside = (row < rows)[:, None] & (col < D)[None, :]
    v = added(x, residual, total, at, inside, RESIDUAL)
    mean = tl.sum(v, axis=1) / D
    v = tl.where(inside, v - mean[:, None], 0.0)
    rstd, shift = _numbers(tl.sum(v, axis=1), tl.sum(v * v, axis=1), D, eps)
    _keep(stats, row, mean, rstd, shift, row < rows)
    w = tl.load(weight + col, mask=col < D, other=0.0)[None, :]
    b = tl.load(bias + col, mask=col < D, other=0.0)[None, :]
    tl.store(y + at, w * (v * rstd[:, None] + shift[:, None]) + b, mask=inside)


@triton.jit
def long_forward_kernel(
    x, residual, weight, bias, y, total, stats, D, eps, RESIDUAL: tl.constexpr, COLS: tl.constexpr
):  # fmt: skip
    """A program is a row."""
    row = tl.program_id(0).to(tl.int64)
    begin = row * D
    sums = tl.zeros((COLS,), tl.float32)
    for tile in range(0, D, COLS):
        col = tile + tl.arange(0, COLS)
        sums += added(x, residual, total, begin + col, col < D, RESIDUAL)
    mean = tl.sum(sums, axis=0) / D
    if RESIDUAL:
        x = total
        tl.debug_barrier()  # what other threads of the program have stored is read now
    first = tl.zeros((COLS,), tl.float32)
    second = tl.zeros((COLS,), tl.float32)
    for tile in range(0, D, COLS):
        col = tile + tl.arange(0, COLS)
        v = tl.load(x + begin + col, mask=col < D, other=0.0).to(tl.float32)
        v = tl.where(col < D, v - mean, 0.0)
        first += v
        second += v * v
    rstd, shift = _numbers(tl.sum(first, axis=0), tl.sum(second, axis=0), D, eps)
    _keep(stats, row, mean, rstd, shift, row >= 0)
    for tile in range(0, D, COLS):
        col = tile + tl.arange(0, COLS)
        v = (tl.load(x + begin + col, mask=col < D, other=0.0).to(tl.float32) - mean) * rstd + shift
        w = tl.load(weight + col, mask=col < D, other=0.0)
        b = tl.load(bias + col, mask=col < D, other=0.0)
        tl.store(y + begin + col, w * v + b, mask=col < D)


@triton.jit(do_not_specialize=["rows", "rows_per_block"])
def backward_kernel(
    grad, grad_sum, x, stats, weight, dx, part_columns, rows, rows_per_block, D,
    RESIDUAL: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """With g = grad · weight: dx = rstd · (g - mean(g) - v · mean(g · v)) + grad_sum, v the normalised row.

    part_columns `[blocks, 2, D]`: dweight, dbias.
    """
    block = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, COLS)
    w = tl.load(weight + col, mask=col < D, other=0.0)[None, :]
    begin = block * rows_per_block
    end = tl.minimum(begin + rows_per_block, rows)
    dweight = tl.zeros((ROWS, COLS), tl.float32)
    dbias = tl.zeros((ROWS, COLS), tl.float32)
    for first in range(begin, end, ROWS):
        row = first + tl.arange(0, ROWS)
        at = row[:, None] * D + col[None, :]
        inside = (row < end)[:, None] & (col < D)[None, :]
        mean, rstd, shift = _kept(stats, row, row < end)
        v = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        v = (v - mean[:, None]) * rstd[:, None] + shift[:, None]
        g = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
        dweight += g * v
        dbias += g
        g = g * w
        level, slope = tl.sum(g, axis=1) / D, tl.sum(g * v, axis=1) / D
        change = rstd[:, None] * (g - level[:, None] - slope[:, None] * v)
        if RESIDUAL:
            change += tl.load(grad_sum + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx + at, change, mask=inside)
    out = part_columns + block * 2 * D + col
    tl.store(out, tl.sum(dweight, axis=0), mask=col < D)
    tl.store(out + D, tl.sum(dbias, axis=0), mask=col < D)


@triton.jit
def long_backward_kernel(
    grad, grad_sum, x, stats, weight, dx, D, RESIDUAL: tl.constexpr, COLS: tl.constexpr
):  # fmt: skip
    """dx alone; a program is a row."""
    row = tl.program_id(0).to(tl.int64)
    begin = row * D
    mean, rstd, shift = _kept(stats, row, row >= 0)
    level = tl.zeros((COLS,), tl.float32)
    slope = tl.zeros((COLS,), tl.float32)
    for tile in range(0, D, COLS):
        col = tile + tl.arange(0, COLS)
        v = (tl.load(x + begin + col, mask=col < D, other=0.0).to(tl.float32) - mean) * rstd + shift
        g = tl.load(grad + begin + col, mask=col < D, other=0.0).to(tl.float32)
        g = g * tl.load(weight + col, mask=col < D, other=0.0)
        level += g
        slope += g * v
    level_mean, slope_mean = tl.sum(level, axis=0) / D, tl.sum(slope, axis=0) / D
    for tile in range(0, D, COLS):
        col = tile + tl.arange(0, COLS)
        v = (tl.load(x + begin + col, mask=col < D, other=0.0).to(tl.float32) - mean) * rstd + shift
        g = tl.load(grad + begin + col, mask=col < D, other=0.0).to(tl.float32)
        g = g * tl.load(weight + col, mask=col < D, other=0.0)
        change = rstd * (g - level_mean - slope_mean * v)
        if RESIDUAL:
            change += tl.load(grad_sum + begin + col, mask=col < D, other=0.0).to(tl.float32)
        tl.store(dx + begin + col, change, mask=col < D)


@triton.jit(do_not_specialize=["rows", "rows_per_block"])
def long_columns_kernel(
    grad, x, stats, part_columns, rows, rows_per_block, D, ROWS: tl.constexpr, COLS: tl.constexpr
):  # fmt: skip
    """part_columns `[blocks, 2, D]`: dweight, dbias. Grid: row blocks × column tiles."""
    block = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * COLS + tl.arange(0, COLS)
    begin = block * rows_per_block
    end = tl.minimum(begin + rows_per_block, rows)
    dweight = tl.zeros((ROWS, COLS), tl.float32)
    dbias = tl.zeros((ROWS, COLS), tl.float32)
    for first in range(begin, end, ROWS):
        row = first + tl.arange(0, ROWS)
        at = row[:, None] * D + col[None, :]
        inside = (row < end)[:, None] & (col < D)[None, :]
        mean, rstd, shift = _kept(stats, row, row < end)
        v = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        g = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
        dweight += g * ((v - mean[:, None]) * rstd[:, None] + shift[:, None])
        dbias += g
    out = part_columns + block * 2 * D + col
    tl.store(out, tl.sum(dweight, axis=0), mask=col < D)
    tl.store(out + D, tl.sum(dbias, axis=0), mask=col < D)


# By the columns that a tile has room for; not timed on a GPU yet. A thread of the forward has 8 elements of a row, or
# 16 of the longest; one of the backward up to 8 of x and of grad beside 16 partial sums: at 2048 columns 8 would spill.
FORWARD = {256: Tile(8, 256, 8), 1024: Tile(2, 1024, 8), 8192: Tile(1, 8192, 16)}
BACKWARD = {256: Tile(4, 256, 4), 1024: Tile(1, 1024, 4), 2048: Tile(1, 2048, 16)}
LONG = Tile(1, 2048, 8)
LONG_COLUMNS = Tile(8, 128, 4)


def tile_for(D: int, tiles: dict[int, Tile]) -> Tile | None:
    """The tile for rows of D elements; None where they fit in none."""
    return next((tile for cols, tile in tiles.items() if D <= cols), None)


def forward(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """y, the sum, which is empty without a residual, and what the backward needs of each row."""
    x, weight, bias = x.contiguous(), float32(weight), float32(bias)
    y, total = new_outputs(x, residual)
    stats = x.new_empty((*x.shape[:-1], 3), dtype=torch.float32)
    D, summed = x.shape[-1], residual is not None
    if not x.numel():
        return y, total, stats
    rows = x.numel() // D
    io = x, x if residual is None else residual.contiguous(), weight, bias, y, total if summed else y, stats
    tile = tile_for(D, FORWARD)
    if tile is None:
        long_forward_kernel[(rows,)](
            *io, D, eps, RESIDUAL=summed, COLS=LONG.cols, num_warps=LONG.num_warps, num_stages=1,
            enable_fp_fusion=FUSION,
        )  # fmt: skip
    else:
        forward_kernel[(triton.cdiv(rows, tile.rows),)](
            *io, rows, D, eps, RESIDUAL=summed, ROWS=tile.rows, COLS=tile.cols, num_warps=tile.num_warps,
            num_stages=1, enable_fp_fusion=FUSION,
        )  # fmt: skip
    return y, total, stats


def backward(
    grad: torch.Tensor, grad_sum: torch.Tensor | None, x: torch.Tensor, stats: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x: what was normalised. dx like x; dweight and dbias [D] in float32."""
    grad, x, weight = grad.contiguous(), x.contiguous(), float32(weight)
    D = x.shape[-1]
    dx = torch.empty_like(x)
    new = torch.empty if x.numel() else torch.zeros
    dweight, dbias = (new(D, dtype=torch.float32, device=x.device) for _ in range(2))
    if not x.numel():
        return dx, dweight, dbias
    rows = x.numel() // D
    blocks = row_blocks(rows)
    parts = torch.empty(blocks, 2, D, dtype=torch.float32, device=x.device)
    io = grad, grad if grad_sum is None else grad_sum.contiguous(), x, stats, weight, dx
    summed, sizes = grad_sum is not None, (rows, triton.cdiv(rows, blocks), D)
    tile = tile_for(D, BACKWARD)
    if tile is None:
        long_backward_kernel[(rows,)](
            *io, D, RESIDUAL=summed, COLS=LONG.cols, num_warps=LONG.num_warps, num_stages=1, enable_fp_fusion=FUSION
        )
        long_columns_kernel[(blocks, triton.cdiv(D, LONG_COLUMNS.cols))](
            grad, x, stats, parts, *sizes, ROWS=LONG_COLUMNS.rows, COLS=LONG_COLUMNS.cols,
            num_warps=LONG_COLUMNS.num_warps, num_stages=1, enable_fp_fusion=FUSION,
        )  # fmt: skip
    else:
        backward_kernel[(blocks,)](
            *io, parts, *sizes, RESIDUAL=summed, ROWS=tile.rows, COLS=tile.cols, num_warps=tile.num_warps,
            num_stages=1, enable_fp_fusion=FUSION,
        )  # fmt: skip
    sum_blocks(parts, dweight, dbias, parts, parts, 0)
    return dx, dweight, dbias


def configurations() -> list[Configuration]:
    """Every Triton specialisation that this op launches: each tile and dtype of x, D divisible by 16 or not."""
    found = list(sum_configurations(0))
    for odd in (False, True):
        for dtype in ("fp32", "bf16", "fp16"):
            types = dict.fromkeys(("x", "residual", "y", "total", "grad", "grad_sum", "dx"), f"*{dtype}")
            types["eps"] = "fp32"
            plain = f"{dtype}{'-odd' if odd else ''}"
            found.append(configuration(f"long-columns-{plain}", long_columns_kernel, LONG_COLUMNS, odd, {}, types))
            for residual in (False, True):
                flags, end = {"RESIDUAL": residual}, f"{plain}{'-residual' if residual else ''}"
                for name, kernel in (("forward", long_forward_kernel), ("backward", long_backward_kernel)):
                    found.append(configuration(f"long-{name}-{end}", kernel, LONG, odd, flags, types))
                for name, kernel, tiles in (
                    ("forward", forward_kernel, FORWARD), ("backward", backward_kernel, BACKWARD)
                ):  # fmt: skip
                    found += [
                        configuration(f"{name}-{cols}-{end}", kernel, tile, odd, flags, types)
                        for cols, tile in tiles.items()
                    ]
    return found
