"""Short depthwise convolution over time, as Mamba puts before its scan."""

from __future__ import annotations

import torch

from .._dispatch import Op
from ..selective_scan.op import check_cu_seqlens
from . import reference

OP = Op("causal_conv1d", __package__, {"cuda": ("reference",), "cpu": ("reference",)}, {})


def causal_conv1d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    activation: str | None = None,
    direction: str = "forward",
    cu_seqlens: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """y_t = act(bias + Σ_j w_j x_{t+o(j)}) per channel, in float32, x = 0 outside its sequence.

    x `[B,D,L]`; weight `[D,W]`, W 2..8; bias `[D]`; activation None or "silu". direction "forward": o(j) = j − (W−1),
    causal; "backward": o(j) = (W−1) − j, its mirror image; "centred": o(j) = j − (W−1)//2. cu_seqlens int32
    `[num_seqs + 1]` (B = 1): no tap crosses a border. Returns y in x's shape and dtype.
    Call-compatible by keyword with causal_conv1d_fn of Dao-AILab/causal-conv1d. Raises ValueError, BackendUnavailable.
    After Gu & Dao 2023 (arXiv:2312.00752).
    """
    if x.dim() != 3:
        raise ValueError(f"causal_conv1d: x has shape {tuple(x.shape)}; it must be [B,D,L]")
    channels = x.shape[1]
    if weight.dim() != 2 or weight.shape[0] != channels or not 2 <= weight.shape[1] <= 8:
        raise ValueError(
            f"causal_conv1d: weight has shape {tuple(weight.shape)}; x is {tuple(x.shape)}, so it must be "
            f"({channels}, W) with W from 2 to 8"
        )
    if bias is not None and bias.shape != (channels,):
        raise ValueError(f"causal_conv1d: bias has shape {tuple(bias.shape)}; it must be ({channels},)")
    if activation not in (None, "silu"):
        raise ValueError(f"causal_conv1d: activation is {activation!r}; it must be None or 'silu'")
    if direction not in ("forward", "backward", "centred"):
        raise ValueError(f"causal_conv1d: direction is {direction!r}; it must be 'forward', 'backward' or 'centred'")
    check_cu_seqlens("causal_conv1d", "x", x, cu_seqlens)
    OP.choose(backend, x)
    return reference.causal_conv1d(x, weight, bias, activation, direction, cu_seqlens)
