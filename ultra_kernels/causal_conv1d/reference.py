"""Depthwise convolution over time in PyTorch; the contract is in op.py."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def causal_conv1d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
    direction: str = "forward",
    cu_seqlens: torch.Tensor | None = None,
) -> torch.Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    length, width = x.shape[-1], weight.shape[1]
    t = torch.arange(length, device=x.device)
    of = None if cu_seqlens is None else torch.searchsorted(cu_seqlens[1:].long(), t, right=True)
    padded = F.pad(x.to(wide), (width, width))
    y = torch.zeros_like(x, dtype=wide) if bias is None else bias.to(wide)[:, None].expand(x.shape)
    for j in range(width):
        o = offset(j, width, direction)
        tap = padded[..., width + o : width + o + length]
        if of is not None:  # a tap of another sequence counts as 0
            tap = tap.masked_fill(of != F.pad(of, (width, width), value=-1)[width + o : width + o + length], 0)
        y = y + weight[:, j].to(wide)[:, None] * tap
    return (F.silu(y) if activation == "silu" else y).to(x.dtype)


def ordered_taps(weight: torch.Tensor, direction: str) -> tuple[int, torch.Tensor]:
    """The offset of the first position that is read, and float32 `[W,D]`, the taps in the order of the positions."""
    width, rows = weight.shape[1], weight.float().t()
    first = min(offset(0, width, direction), offset(width - 1, width, direction))
    return first, (rows.flip(0) if direction == "backward" else rows).contiguous()


def offset(j: int, width: int, direction: str) -> int:
    """Tap j of the output at t reads the input at t + offset."""
    if direction == "forward":
        return j - (width - 1)
    return width - 1 - j if direction == "backward" else j - (width - 1) // 2
