"""y = weight · f(alpha · x + shift) + bias in Triton, forward and backward, for f = tanh (DyT), erf (Derf).

Elements are float32 in registers whatever their dtype in memory. The op is pointwise, so a program is a tile
of rows and columns, and no row needs to be whole. Sums over rows go through one partial result per row block
(the blocks depend on the shape alone); a second kernel adds these up in order: the same bits on every run.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from ._norms import new_outputs
from ._norms_triton import FUSION, Tile, added, configuration, float32, row_blocks, sum_blocks, sum_configurations
from ._triton import Configuration


@triton.jit
def _tanh(u):
    """An odd polynomial below 0.625, where 1 − 2/(e^2u + 1) would lose the relative precision."""
    a = tl.abs(u)
    big = 1.0 - 2.0 / (tl.exp2(a * 2.8853900817779268) + 1.0)
    s = u * u
    p = s * -5.70498872745e-3 + 2.06390887954e-2
    p = p * s - 5.37397155531e-2
    p = p * s + 1.33314422036e-1
    p = p * s - 3.33332819422e-1
    return tl.where(a < 0.625, p * s * u + u, tl.where(u < 0.0, -big, big))


@triton.jit
def _erf(u):
    """The fits of csrc/common/simd.h: an odd polynomial, and 1 − 2^q(|u|) with q fitted to log2 of erfc."""
    a = tl.where(tl.abs(u) > 4.0, 4.0, tl.abs(u))
    q = a * 2.8997636e-4 - 4.4612354e-3
    q = q * a + 3.2345540e-2
    q = q * a - 1.5051278e-1
    q = q * a - 9.1861767e-1
    q = q * a - 1.6272678
    q = q * a - 1.9270746e-4
    big = 1.0 - tl.exp2(q)
    s = u * u
    p = s * -6.2032725e-4 + 5.0321850e-3
    p = p * s - 2.6791466e-2
    p = p * s + 1.1282455e-1
    p = p * s - 3.7612550e-1
    p = p * s + 1.2837915e-1
    return tl.where(a < 0.875, p * u + u, tl.where(u < 0.0, -big, big))


@triton.jit
def _value(u, ERF: tl.constexpr):
    if ERF:
        return _erf(u)
    else:
        return _tanh(u)


@triton.jit
def _slope(u, value, ERF: tl.constexpr):
    """f'(u), given f(u)."""
    if ERF:
        return 1.1283791671 * tl.exp2(u * u * -1.4426950408889634)  # 2/√π · e^(−u²)
    else:
        return 1.0 - value * value


