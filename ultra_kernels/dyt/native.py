"""DyT in C++ (csrc/dyt); the contract is in op.py."""

from __future__ import annotations

import torch

from .._native import DTYPES, load


def forward(x: torch.Tensor, alpha: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    x, weight, bias = x.contiguous(), weight.float().contiguous(), bias.float().contiguous()
    y = torch.empty_like(x)
    D = x.shape[-1]
    if x.numel():
        load().dyt_forward(
            x.data_ptr(), float(alpha), weight.data_ptr(), bias.data_ptr(), y.data_ptr(),
            x.numel() // D, D, DTYPES[x.dtype], torch.get_num_threads(),
        )  # fmt: skip
    return y


def backward(
    grad: torch.Tensor, x: torch.Tensor, alpha: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    grad, x, weight = grad.contiguous(), x.contiguous(), weight.float().contiguous()
    C, D = load(), x.shape[-1]
    rows = x.numel() // D if D else 0
    dx = torch.empty_like(x)
    dalpha, dweight, dbias = (torch.empty(n, dtype=torch.float32) for n in (1, D, D))
    scratch = torch.empty(C.row_blocks(rows) * (2 * D + 2), dtype=torch.float32)
    C.dyt_backward(
        grad.data_ptr(), x.data_ptr(), float(alpha), weight.data_ptr(), dx.data_ptr(), dalpha.data_ptr(),
        dweight.data_ptr(), dbias.data_ptr(), scratch.data_ptr(), rows, D, DTYPES[x.dtype], torch.get_num_threads(),
    )  # fmt: skip
    return dx, dalpha, dweight, dbias
