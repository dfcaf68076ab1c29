"""DyT in Triton; the contract is in op.py, the kernels are shared with Derf."""

from __future__ import annotations

import torch

from .. import _pointwise_norm_triton as shared
from .._triton import Configuration


def forward(
    x: torch.Tensor, residual: torch.Tensor | None, alpha: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    return shared.forward(x, residual, alpha, None, weight, bias)


def backward(
    grad: torch.Tensor, grad_sum: torch.Tensor | None, x: torch.Tensor, alpha: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    return shared.backward(grad, grad_sum, x, alpha, None, weight)


def configurations() -> list[Configuration]:
    """Every Triton specialisation that this op launches."""
    return list(shared.configurations(erf=False))