@triton.jit(do_not_specialize=["rows"])
def forward_kernel(
    x, residual, alpha, shift, weight, bias, y, total, rows, D,
    ERF: tl.constexpr, RESIDUAL: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.program_id(1) * COLS + tl.arange(0, COLS)
    at = row[:, None] * D + col[None, :]
    inside = (row < rows)[:, None] & (col < D)[None, :]
    w = tl.load(weight + col, mask=col < D, other=0.0)[None, :]
    b = tl.load(bias + col, mask=col < D, other=0.0)[None, :]
    a = tl.load(alpha)
    s = tl.load(shift) if ERF else 0.0
    u = a * added(x, residual, total, at, inside, RESIDUAL) + s
    tl.store(y + at, w * _value(u, ERF) + b, mask=inside)


@triton.jit(do_not_specialize=["rows", "rows_per_block"])
def backward_kernel(
    grad, grad_sum, x, alpha, shift, weight, dx, part_columns, part_scalars, rows, rows_per_block, D,
    ERF: tl.constexpr, RESIDUAL: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """part_columns `[blocks, 2, D]`: dweight, dbias; part_scalars `[blocks, tiles, 2]`: dalpha, dshift."""
    block = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * COLS + tl.arange(0, COLS)
    w = tl.load(weight + col, mask=col < D, other=0.0)[None, :]
    a = tl.load(alpha)
    s = tl.load(shift) if ERF else 0.0
    begin = block * rows_per_block
    end = tl.minimum(begin + rows_per_block, rows)
    dweight = tl.zeros((ROWS, COLS), tl.float32)
    dbias = tl.zeros((ROWS, COLS), tl.float32)
    dalpha = tl.zeros((ROWS, COLS), tl.float32)
    dshift = tl.zeros((ROWS, COLS), tl.float32)
    for first in range(begin, end, ROWS):
        row = first + tl.arange(0, ROWS)
        at = row[:, None] * D + col[None, :]
        inside = (row < end)[:, None] & (col < D)[None, :]
        v = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        g = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
        u = a * v + s
        t = _value(u, ERF)
        slope = g * w * _slope(u, t, ERF)
        change = a * slope
        if RESIDUAL:
            change += tl.load(grad_sum + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx + at, change, mask=inside)
        dweight += g * t
        dbias += g
        dalpha += slope * v
        if ERF:
            dshift += slope
    out = part_columns + block * 2 * D + col
    tl.store(out, tl.sum(dweight, axis=0), mask=col < D)
    tl.store(out + D, tl.sum(dbias, axis=0), mask=col < D)
    scalar = part_scalars + (block * tl.num_programs(1) + tl.program_id(1)) * 2
    tl.store(scalar, tl.sum(tl.sum(dalpha, axis=0), axis=0))
    tl.store(scalar + 1, tl.sum(tl.sum(dshift, axis=0), axis=0))


# By column tile; not timed on a GPU yet. A thread of the forward kernel has 8 elements in flight (16 and 32 spill
# on sm_80 and sm_90 when D is odd), one of the backward 8 of x and 8 of grad beside its 32 partial sums.
FORWARD = {128: Tile(16, 128, 8), 512: Tile(4, 512, 8)}
BACKWARD = {128: Tile(8, 128, 4), 512: Tile(2, 512, 4)}


def column_tile(D: int) -> int:
    """The key of FORWARD and BACKWARD for rows of D elements."""
    return 512 if D % 512 == 0 else 128


def forward(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    alpha: torch.Tensor,
    shift: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """shift None: tanh; a tensor: erf. Shapes as in the ops' contracts; the sum is empty without a residual."""
    x, alpha, weight, bias = x.contiguous(), float32(alpha), float32(weight), float32(bias)
    y, total = new_outputs(x, residual)
    D = x.shape[-1]
    if x.numel():
        rows, tile = x.numel() // D, FORWARD[column_tile(D)]
        grid = (triton.cdiv(rows, tile.rows), triton.cdiv(D, tile.cols))
        forward_kernel[grid](
            x, x if residual is None else residual.contiguous(), alpha, alpha if shift is None else float32(shift),
            weight, bias, y, y if residual is None else total, rows, D,
            ERF=shift is not None, RESIDUAL=residual is not None, ROWS=tile.rows, COLS=tile.cols,
            num_warps=tile.num_warps, num_stages=1, enable_fp_fusion=FUSION,
        )  # fmt: skip
    return y, total


def backward(
    grad: torch.Tensor,
    grad_sum: torch.Tensor | None,
    x: torch.Tensor,
    alpha: torch.Tensor,
    shift: torch.Tensor | None,
    weight: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """dx like x; in float32 [dalpha] or, with a shift, [dalpha, dshift]; dweight and dbias [D]."""
    grad, x, alpha, weight = grad.contiguous(), x.contiguous(), float32(alpha), float32(weight)
    D = x.shape[-1]
    rows = x.numel() // D if D else 0
    dx = torch.empty_like(x)
    new = torch.empty if x.numel() else torch.zeros
    scalars = 1 if shift is None else 2
    alpha_shift, dweight, dbias = (new(n, dtype=torch.float32, device=x.device) for n in (scalars, D, D))
    if not x.numel():
        return dx, alpha_shift, dweight, dbias
    tile, blocks = BACKWARD[column_tile(D)], row_blocks(rows)
    tiles = triton.cdiv(D, tile.cols)
    part_columns = torch.empty(blocks, 2, D, dtype=torch.float32, device=x.device)
    part_scalars = torch.empty(blocks, tiles, 2, dtype=torch.float32, device=x.device)
    backward_kernel[(blocks, tiles)](
        grad, grad if grad_sum is None else grad_sum.contiguous(), x, alpha,
        alpha if shift is None else float32(shift), weight, dx, part_columns, part_scalars,
        rows, triton.cdiv(rows, blocks), D,
        ERF=shift is not None, RESIDUAL=grad_sum is not None, ROWS=tile.rows, COLS=tile.cols,
        num_warps=tile.num_warps, num_stages=1, enable_fp_fusion=FUSION,
    )  # fmt: skip
    sum_blocks(part_columns, dweight, dbias, part_scalars, alpha_shift, scalars)
    return dx, alpha_shift, dweight, dbias


def configurations(erf: bool) -> Iterator[Configuration]:
    """What `forward` and `backward` launch: every tile and dtype of x, D divisible by 16 or not."""
    for cols, odd in ((512, False), (128, False), (128, True)):
        for dtype in ("fp32", "bf16", "fp16"):
            for residual in (False, True):
                io, flags = f"*{dtype}", {"ERF": erf, "RESIDUAL": residual}
                suffix = f"{dtype}-{cols}{'-odd' if odd else ''}{'-residual' if residual else ''}"
                types = dict.fromkeys(("x", "residual", "y", "total", "grad", "grad_sum", "dx"), io)
                yield configuration(f"forward-{suffix}", forward_kernel, FORWARD[cols], odd, flags, types)
                yield configuration(f"backward-{suffix}", backward_kernel, BACKWARD[cols], odd, flags, types)
    yield from sum_configurations(2 if erf else 1)
