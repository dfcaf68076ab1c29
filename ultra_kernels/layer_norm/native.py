"""Layer normalisation in C++ (csrc/layer_norm); the contract is in op.py."""

from __future__ import annotations

import torch

from .._native import DTYPES, address, load
from .._norms import contiguous, new_outputs


def forward(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """y, the sum, which is empty without a residual, and what the backward needs of each row."""
    x, residual = x.contiguous(), contiguous(residual)
    weight, bias = weight.float().contiguous(), bias.float().contiguous()
    y, s = new_outputs(x, residual)
    stats = x.new_empty((*x.shape[:-1], 3), dtype=torch.float32)
    D = x.shape[-1]
    if x.numel():
        load().layer_norm_forward(
            x.data_ptr(), address(residual), weight.data_ptr(), bias.data_ptr(), y.data_ptr(), s.data_ptr(),
            stats.data_ptr(), x.numel() // D, D, eps, DTYPES[x.dtype], torch.get_num_threads(),
        )  # fmt: skip
    return y, s, stats


def backward(
    grad: torch.Tensor, grad_sum: torch.Tensor | None, x: torch.Tensor, stats: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x: what was normalised. dx like x; dweight and dbias [D] in float32."""
    grad, grad_sum, x, weight = grad.contiguous(), contiguous(grad_sum), x.contiguous(), weight.float().contiguous()
    C, D = load(), x.shape[-1]
    rows = x.numel() // D if D else 0
    dx = torch.empty_like(x)
    dweight, dbias = (torch.empty(D, dtype=torch.float32) for _ in range(2))
    scratch = torch.empty(C.row_blocks(rows) * 2 * D, dtype=torch.float32)
    C.layer_norm_backward(
        grad.data_ptr(), address(grad_sum), x.data_ptr(), stats.data_ptr(), weight.data_ptr(), dx.data_ptr(),
        dweight.data_ptr(), dbias.data_ptr(), scratch.data_ptr(), rows, D, DTYPES[x.dtype], torch.get_num_threads(),
    )  # fmt: skip
    return dx, dweight, dbias
