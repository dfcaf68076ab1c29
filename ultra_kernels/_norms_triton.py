"""What the norms share in Triton: the residual, and sums over rows in a fixed order.

Elements are float32 in registers whatever their dtype in memory. Sums over rows go through one partial result per row
block (the blocks depend on the shape alone); a second kernel adds these up in order: the same bits on every run.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ._triton import Configuration


@triton.jit
def added(x, residual, total, at, inside, RESIDUAL: tl.constexpr):
    """x in float32; with RESIDUAL x + residual, rounded to x's dtype and stored at total."""
    v = tl.load(x + at, mask=inside, other=0.0)
    if RESIDUAL:
        more = tl.load(residual + at, mask=inside, other=0.0)
        v = (v.to(tl.float32) + more.to(tl.float32)).to(v.dtype)
        tl.store(total + at, v, mask=inside)
    return v.to(tl.float32)


@triton.jit(do_not_specialize=["blocks", "scalars"])
def sum_kernel(
    part_columns, part_scalars, dweight, dbias, alpha_shift, blocks, scalars, D,
    SCALARS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Adds up what row blocks left: part_columns `[blocks, 2, D]`, and part_scalars `[scalars, 2]`, of each SCALARS.

    Grid: column tiles × (dweight, dbias); one program also does the scalars.
    """
    which = tl.program_id(1)
    col = tl.program_id(0) * COLS + tl.arange(0, COLS)
    total = tl.zeros((ROWS, COLS), tl.float32)
    for first in range(0, blocks, ROWS):
        row = first + tl.arange(0, ROWS)
        at = (row[:, None].to(tl.int64) * 2 + which) * D + col[None, :]
        total += tl.load(part_columns + at, mask=(row < blocks)[:, None] & (col < D)[None, :], other=0.0)
    column_sums = tl.sum(total, axis=0)
    if which == 0:
        tl.store(dweight + col, column_sums, mask=col < D)
    else:
        tl.store(dbias + col, column_sums, mask=col < D)
    if (SCALARS > 0) & (tl.program_id(0) + which == 0):
        dalpha = tl.zeros((ROWS * COLS,), tl.float32)
        dshift = tl.zeros((ROWS * COLS,), tl.float32)
        for first in range(0, scalars, ROWS * COLS):
            entry = first + tl.arange(0, ROWS * COLS)
            dalpha += tl.load(part_scalars + entry * 2, mask=entry < scalars, other=0.0)
            if SCALARS == 2:
                dshift += tl.load(part_scalars + entry * 2 + 1, mask=entry < scalars, other=0.0)
        tl.store(alpha_shift, tl.sum(dalpha, axis=0))
        if SCALARS == 2:
            tl.store(alpha_shift + 1, tl.sum(dshift, axis=0))


class Tile(NamedTuple):
    rows: int
    cols: int
    num_warps: int


SUM = Tile(32, 32, 4)
FUSION = True  # Triton's own default differs between versions
SIZES = ("rows", "rows_per_block", "blocks", "scalars", "D")


def row_blocks(rows: int) -> int:
    """Row blocks of the backward sums: of 16 rows or more, at most 256, some two a multiprocessor."""
    return max(1, min((rows + 15) // 16, 256))


def sum_blocks(
    part_columns: torch.Tensor,
    dweight: torch.Tensor,
    dbias: torch.Tensor,
    part_scalars: torch.Tensor,
    sums: torch.Tensor,
    scalars: int,
) -> None:
    """Writes dweight and dbias `[D]` and, of part_scalars `[..., 2]`, the first `scalars` sums."""
    blocks, _, D = part_columns.shape
    sum_kernel[(triton.cdiv(D, SUM.cols), 2)](
        part_columns, part_scalars, dweight, dbias, sums, blocks, part_scalars.numel() // 2, D,
        SCALARS=scalars, ROWS=SUM.rows, COLS=SUM.cols, num_warps=SUM.num_warps, num_stages=1, enable_fp_fusion=FUSION,
    )  # fmt: skip


def float32(parameter: torch.Tensor) -> torch.Tensor:
    """Free where parameters are float32, as in training; it keeps the shipped configurations few."""
    return parameter.contiguous().float()


def configuration(
    name: str, kernel: Any, tile: Tile, odd: bool, flags: dict[str, Any], types: dict[str, str]
) -> Configuration:
    """`types` of arguments that are no sizes, which without one are float32 tensors; odd: D is no multiple of 16."""
    constexprs = flags | {"ROWS": tile.rows, "COLS": tile.cols}
    constexprs = {name: value for name, value in constexprs.items() if name in kernel.arg_names}
    names = [a for a in kernel.arg_names if a not in constexprs]
    arguments = {a: types.get(a, "i32" if a in SIZES else "*fp32") for a in names}
    aligned = tuple(a for a in arguments if arguments[a].startswith("*") or (a == "D" and not odd))
    return Configuration(name, kernel, arguments, constexprs, aligned, tile.num_warps, enable_fp_fusion=FUSION)


def sum_configurations(scalars: int) -> Iterator[Configuration]:
    """What `sum_blocks` launches."""
    for odd in (False, True):
        name = f"sum-{scalars}{'-odd' if odd else ''}"
        yield configuration(name, sum_kernel, SUM, odd, {"SCALARS": scalars}, {})
