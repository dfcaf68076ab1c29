"""Products with packed ternary weights in Triton; the contracts are in op.py, the quantisers are those of bitlinear.

A program holds a tile of y and reads 8 blocks of its panels at a time, 128 columns in 32 bytes a row. Their four slots
are unpacked in registers and multiplied one after another with the columns of x that belong to a slot, which the
quantiser has put side by side. A code is its weight plus one: the sums of x are taken off at the end.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from .._triton import Configuration
from ..bitlinear import triton_kernels as bitlinear
from ..bitlinear.triton_kernels import Tile, _finish, _rows, ends_or_none, quantize_tokens, tiles_of


@triton.jit(do_not_specialize=["M", "N", "E", "blocks", "num_bias"])
def panels_kernel(
    x, codes, totals, step, scale, bias, ends, y, M, N, E, blocks, num_bias,
    INTEGER: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A tile of y `[M, N]` = x weightsᵀ, with step, scale and groups as `product_kernel` has them, or INTEGER without.

    x int8 `[M, 128 groups]` in the order of slots, totals its rows' sums; codes `[E, panels, blocks, 64]`.
    """
    pid = tl.program_id(0)
    tiles = tl.cdiv(N, BLOCK_N)
    e, first, end = _rows(ends, pid // tiles, M, E, BLOCK_M)
    n0 = pid % tiles * BLOCK_N
    m = first + tl.arange(0, BLOCK_M)
    m_ok = m < end
    n = n0 + tl.arange(0, BLOCK_N)
    panel = n0 // 16 + tl.arange(0, BLOCK_N // 16)
    byte, j = tl.arange(0, 512), tl.arange(0, 32)
    groups = tl.cdiv(blocks, 8)
    x_rows = x + m.to(tl.int64)[:, None] * (groups * 128)
    panels = codes + e * tl.cdiv(N, 16) * blocks * 64 + panel.to(tl.int64)[:, None] * (blocks * 64)
    panel_ok = (panel < tl.cdiv(N, 16))[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for g in range(tl.where(first < end, groups, 0)):
        at = g * 512 + byte
        packed = tl.load(panels + at[None, :], mask=panel_ok & (at < blocks * 64)[None, :], other=0)
        packed = tl.permute(tl.reshape(packed, (BLOCK_N // 16, 8, 16, 4)), (0, 2, 1, 3))
        packed = tl.reshape(packed, (BLOCK_N, 32))
        for s in tl.static_range(4):
            a = tl.load(x_rows + (g * 128 + s * 32 + j)[None, :], mask=m_ok[:, None], other=0)
            b = ((packed >> 2 * s) & 3).to(tl.int8)
            acc = tl.dot(a, tl.trans(b), acc, out_dtype=tl.int32)
    acc -= tl.load(totals + m, mask=m_ok, other=0)[:, None]
    if INTEGER:
        tl.store(y + m.to(tl.int64)[:, None] * N + n[None, :], acc, mask=m_ok[:, None] & (n < N)[None, :])
    else:
        _finish(acc, step, scale + e, bias + e * N, y, m, n, end, N, num_bias)


# Rows of x, or of a group of it, up to which a tile serves. Not timed on a GPU yet. None spills with Triton 3.6 or 3.9.
PANELS = {16: Tile(16, 32, 4, 3), 64: Tile(64, 64, 4, 3), 2**31: Tile(128, 128, 8, 3)}


def quantize_ternary(weight: torch.Tensor, scale: str) -> tuple[torch.Tensor, torch.Tensor]:
    return bitlinear.quantize_weight(weight, scale)


def ternary_matmul(x: torch.Tensor, codes: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    (M, K), groups = x.shape, triton.cdiv(x.shape[1], 128)
    y = x.new_empty(M, shape[0], dtype=torch.int32)
    # column 128 g + 16 j + 4 s + i of x lies at 128 g + 32 s + 4 j + i
    slots = F.pad(x, (0, 128 * groups - K)).reshape(M, groups, 8, 4, 4).transpose(2, 3).contiguous()
    _multiply(slots, x.sum(1, dtype=torch.int32), codes, y)
    return y


def ternary_linear(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    shape: tuple[int, int],
    bias: torch.Tensor | None,
    ends: torch.Tensor | None = None,
) -> torch.Tensor:
    (N, K), M = shape, x.shape[:-1].numel()
    y = x.new_empty(*x.shape[:-1], N)
    slots, step, totals = quantize_tokens(x.reshape(M, K), panels=True)
    _multiply(slots, totals, codes, y.view(M, N), step, scale, bias, ends)
    return y


def _multiply(
    x: torch.Tensor,
    totals: torch.Tensor,
    codes: torch.Tensor,
    y: torch.Tensor,
    step: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    ends: torch.Tensor | None = None,
) -> None:
    M, N = y.shape
    if not y.numel():
        return
    E = 0 if ends is None else len(ends)
    tile = next(tile for rows, tile in PANELS.items() if M <= rows * max(E, 1))
    none = totals.view(torch.float32)  # what is not used is an address of its type
    panels_kernel[(tiles_of(M, tile.block_m, E) * triton.cdiv(N, tile.block_n),)](
        x, codes.contiguous(), totals, none if step is None else step, none if scale is None else scale,
        none if bias is None else bias.float().contiguous(), ends_or_none(x, ends), y, M, N, E, codes.shape[-2],
        0 if bias is None else N,
        INTEGER=step is None, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, num_warps=tile.num_warps,
        num_stages=tile.num_stages, enable_fp_fusion=False,
    )  # fmt: skip


def configurations() -> Iterator[Configuration]:
    """What the functions above launch: every dtype of y and tile; those of the quantisers."""
    yield from bitlinear.token_configurations(norm=False, panels=True)
    yield from bitlinear.weight_configurations()
    for dtype in ("i32", *bitlinear.DTYPES):
        for t in PANELS.values():
            yield bitlinear.configuration(
                f"panels-{t.block_m}-{dtype}",
                panels_kernel,
                {"x": "*i8", "codes": "*u8", "totals": "*i32", "ends": "*i64", "y": f"*{dtype}", "blocks": "i32"},
                {"INTEGER": dtype == "i32", "BLOCK_M": t.block_m, "BLOCK_N": t.block_n},
                ("M", "N", "E", "blocks", "num_bias"),
                t.num_warps,
                t.num_stages,
            )
