"""DyT in PyTorch; the contract is in op.py."""

from __future__ import annotations

import torch


def dyt(x: torch.Tensor, alpha: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    return (weight.to(wide) * torch.tanh(alpha.to(wide) * x.to(wide)) + bias.to(wide)).to(x.dtype)
