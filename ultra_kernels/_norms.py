"""What the norms share: the residual that they add before they normalise."""

from __future__ import annotations

import torch


def matching(op: str, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    """The residual in x's dtype. Raises ValueError where it has another shape than x."""
    if residual.shape != x.shape:
        raise ValueError(f"{op}: residual has shape {tuple(residual.shape)}, x has {tuple(x.shape)}")
    return residual.to(x.dtype)


def new_outputs(x: torch.Tensor, residual: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Memory for y and for the sum x + residual, which is empty without a residual."""
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    return y, x.new_empty(0) if residual is None else torch.empty_like(y)


def contiguous(x: torch.Tensor | None) -> torch.Tensor | None:
    """x with its rows end to end."""
    return None if x is None else x.contiguous()
