"""Layer normalisation."""

from __future__ import annotations

from typing import overload

import torch

from .. import _native
from .._dispatch import Op, define_differentiable, triton_why_not
from .._norms import matching, new_outputs
from . import reference

OP = Op(
    "layer_norm",
    __package__,
    # C++ over torch, which the reference calls, at 4096 × 768: in float32 0.85 to 1.3 times as fast forward, 1.05 to
    # 1.5 with the backward, in bfloat16 1.7 to 2.7; below some 100 rows a call of it costs up to 10 us more
    {"cuda": ("triton", "reference"), "cpu": ("native", "reference")},
    {"triton": triton_why_not, "native": _native.why_not},
)


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
    `residual` (the shape of x; cast to x's dtype) the sum s = x + residual, rounded to x's dtype, is normalised
    instead, and (y, s) is returned.
    Raises ValueError on a shape mismatch, BackendUnavailable. After Ba et al. 2016 (arXiv:1607.06450).
    """
    D = x.shape[-1]
    for name, p in (("weight", weight), ("bias", bias)):
        if p.shape != (D,):
            raise ValueError(
                f"layer_norm: {name} has shape {tuple(p.shape)}; x is {tuple(x.shape)}, so it must be ({D},)"
            )
    if residual is not None:
        residual = matching("layer_norm", x, residual)
    chosen = OP.choose(backend, x)
    if chosen == "reference":
        s = x if residual is None else x + residual
        y = reference.layer_norm(s, weight, bias, eps)
    else:
        y, s, _ = _forward(x, residual, weight, bias, eps, chosen)
    return y if residual is None else (y, s)


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    x, residual, weight, bias, _, ctx.backend = inputs
    _, s, stats = output
    ctx.mark_non_differentiable(stats)
    ctx.save_for_backward(x if residual is None else s, stats, weight)
    ctx.summed, ctx.bias_dtype = residual is not None, bias.dtype
    ctx.set_materialize_grads(False)  # no zeros for stats, nor for a sum or a y that nobody used


def _gradients(ctx, grad, grad_sum, _):  # type: ignore[no-untyped-def]
    if grad is None:
        return grad_sum, grad_sum, None, None, None, None
    x, stats, weight = ctx.saved_tensors
    dx, dweight, dbias = _backward(grad, grad_sum if ctx.summed else None, x, stats, weight, ctx.backend)
    return dx, dx if ctx.summed else None, dweight.to(weight.dtype), dbias.to(ctx.bias_dtype), None, None


_forward, _backward = define_differentiable(
    # y; the sum, which is empty without a residual; for the backward [..., 3] in float32: mean and 1 / sqrt(var + eps),
    # and what float32 leaves out of the mean, over the negative root
    "layer_norm(Tensor x, Tensor? residual, Tensor weight, Tensor bias, float eps, str backend)"
    " -> (Tensor, Tensor, Tensor)",
    # x is what was normalised; dx, the residual's gradient too, dweight and dbias [D] in float32
    "layer_norm_backward(Tensor grad, Tensor? grad_sum, Tensor x, Tensor stats, Tensor weight, str backend)"
    " -> (Tensor, Tensor, Tensor)",
    forward=lambda *args: OP.module(args[-1]).forward(*args[:-1]),
    forward_fake=lambda x, residual, *args: (
        *new_outputs(x, residual),
        x.new_empty((*x.shape[:-1], 3), dtype=torch.float32),
    ),
    backward=lambda *args: OP.module(args[-1]).backward(*args[:-1]),
    backward_fake=lambda grad, grad_sum, x, *args: (
        x.new_empty(x.shape),
        *(x.new_empty(x.shape[-1], dtype=torch.float32) for _ in range(2)),
    ),
    setup_context=_setup_context,
    gradients=_gradients,
)
