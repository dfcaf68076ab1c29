"""Derf in PyTorch; the contract is in op.py."""

from __future__ import annotations

import torch


def derf(
    x: torch.Tensor, alpha: torch.Tensor, shift: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    u = alpha.to(wide) * x.to(wide) + shift.to(wide)
    return (weight.to(wide) * torch.erf(u) + bias.to(wide)).to(x.dtype)
