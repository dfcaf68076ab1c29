"""The short convolution in Triton; the contract is in op.py.

A program makes a tile of BLOCK_T steps × BLOCK_D channels; every tap reads the tile again, shifted, from the cache.
Which of the two axes lies densely in memory is a constant of the kernel. The backward leaves g, the gradient before the
activation, and parts of dweight and dbias; the gradient of the input is the same convolution of g with mirrored taps.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl

from .._triton import ARCHS, Configuration
from ..selective_scan.op import dense_like
from .reference import ordered_taps

BLOCK_T, BLOCK_D = 32, 64
NUM_WARPS = 4
FUSION = True  # Triton's own default differs between versions


@triton.jit
def _tile(x, b, t, d, stride_batch, stride_other, ok, ALONG_TIME: tl.constexpr):
    """Rows t × channels d in float32, zero where not ok; stride_other is that of the axis with gaps."""
    base = x + b * stride_batch.to(tl.int64)
    if ALONG_TIME:
        at = t[:, None] + d.to(tl.int64)[None, :] * stride_other
    else:
        at = t.to(tl.int64)[:, None] * stride_other + d[None, :]
    return tl.load(base + at, mask=ok, other=0.0).to(tl.float32)


@triton.jit
def _put(x, b, t, d, stride_batch, stride_other, value, ok, ALONG_TIME: tl.constexpr):
    base = x + b * stride_batch.to(tl.int64)
    if ALONG_TIME:
        at = t[:, None] + d.to(tl.int64)[None, :] * stride_other
    else:
        at = t.to(tl.int64)[:, None] * stride_other + d[None, :]
    tl.store(base + at, value.to(x.dtype.element_ty), mask=ok)


@triton.jit
def _spans(begins, ends, t, L, packed):
    """[begin, end) of the sequence of every step."""
    flag = 0 * t + packed > 0
    begin = tl.load(begins + t, mask=flag & (t < L), other=0)
    end = tl.load(ends + t, mask=flag & (t < L), other=0)
    return begin, tl.where(flag, end, L)


@triton.jit
def _convolve(
    x, taps, bias, b, t, d, begin, end, x_batch, x_other, first, W, D, has_bias,
    ALONG_TIME: tl.constexpr,
):  # fmt: skip
    y = tl.load(bias + d, mask=(d < D) & (0 * d + has_bias > 0), other=0.0)[None, :] + 0.0 * t[:, None]
    for j in range(0, W):
        at = t + first + j
        ok = ((at >= begin) & (at < end))[:, None] & (d < D)[None, :]
        w = tl.load(taps + j * D + d, mask=d < D, other=0.0)
        y += w[None, :] * _tile(x, b, at, d, x_batch, x_other, ok, ALONG_TIME)
    return y


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp2(-1.4426950408889634 * x))


_NUMBERS = ["x_batch", "x_other", "y_batch", "y_other", "g_batch", "g_other", "D", "L", "first", "W", "t_blocks",
            "d_blocks", "silu", "packed", "has_bias"]  # fmt: skip


@triton.jit(do_not_specialize=[n for n in _NUMBERS if n[0] != "g"])
def forward_kernel(
    x, y, taps, bias, begins, ends, x_batch, x_other, y_batch, y_other,
    D, L, first, W, t_blocks, d_blocks, silu, packed, has_bias,
    ALONG_TIME: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """y[t] = act(bias + Σ_j taps[j] x[t + first + j]). Grid: channel blocks, then time blocks, then batch."""
    pid = tl.program_id(0)
    d = pid % d_blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    t = pid // d_blocks % t_blocks * BLOCK_T + tl.arange(0, BLOCK_T)
    b = pid // d_blocks // t_blocks
    begin, end = _spans(begins, ends, t, L, packed)
    out = _convolve(x, taps, bias, b, t, d, begin, end, x_batch, x_other, first, W, D, has_bias, ALONG_TIME)
    out = tl.where((0 * t + silu > 0)[:, None], out * _sigmoid(out), out)
    _put(y, b, t, d, y_batch, y_other, out, (t < L)[:, None] & (d < D)[None, :], ALONG_TIME)


@triton.jit(do_not_specialize=_NUMBERS)
def gradient_kernel(
    x, y, g, taps, bias, begins, ends, parts, x_batch, x_other, y_batch, y_other, g_batch, g_other,
    D, L, first, W, t_blocks, d_blocks, silu, packed, has_bias,
    ALONG_TIME: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """g = y · act'(convolution), y the output's gradient; parts [B · t_blocks, W + 1, D]: dtaps, then dbias."""
    pid = tl.program_id(0)
    d = pid % d_blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    tile = pid // d_blocks
    t = tile % t_blocks * BLOCK_T + tl.arange(0, BLOCK_T)
    b = tile // t_blocks
    begin, end = _spans(begins, ends, t, L, packed)
    inside = (t < L)[:, None] & (d < D)[None, :]
    grad = _tile(y, b, t, d, y_batch, y_other, inside, ALONG_TIME)
    pre = _convolve(x, taps, bias, b, t, d, begin, end, x_batch, x_other, first, W, D, has_bias, ALONG_TIME)
    gate = _sigmoid(pre)
    grad = tl.where((0 * t + silu > 0)[:, None], grad * gate * (1.0 + pre * (1.0 - gate)), grad)
    _put(g, b, t, d, g_batch, g_other, grad, inside, ALONG_TIME)
    row = parts + tile.to(tl.int64) * (W + 1) * D + d
    for j in range(0, W):
        at = t + first + j
        ok = ((at >= begin) & (at < end))[:, None] & (d < D)[None, :]
        dw = tl.sum(grad * _tile(x, b, at, d, x_batch, x_other, ok, ALONG_TIME), axis=0)
        tl.store(row + j * D, dw, mask=d < D)
    tl.store(row + W * D, tl.sum(grad, axis=0), mask=d < D)


def forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str | None,
    direction: str,
    cu_seqlens: torch.Tensor | None,
) -> torch.Tensor:
    y, x = dense_like(x), _dense(x)
    first, taps = ordered_taps(weight.detach(), direction)
    _convolution(x, y, taps, bias, first, activation == "silu", _borders(x, cu_seqlens))
    return y


def backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str | None,
    direction: str,
    cu_seqlens: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x, weight, bias; the last is empty where there is no bias."""
    dx, x = dense_like(x), _dense(x)
    grad = grad if _along_time(grad) == _along_time(x) else torch.empty_like(dx).copy_(grad)
    g = torch.empty_like(dx, dtype=torch.float32)
    first, taps = ordered_taps(weight.detach(), direction)
    borders, width, channels = _borders(x, cu_seqlens), weight.shape[1], x.shape[1]
    tiles = x.shape[0] * triton.cdiv(x.shape[2], BLOCK_T)
    parts = torch.empty(tiles, width + 1, channels, dtype=torch.float32, device=x.device)
    if x.numel():
        shape = _shape(x, taps, bias, first, activation == "silu", borders)
        gradient_kernel[(tiles * triton.cdiv(channels, BLOCK_D),)](
            x=x, y=grad, g=g, parts=parts, **_steps("x", x), **_steps("y", grad), **_steps("g", g), **shape
        )
        _convolution(g, dx, taps.flip(0).contiguous(), None, 1 - width - first, False, borders)
    *dweight, dbias = parts.sum(0)
    if direction == "backward":
        dweight.reverse()
    return dx, torch.stack(dweight, 1).to(weight.dtype), x.new_empty(0) if bias is None else dbias.to(bias.dtype)


