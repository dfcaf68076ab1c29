"""Dynamic tanh, a pointwise replacement of layer normalisation."""

from __future__ import annotations

from typing import overload

import torch

from .. import _cuda, _native
from .._dispatch import Op, define_differentiable, triton_why_not
from .._norms import matching, new_outputs
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

    x `[..., D]`; alpha one element; weight, bias `[D]`. With `residual` (the shape of x; cast to x's dtype) the sum
    s = x + residual, rounded to x's dtype, is normalised instead, and (y, s) is returned. The output has x's dtype.
    Raises ValueError on a shape mismatch, BackendUnavailable. After Zhu et al. 2025 (arXiv:2503.10622).
    """
    D = x.shape[-1]
    if alpha.numel() != 1:
        raise ValueError(f"dyt: alpha has shape {tuple(alpha.shape)}; it must have one element")
    for name, p in (("weight", weight), ("bias", bias)):
        if p.shape != (D,):
            raise ValueError(f"dyt: {name} has shape {tuple(p.shape)}; x is {tuple(x.shape)}, so it must be ({D},)")
    if residual is not None:
        residual = matching("dyt", x, residual)
    chosen = OP.choose(backend, x)
    if chosen == "reference":
        s = x if residual is None else x + residual
        y = reference.dyt(s, alpha, weight, bias)
    else:
        y, s = _forward(x, residual, alpha, weight, bias, chosen)
    return y if residual is None else (y, s)


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    x, residual, alpha, weight, bias, ctx.backend = inputs
    ctx.save_for_backward(x if residual is None else output[1], alpha, weight)
    ctx.summed, ctx.bias_dtype = residual is not None, bias.dtype
    ctx.set_materialize_grads(False)  # no zeros for a sum, or for a y, that nobody used


def _gradients(ctx, grad, grad_sum):  # type: ignore[no-untyped-def]
    if grad is None:
        return grad_sum, grad_sum, None, None, None, None
    x, alpha, weight = ctx.saved_tensors
    dx, dalpha, dweight, dbias = _backward(grad, grad_sum if ctx.summed else None, x, alpha, weight, ctx.backend)
    parameters = dalpha.view_as(alpha).to(alpha.dtype), dweight.to(weight.dtype), dbias.to(ctx.bias_dtype)
    return dx, dx if ctx.summed else None, *parameters, None


_forward, _backward = define_differentiable(
    # y and the sum, which is empty without a residual
    "dyt(Tensor x, Tensor? residual, Tensor alpha, Tensor weight, Tensor bias, str backend) -> (Tensor, Tensor)",
    # x is what was normalised; dx, the residual's gradient too, dalpha [1], dweight and dbias [D] in float32
    "dyt_backward(Tensor grad, Tensor? grad_sum, Tensor x, Tensor alpha, Tensor weight, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    forward=lambda *args: OP.module(args[-1]).forward(*args[:-1]),
    forward_fake=lambda x, residual, *args: new_outputs(x, residual),
    backward=lambda *args: OP.module(args[-1]).backward(*args[:-1]),
    backward_fake=lambda grad, grad_sum, x, *args: (
        x.new_empty(x.shape),
        x.new_empty(1, dtype=torch.float32),
        x.new_empty(x.shape[-1], dtype=torch.float32),
        x.new_empty(x.shape[-1], dtype=torch.float32),
    ),
    setup_context=_setup_context,
    gradients=_gradients,
)
