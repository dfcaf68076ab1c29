"""The short convolution in CUDA C++ (csrc/causal_conv1d); the contract is in op.py."""

from __future__ import annotations

import torch

from .._cuda import Struct, count, launch, view
from ..selective_scan.op import dense_like
from .reference import ordered_taps


def forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str | None,
    direction: str,
    cu_seqlens: torch.Tensor | None,
) -> torch.Tensor:
    y = dense_like(x)
    if x.numel():
        launch("causal_conv1d_forward", _problem(x, y, None, None, weight, bias, activation, direction, cu_seqlens))
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
    dx = dense_like(x)
    (channels, width), tiles = weight.shape, count("causal_conv1d_tiles", x.shape[2])
    parts = torch.empty(tiles, x.shape[0], width + 1, channels, dtype=torch.float32, device=x.device)
    if x.numel():
        problem = _problem(x, grad, dx, parts, weight, bias, activation, direction, cu_seqlens)
        launch("causal_conv1d_backward", problem)
    *dweight, dbias = parts.sum((0, 1))
    if direction == "backward":
        dweight.reverse()
    return dx, torch.stack(dweight, 1).to(weight.dtype), x.new_empty(0) if bias is None else dbias.to(bias.dtype)


def _problem(x, y, dx, parts, weight, bias, activation, direction, cu_seqlens) -> Struct:  # type: ignore[no-untyped-def]
    """The C++ Convolution."""
    (channels, width), (first, taps) = weight.shape, ordered_taps(weight, direction)
    return Struct(
        x.shape[0], channels, x.shape[2], width, first, view(x), view(y), view(dx), taps,
        None if bias is None else bias.float().contiguous(), None if cu_seqlens is None else cu_seqlens.contiguous(),
        0 if cu_seqlens is None else len(cu_seqlens) - 1, activation == "silu", parts,
    )  # fmt: skip
