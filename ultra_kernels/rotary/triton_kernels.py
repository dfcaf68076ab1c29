"""Rotary position encoding in Triton; the contract is in op.py.

Angles are float64 and no table is read: a pair turns by p · f quarter turns, f = frequency · 2/π, whose whole number
says which of sine and cosine is which and whose fraction, in -1/2 .. 1/2, goes on in float32. A program computes the
angles of a tile of tokens once and turns several heads by them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .._rows_triton import _load, _readable, _rows, _strides
from .._triton import ARCHS, Configuration


@triton.jit
def _rotation(turns):
    """Cosine and sine of float64 quarter turns, right to 1e-7: the polynomials of Cephes, of an angle up to π/4."""
    whole = tl.floor(turns + 0.5)
    r = (turns - whole).to(tl.float32) * 1.5707963267948966
    s = r * r
    p = 8.3321608736e-3 - s * 1.9515295891e-4
    sine = r + r * s * (s * p - 1.6666654611e-1)
    p = s * 2.443315711809948e-5 - 1.388731625493765e-3
    cosine = 1.0 - 0.5 * s + s * s * (s * p + 4.166664568298827e-2)
    quarter = whole.to(tl.int64)
    odd = (quarter & 1) != 0
    c, s = tl.where(odd, sine, cosine), tl.where(odd, cosine, sine)
    return tl.where(((quarter + 1) & 2) != 0, -c, c), tl.where((quarter & 2) != 0, -s, s)


_SIZES = ["x_batch", "x_row", "x_head", "position_batch", "position_row", "T", "H", "K16", "pairs", "blocks"]


@triton.jit(do_not_specialize=_SIZES)
def turn_kernel(
    x, y, positions, frequency, direction,
    x_batch, x_row, x_head, position_batch, position_row, T, H, K16, pairs, blocks,
    ROWS: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """y `[B,T,H,K]` of ROWS tokens and HEADS heads; frequency `[pairs]` in quarter turns, direction -1: turned back.

    Grid: blocks of ROWS tokens, `blocks` of each batch entry; blocks of heads. Strides come in units of 8 elements and
    K in units of 16.
    """
    batch = tl.program_id(0).to(tl.int64) // blocks
    t = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    K = K16 * 16
    i, d = tl.arange(0, WIDTH // 2), tl.arange(0, WIDTH)
    at = positions + batch * position_batch + t.to(tl.int64) * position_row
    place = tl.load(at, mask=t < T, other=0).to(tl.float64)
    f = tl.load(frequency + i, mask=i < pairs, other=0.0)
    c, s = _rotation(place[:, None] * f[None, :])
    s = s * direction
    for j in tl.static_range(HEADS):
        h = tl.program_id(1) * HEADS + j
        inside = t < tl.where(h < H, T, 0)
        rows = _load(_rows(x, batch, h, t, x_batch, x_row, x_head), inside, d, K).to(tl.float32)
        x1, x2 = tl.split(tl.reshape(rows, (ROWS, WIDTH // 2, 2)))
        turned = tl.reshape(tl.join(x1 * c - x2 * s, x2 * c + x1 * s), (ROWS, WIDTH))
        out = y + ((batch * T + t) * H + h) * K
        tl.store(out[:, None] + d[None, :], turned, mask=inside[:, None] & (d < K)[None, :])


class Tile(NamedTuple):
    rows: int  # tokens
    heads: int
    num_warps: int


# By head dimension up to which a tile serves; not timed on a GPU yet. A thread holds 8 pairs' angles and loads 16 bytes
# at a time.
TILES = {32: Tile(64, 4, 4), 64: Tile(32, 4, 4), 128: Tile(16, 4, 4), 256: Tile(8, 4, 4)}
FUSION = True  # Triton's own default differs between versions


def forward(x: torch.Tensor, positions: torch.Tensor, theta: float, inv_freq: torch.Tensor | None) -> torch.Tensor:
    return _turned(x, positions, theta, inv_freq, 1.0)


def backward(grad: torch.Tensor, positions: torch.Tensor, theta: float, inv_freq: torch.Tensor | None) -> torch.Tensor:
    """The gradient turned back."""
    return _turned(grad, positions, theta, inv_freq, -1.0)


def _turned(
    x: torch.Tensor, positions: torch.Tensor, theta: float, inv_freq: torch.Tensor | None, direction: float
) -> torch.Tensor:
    B, T, H, K = x.shape
    rows = _readable(x)
    width = rows.shape[3]  # K, or the next multiple of 16
    y = torch.empty(rows.shape, dtype=x.dtype, device=x.device)
    if y.numel():
        if inv_freq is None:  # computed anew: a tensor that is kept may lie in the memory of a CUDA graph
            inv_freq = torch.logspace(0, 2 / K - 1, K // 2, base=theta, dtype=torch.float64, device=x.device)
        frequency = inv_freq.double() * (2 / math.pi)
        places = positions.long().expand(B, T)
        size = next(size for size in TILES if size >= width)
        tile = TILES[size]
        blocks = triton.cdiv(T, tile.rows)
        turn_kernel[(B * blocks, triton.cdiv(H, tile.heads))](
            rows, y, places, frequency, direction, *_strides(rows), *places.stride(), T, H, width // 16, K // 2, blocks,
            ROWS=tile.rows, HEADS=tile.heads, WIDTH=size, num_warps=tile.num_warps, enable_fp_fusion=FUSION,
        )  # fmt: skip
    return y[..., :K].contiguous()


def configurations() -> list[Configuration]:
    """Every specialisation that the op launches."""
    return list(_configurations())


def _configurations() -> Iterator[Configuration]:
    for dtype in ("fp32", "bf16", "fp16"):
        for size, tile in TILES.items():
            signature = dict.fromkeys(_SIZES, "i32") | {
                "x": f"*{dtype}", "y": f"*{dtype}", "positions": "*i64", "frequency": "*fp64", "direction": "fp32"
            }  # fmt: skip
            constexprs = {"ROWS": tile.rows, "HEADS": tile.heads, "WIDTH": size}
            yield Configuration(
                f"turn-{dtype}-{size}", turn_kernel, signature, constexprs, ("x", "y", "positions", "frequency"),
                tile.num_warps, enable_fp_fusion=FUSION, archs=ARCHS,
            )  # fmt: skip