def _convolution(
    x: torch.Tensor,
    y: torch.Tensor,
    taps: torch.Tensor,
    bias: torch.Tensor | None,
    first: int,
    silu: bool,
    borders: tuple[torch.Tensor, torch.Tensor] | None,
) -> None:
    if x.numel():
        grid = x.shape[0] * triton.cdiv(x.shape[2], BLOCK_T) * triton.cdiv(x.shape[1], BLOCK_D)
        shape = _shape(x, taps, bias, first, silu, borders)
        forward_kernel[(grid,)](x=x, y=y, **_steps("x", x), **_steps("y", y), **shape)


def _shape(  # type: ignore[no-untyped-def]
    x: torch.Tensor, taps: torch.Tensor, bias: torch.Tensor | None, first: int, silu: bool, borders
) -> dict[str, Any]:
    """The arguments that both kernels take."""
    begins, ends = borders or (taps.new_empty(0, dtype=torch.int32),) * 2
    return dict(
        taps=taps, bias=taps if bias is None else bias.detach().float().contiguous(), begins=begins, ends=ends,
        D=x.shape[1], L=x.shape[2], first=first, W=len(taps), t_blocks=triton.cdiv(x.shape[2], BLOCK_T),
        d_blocks=triton.cdiv(x.shape[1], BLOCK_D), silu=int(silu), packed=int(borders is not None),
        has_bias=int(bias is not None), ALONG_TIME=_along_time(x), BLOCK_T=BLOCK_T, BLOCK_D=BLOCK_D,
        num_warps=NUM_WARPS, enable_fp_fusion=FUSION,
    )  # fmt: skip


