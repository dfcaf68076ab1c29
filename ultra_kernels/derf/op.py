"""Dynamic erf, a pointwise replacement of layer normalisation."""

from __future__ import annotations

from typing import overload

import torch

from .. import _cuda, _native
from .._dispatch import Op, define_differentiable, triton_why_not
from .._norms import matching, new_outputs
from . import reference

OP = Op(
    "derf",
    __package__,
    # Triton before CUDA C++: neither was timed on a GPU, and Triton compiles for the GPU that it finds
    {"cuda": ("triton", "cuda", "reference"), "cpu": ("native", "reference")},
    {"triton": triton_why_not, "cuda": _cuda.why_not, "native": _native.why_not},
)


@overload
def derf(
    x: torch.Tensor, alpha: torch.Tensor, shift: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor,
    *, residual: None = None, backend: str | None = None,
) -> torch.Tensor: ...  # fmt: skip


@overload
def derf(
    x: torch.Tensor, alpha: torch.Tensor, shift: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor,
    *, residual: torch.Tensor, backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]: ...  # fmt: skip


def derf(
    x: torch.Tensor,
    alpha: torch.Tensor,
    shift: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    *,
    residual: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """y = weight · erf(alpha · x + shift) + bias, computed in float32; erf(u) = 2/√π ∫₀ᵘ exp(−t²) dt.

    x `[..., D]`; alpha and shift one element each; weight, bias `[D]`. With `residual` (the shape of x; cast to x's
    dtype) the sum s = x + residual, rounded to x's dtype, is normalised instead, and (y, s) is returned. The output
    has x's dtype.
    Raises ValueError on a shape mismatch, BackendUnavailable. After Chen et al. 2025 (arXiv:2512.10938).
    """
    D = x.shape[-1]
    for name, p in (("alpha", alpha), ("shift", shift)):
        if p.numel() != 1:
            raise ValueError(f"derf: {name} has shape {tuple(p.shape)}; it must have one element")
    for name, p in (("weight", weight), ("bias", bias)):
        if p.shape != (D,):
            raise ValueError(f"derf: {name} has shape {tuple(p.shape)}; for x {tuple(x.shape)} it is ({D},)")
    if residual is not None:
        residual = matching("derf", x, residual)
    chosen = OP.choose(backend, x)
    if chosen == "reference":
        s = x if residual is None else x + residual
        y = reference.derf(s, alpha, shift, weight, bias)
    else:
        y, s = _forward(x, residual, alpha, shift, weight, bias, chosen)
    return y if residual is None else (y, s)


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    x, residual, alpha, shift, weight, bias, ctx.backend = inputs
    ctx.save_for_backward(x if residual is None else output[1], alpha, shift, weight)
    ctx.summed, ctx.bias_dtype = residual is not None, bias.dtype
    ctx.set_materialize_grads(False)  # no zeros for a sum, or for a y, that nobody used


def _gradients(ctx, grad, grad_sum):  # type: ignore[no-untyped-def]
    if grad is None:
        return grad_sum, grad_sum, None, None, None, None, None
    x, alpha, shift, weight = ctx.saved_tensors
    inputs = x, alpha, shift, weight, ctx.backend
    dx, dalpha_dshift, dweight, dbias = _backward(grad, grad_sum if ctx.summed else None, *inputs)
    dalpha, dshift = (d.reshape(p.shape).to(p) for d, p in zip(dalpha_dshift, (alpha, shift), strict=True))
    parameters = dalpha, dshift, dweight.to(weight.dtype), dbias.to(ctx.bias_dtype)
    return dx, dx if ctx.summed else None, *parameters, None


_forward, _backward = define_differentiable(
    # y and the sum, which is empty without a residual
    "derf(Tensor x, Tensor? residual, Tensor alpha, Tensor shift, Tensor weight, Tensor bias, str backend)"
    " -> (Tensor, Tensor)",
    # x is what was normalised; dx, the residual's gradient too, [dalpha, dshift], dweight and dbias [D] in float32
    "derf_backward(Tensor grad, Tensor? grad_sum, Tensor x, Tensor alpha, Tensor shift, Tensor weight, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    forward=lambda *args: OP.module(args[-1]).forward(*args[:-1]),
    forward_fake=lambda x, residual, *args: new_outputs(x, residual),
    backward=lambda *args: OP.module(args[-1]).backward(*args[:-1]),
    backward_fake=lambda grad, grad_sum, x, *args: (
        x.new_empty(x.shape),
        x.new_empty(2, dtype=torch.float32),
        x.new_empty(x.shape[-1], dtype=torch.float32),
        x.new_empty(x.shape[-1], dtype=torch.float32),
    ),
    setup_context=_setup_context,
    gradients=_gradients,
)
