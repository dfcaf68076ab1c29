"""DyT in C++ (csrc/dyt); the contract is in op.py."""

from __future__ import annotations

import torch

from .._native import DTYPES, address, load
from .._norms import contiguous, new_outputs


def forward(
    x: torch.Tensor, residual: torch.Tensor | None, alpha: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """y and the sum, which is empty without a residual."""
    x, residual = x.contiguous(), contiguous(residual)
    weight, bias = weight.float().contiguous(), bias.float().contiguous()
    y, s = new_outputs(x, residual)
    D = x.shape[-1]
    if x.numel():
        load().dyt_forward(
            x.data_ptr(), address(residual), float(alpha), weight.data_ptr(), bias.data_ptr(), y.data_ptr(),
            s.data_ptr(), x.numel() // D, D, DTYPES[x.dtype], torch.get_num_threads(),
        )  # fmt: skip
    return y, s


def backward(
    grad: torch.Tensor, grad_sum: torch.Tensor | None, x: torch.Tensor, alpha: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """x: what was normalised. dx like x; in float32 dalpha [1], dweight and dbias [D]."""
    grad, grad_sum, x, weight = grad.contiguous(), contiguous(grad_sum), x.contiguous(), weight.float().contiguous()
    C, D = load(), x.shape[-1]
    rows = x.numel() // D if D else 0
    dx = torch.empty_like(x)
    dalpha, dweight, dbias = (torch.empty(n, dtype=torch.float32) for n in (1, D, D))
    scratch = torch.empty(C.row_blocks(rows) * (2 * D + 2), dtype=torch.float32)
    C.dyt_backward(
        grad.data_ptr(), address(grad_sum), x.data_ptr(), float(alpha), weight.data_ptr(), dx.data_ptr(),
        dalpha.data_ptr(), dweight.data_ptr(), dbias.data_ptr(), scratch.data_ptr(), rows, D, DTYPES[x.dtype],
        torch.get_num_threads(),
    )  # fmt: skip
    return dx, dalpha, dweight, dbias