def _borders(x: torch.Tensor, cu_seqlens: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Begin and end of the sequence of every step, int32 [L] each."""
    if cu_seqlens is None:
        return None
    t = torch.arange(x.shape[2], dtype=torch.int32, device=x.device)
    sequence = torch.searchsorted(cu_seqlens[1:].contiguous(), t, right=True).clamp(max=len(cu_seqlens) - 2)
    return cu_seqlens[:-1][sequence], cu_seqlens[1:][sequence]


def _along_time(x: torch.Tensor) -> bool | None:
    """Whether steps lie side by side in memory, else whether channels do, else None; axes of size 1 fit either."""
    if x.stride(1) == 1 or (x.shape[1] == 1 and x.shape[2] == 1):
        return False
    if x.stride(2) == 1 or x.shape[2] == 1:
        return True
    return None


def _dense(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous() if _along_time(x) is None else x


def _steps(name: str, x: torch.Tensor) -> dict[str, int]:
    return {f"{name}_batch": x.stride(0), f"{name}_other": x.stride(1 if _along_time(x) else 2)}


def configurations() -> list[Configuration]:
    """Every specialisation that the op launches; float16 differs from bfloat16 in conversions alone."""
    return list(_configurations())


def _configurations() -> Iterator[Configuration]:
    for dtype, archs in (("fp32", ARCHS), ("bf16", ARCHS), ("fp16", (90,))):
        for along_time in (False, True):
            axis = "time" if along_time else "channels"
            yield _configuration(f"forward-{dtype}-{axis}", forward_kernel, {"x": dtype, "y": dtype}, along_time, archs)
            types = {"x": dtype, "y": dtype}
            yield _configuration(f"gradient-{dtype}-{axis}", gradient_kernel, types, along_time, archs)
            if dtype != "fp32":  # of g
                types = {"x": "fp32", "y": dtype}
                yield _configuration(f"input-{dtype}-{axis}", forward_kernel, types, along_time, archs)


def _configuration(
    name: str, kernel: Any, types: dict[str, str], along_time: bool, archs: tuple[int, ...]
) -> Configuration:
    constexprs = {"ALONG_TIME": along_time, "BLOCK_T": BLOCK_T, "BLOCK_D": BLOCK_D}
    signature = {
        a: "i32" if a in _NUMBERS else "*i32" if a in ("begins", "ends") else f"*{types.get(a, 'fp32')}"
        for a in kernel.arg_names
        if a not in constexprs
    }
    aligned = tuple(a for a, t in signature.items() if t.startswith("*"))
    return Configuration(name, kernel, signature, constexprs, aligned, NUM_WARPS, enable_fp_fusion=FUSION, archs=archs)
