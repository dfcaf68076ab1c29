"""Derf in CUDA C++ (csrc/derf); the contract is in op.py."""

from __future__ import annotations

import torch

from .._cuda import DTYPES, count, launch


def forward(
    x: torch.Tensor, alpha: torch.Tensor, shift: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    x, alpha, shift, weight, bias = x.contiguous(), *(t.float().contiguous() for t in (alpha, shift, weight, bias))
    y = torch.empty_like(x)
    if x.numel():
        D = x.shape[-1]
        launch("derf_forward", x, alpha, shift, weight, bias, y, x.numel() // D, D, DTYPES[x.dtype])
    return y


def backward(
    grad: torch.Tensor, x: torch.Tensor, alpha: torch.Tensor, shift: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    grad, x, weight = grad.contiguous(), x.contiguous(), weight.float().contiguous()
    D = x.shape[-1]
    dx = torch.empty_like(x)
    new = torch.empty if x.numel() else torch.zeros
    dalpha_dshift, dweight, dbias = (new(n, dtype=torch.float32, device=x.device) for n in (2, D, D))
    if x.numel():
        rows = x.numel() // D
        scratch = torch.empty(count("derf_scratch", rows, D), dtype=torch.float32, device=x.device)
        launch(
            "derf_backward", grad, x, alpha.float(), shift.float(), weight, dx, dalpha_dshift, dweight, dbias, scratch,
            rows, D, DTYPES[x.dtype],
        )  # fmt: skip
    return dx, dalpha_dshift, dweight, dbias
