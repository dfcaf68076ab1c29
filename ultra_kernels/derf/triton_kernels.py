"""Derf in Triton; the contract is in op.py, the kernels are shared with DyT."""

from __future__ import annotations

from .._pointwise_norm_triton import backward as backward
from .._pointwise_norm_triton import configurations as shared_configurations
from .._pointwise_norm_triton import forward as forward
from .._triton import Configuration


def configurations() -> list[Configuration]:
    """Every Triton specialisation that this op launches."""
    return list(shared_configurations(erf=True))
