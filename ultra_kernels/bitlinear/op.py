"""BitLinear: ternary weights and 8-bit activations, trained through the rounding."""

from __future__ import annotations

from typing import Literal

import torch

from .._dispatch import Op
from . import reference

OP = Op("bitlinear", __package__, {"cuda": ("reference",), "cpu": ("reference",)}, {})


def bitlinear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    norm_weight: torch.Tensor | None = None,
    scale: Literal["mean", "median"] = "mean",
    backend: str | None = None,
) -> torch.Tensor:
    """y = x̂ Ŵᵀ + bias with x̂ and Ŵ quantised on the fly (quantisation-aware training).

    Ŵ = γ · clip(round(W / (γ + 1e-5)), −1, 1), γ the mean (or lower median) of |W| over the whole matrix;
    x̂ = s · round(x / s), s = max(absmax(x), 1e-5) / 127 per token. Rounding is half to even, scales are float32. The
    gradient passes the rounding straight through with the scales held constant: dx = dy Ŵ, dW = dyᵀ x̂.
    With `norm_weight` `[K]` x is first replaced by norm_weight · x / sqrt(mean(x²) + 1e-6), also differentiated.

    x `[..., K]`, weight `[N, K]`, bias `[N]`; returns `[..., N]` in x's dtype. Under autocast x and weight are
    quantised as they are, and product and result have the autocast dtype.
    Raises ValueError on a shape mismatch or an unknown scale, BackendUnavailable.
    After Ma et al. 2024 (arXiv:2402.17764).
    """
    K = x.shape[-1]
    if weight.ndim != 2 or weight.shape[1] != K:
        raise ValueError(
            f"bitlinear: weight has shape {tuple(weight.shape)}; x is {tuple(x.shape)}, so it must be (N, {K})"
        )
    for name, p, n in (("bias", bias, weight.shape[0]), ("norm_weight", norm_weight, K)):
        if p is not None and p.shape != (n,):
            raise ValueError(f"bitlinear: {name} has shape {tuple(p.shape)}; it must be ({n},)")
    if scale not in ("mean", "median"):
        raise ValueError(f"bitlinear: scale {scale!r} is unknown; it must be 'mean' or 'median'")
    OP.choose(backend, x)
    return reference.bitlinear(x, weight, bias, norm_weight, scale, matmul_dtype(x))


def matmul_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype of a product with x: the autocast dtype where autocast is on, as for torch's matmul, else x's own."""
    kind = x.device.type
    if kind == "meta" or x.dtype == torch.float64 or not torch.is_autocast_enabled(kind):
        return x.dtype
    return torch.get_autocast_dtype(kind)
