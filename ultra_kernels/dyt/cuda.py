"""DyT in CUDA C++ (csrc/dyt); the contract is in op.py."""

from __future__ import annotations

import torch

from .._cuda import DTYPES, count, launch
from .._norms import contiguous, new_outputs


def forward(
    x: torch.Tensor, residual: torch.Tensor | None, alpha: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """y and the sum, which is empty without a residual."""
    x, residual = x.contiguous(), contiguous(residual)
    alpha, weight, bias = (t.float().contiguous() for t in (alpha, weight, bias))
    y, s = new_outputs(x, residual)
    if x.numel():
        D, total = x.shape[-1], None if residual is None else s
        launch("dyt_forward", x, residual, alpha, weight, bias, y, total, x.numel() // D, D, DTYPES[x.dtype])
    return y, s


def backward(
    grad: torch.Tensor, grad_sum: torch.Tensor | None, x: torch.Tensor, alpha: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """x: what was normalised. dx like x; in float32 dalpha [1], dweight and dbias [D]."""
    grad, grad_sum, x = grad.contiguous(), contiguous(grad_sum), x.contiguous()
    alpha, weight = alpha.float(), weight.float().contiguous()
    D = x.shape[-1]
    dx = torch.empty_like(x)
    new = torch.empty if x.numel() else torch.zeros
    dalpha, dweight, dbias = (new(n, dtype=torch.float32, device=x.device) for n in (1, D, D))
    if x.numel():
        rows = x.numel() // D
        scratch = torch.empty(count("dyt_scratch", rows, D), dtype=torch.float32, device=x.device)
        launch(
            "dyt_backward", grad, grad_sum, x, alpha, weight, dx, dalpha, dweight, dbias, scratch,
            rows, D, DTYPES[x.dtype],
        )  # fmt: skip
    return dx, dalpha, dweight, dbias
