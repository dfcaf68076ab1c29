"""Derf in CUDA C++ (csrc/derf); the contract is in op.py."""

from __future__ import annotations

import torch

from .._cuda import DTYPES, count, launch
from .._norms import contiguous, new_outputs


def forward(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    alpha: torch.Tensor,
    shift: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """y and the sum, which is empty without a residual."""
    x, residual = x.contiguous(), contiguous(residual)
    alpha, shift, weight, bias = (t.float().contiguous() for t in (alpha, shift, weight, bias))
    y, s = new_outputs(x, residual)
    if x.numel():
        D, total = x.shape[-1], None if residual is None else s
        launch("derf_forward", x, residual, alpha, shift, weight, bias, y, total, x.numel() // D, D, DTYPES[x.dtype])
    return y, s


def backward(
    grad: torch.Tensor,
    grad_sum: torch.Tensor | None,
    x: torch.Tensor,
    alpha: torch.Tensor,
    shift: torch.Tensor,
    weight: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """x: what was normalised. dx like x; in float32 [dalpha, dshift], dweight and dbias [D]."""
    grad, grad_sum, x, weight = grad.contiguous(), contiguous(grad_sum), x.contiguous(), weight.float().contiguous()
    D = x.shape[-1]
    dx = torch.empty_like(x)
    new = torch.empty if x.numel() else torch.zeros
    dalpha_dshift, dweight, dbias = (new(n, dtype=torch.float32, device=x.device) for n in (2, D, D))
    if x.numel():
        rows = x.numel() // D
        scratch = torch.empty(count("derf_scratch", rows, D), dtype=torch.float32, device=x.device)
        launch(
            "derf_backward", grad, grad_sum, x, alpha.float(), shift.float(), weight, dx, dalpha_dshift, dweight,
            dbias, scratch, rows, D, DTYPES[x.dtype],
        )  # fmt: skip
    return dx, dalpha_dshift, dweight, dbias
