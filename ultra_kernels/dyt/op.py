"""Dynamic tanh, a pointwise replacement of layer normalisation."""

from __future__ import annotations

from typing import overload

import torch

from .. import _cuda, _native
from .._dispatch import Op, define_differentiable, triton_why_not
from . import reference

OP = Op(
    "dyt",
    __package__,
    # Triton before CUDA C++: neither was timed on a GPU, and Triton compiles for the GPU that it finds
    {"cuda": ("triton", "cuda", "reference"), "cpu": ("native", "reference")},
    {"triton": triton_why_not, "cuda": _cuda.why_not, "native": _native.why_not},
)


@overload
def dyt(
    x: torch.Tensor, alpha: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor,
    *, residual: None = None, backend: str | None = None,
) -> torch.Tensor: ...  # fmt: skip


@overload
def dyt(
    x: torch.Tensor, alpha: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor,
    *, residual: torch.Tensor, backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]: ...  # fmt: skip


def dyt(
    x: torch.Tensor,
    alpha: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    *,
    residual: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """y = weight · tanh(alpha · x) + bias, computed in float32.

    x `[..., D]`; alpha one element; weight, bias `[D]`. With `residual` (the shape of x) the sum s = x + residual is
    normalised instead, and (y, s) is returned. The output has x's dtype.
    Raises ValueError on a shape mismatch, BackendUnavailable. After Zhu et al. 2025 (arXiv:2503.10622).
    """
    D = x.shape[-1]
    if alpha.numel() != 1:
        raise ValueError(f"dyt: alpha has shape {tuple(alpha.shape)}; it must have one element")
    for name, p in (("weight", weight), ("bias", bias)):
        if p.shape != (D,):
            raise ValueError(f"dyt: {name} has shape {tuple(p.shape)}; x is {tuple(x.shape)}, so it must be ({D},)")
    if residual is not None:
        if residual.shape != x.shape:
            raise ValueError(f"dyt: residual has shape {tuple(residual.shape)}, x has {tuple(x.shape)}")
        x = x + residual
    chosen = OP.choose(backend, x)
    y = reference.dyt(x, alpha, weight, bias) if chosen == "reference" else _forward(x, alpha, weight, bias, chosen)
    return y if residual is None else (y, x)


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    x, alpha, weight, bias, ctx.backend = inputs
    ctx.save_for_backward(x, alpha, weight)
    ctx.bias_dtype = bias.dtype


def _gradients(ctx, grad):  # type: ignore[no-untyped-def]
    x, alpha, weight = ctx.saved_tensors
    dx, dalpha, dweight, dbias = _backward(grad, x, alpha, weight, ctx.backend)
    return dx, dalpha.view_as(alpha).to(alpha.dtype), dweight.to(weight.dtype), dbias.to(ctx.bias_dtype), None


_forward, _backward = define_differentiable(
    "dyt(Tensor x, Tensor alpha, Tensor weight, Tensor bias, str backend) -> Tensor",
    # dalpha [1], dweight and dbias [D] in float32
    "dyt_backward(Tensor grad, Tensor x, Tensor alpha, Tensor weight, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    forward=lambda x, alpha, weight, bias, backend: OP.module(backend).forward(x, alpha, weight, bias),
    forward_fake=lambda x, alpha, weight, bias, backend: x.new_empty(x.shape),
    backward=lambda grad, x, alpha, weight, backend: OP.module(backend).backward(grad, x, alpha, weight),
    backward_fake=lambda grad, x, alpha, weight, backend: (
        x.new_empty(x.shape),
        x.new_empty(1, dtype=torch.float32),
        x.new_empty(x.shape[-1], dtype=torch.float32),
        x.new_empty(x.shape[-1], dtype=torch.float32),
    ),
    setup_context=_setup_context,
    gradients=_gradients,
)
