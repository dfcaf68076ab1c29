"""DyT in CUDA C++ (csrc/dyt); the contract is in op.py."""

from __future__ import annotations

import torch

from .._cuda import DTYPES, count, launch


def forward(x: torch.Tensor, alpha: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    x, alpha, weight, bias = x.contiguous(), *(t.float().contiguous() for t in (alpha, weight, bias))
    y = torch.empty_like(x)
    if x.numel():
        D = x.shape[-1]
        launch("dyt_forward", x, alpha, weight, bias, y, x.numel() // D, D, DTYPES[x.dtype])
    return y


def backward(
    grad: torch.Tensor, x: torch.Tensor, alpha: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    grad, x, alpha, weight = grad.contiguous(), x.contiguous(), alpha.float(), weight.float().contiguous()
    D = x.shape[-1]
    dx = torch.empty_like(x)
    new = torch.empty if x.numel() else torch.zeros
    dalpha, dweight, dbias = (new(n, dtype=torch.float32, device=x.device) for n in (1, D, D))
    if x.numel():
        rows = x.numel() // D
        scratch = torch.empty(count("dyt_scratch", rows, D), dtype=torch.float32, device=x.device)
        launch("dyt_backward", grad, x, alpha, weight, dx, dalpha, dweight, dbias, scratch, rows, D, DTYPES[x.dtype])
    return dx, dalpha, dweight, dbias
