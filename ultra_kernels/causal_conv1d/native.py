"""The short convolution in C++ (csrc/causal_conv1d); the contract is in op.py."""

from __future__ import annotations

import torch

from .._native import address, load, view
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
    problem, _keep = _problem(x, weight, bias, activation, direction, cu_seqlens)
    load().conv_forward(*problem, view(y), torch.get_num_threads())
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
    channels, width = weight.shape
    dweight = torch.empty(width, channels, dtype=torch.float32)
    dbias = torch.empty(channels, dtype=torch.float32)
    problem, _keep = _problem(x, weight, bias, activation, direction, cu_seqlens)
    load().conv_backward(*problem, view(grad), view(dx), dweight.data_ptr(), dbias.data_ptr(), torch.get_num_threads())
    if direction == "backward":
        dweight = dweight.flip(0)
    dweight = dweight.t().to(weight.dtype, memory_format=torch.contiguous_format, copy=True)
    return dx, dweight, x.new_empty(0) if bias is None else dbias.to(bias.dtype)


def _problem(x, weight, bias, activation, direction, cu_seqlens):  # type: ignore[no-untyped-def]
    """The leading arguments of the C++ functions, and the tensors that must outlive the call."""
    (channels, width), (first, rows) = weight.shape, ordered_taps(weight, direction)
    bias = None if bias is None else bias.float().contiguous()
    cu_seqlens = None if cu_seqlens is None else cu_seqlens.contiguous()
    sizes = (x.shape[0], channels, x.shape[2], width, first)
    num_seqs = 0 if cu_seqlens is None else len(cu_seqlens) - 1
    arguments = (
        sizes, view(x), rows.data_ptr(), address(bias), address(cu_seqlens), num_seqs, activation == "silu",
    )  # fmt: skip
    return arguments, (rows, bias, cu_seqlens)
