"""Layer normalisation."""

from __future__ import annotations

from typing import overload

import torch

from .._dispatch import Op
from . import reference

OP = Op("layer_norm", __package__, {"cuda": ("reference",), "cpu": ("reference",)}, {})


@overload
def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float = 1e-5,
    *,
    residual: None = None,
    backend: str | None = None,
) -> torch.Tensor: ...


@overload
def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float = 1e-5,
    *,
    residual: torch.Tensor,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]: ...


def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float = 1e-5,
    *,
    residual: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """y = weight · (x − mean) / sqrt(var + eps) + bias over the last axis; var is the biased variance.

    x `[..., D]`; weight, bias `[D]`. Statistics in float32, also under autocast; the output has x's dtype. With
    `residual` (the shape of x) the sum s = x + residual is normalised instead, and (y, s) is returned.
    Raises ValueError on a shape mismatch, BackendUnavailable. After Ba et al. 2016 (arXiv:1607.06450).
    """
    D = x.shape[-1]
    for name, p in (("weight", weight), ("bias", bias)):
        if p.shape != (D,):
            raise ValueError(
                f"layer_norm: {name} has shape {tuple(p.shape)}; x is {tuple(x.shape)}, so it must be ({D},)"
            )
    if residual is not None:
        if residual.shape != x.shape:
            raise ValueError(f"layer_norm: residual has shape {tuple(residual.shape)}, x has {tuple(x.shape)}")
        x = x + residual
    OP.choose(backend, x)
    y = reference.layer_norm(x, weight, bias, eps)
    return y if residual is None else (y, x)
