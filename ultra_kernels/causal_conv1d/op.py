"""Short depthwise convolution over time, as Mamba puts before its scan."""

from __future__ import annotations

import torch

from .. import _cuda, _native
from .._dispatch import Op, define_differentiable, triton_why_not
from ..selective_scan.op import check_cu_seqlens, dense_like
from . import reference

OP = Op(
    "causal_conv1d",
    __package__,
    {"cuda": ("cuda", "triton", "reference"), "cpu": ("native", "reference")},
    {"cuda": _cuda.why_not, "triton": triton_why_not, "native": _native.why_not},
)


def causal_conv1d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    activation: str | None = None,
    direction: str = "forward",
    cu_seqlens: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """y_t = act(bias + Σ_j w_j x_{t+o(j)}) per channel, in float32, x = 0 outside its sequence.

    x `[B,D,L]`; weight `[D,W]`, W 2..8; bias `[D]`; activation None or "silu". direction "forward":
    o(j) = j − (W−1), causal; "backward": o(j) = (W−1) − j, its mirror image; "centred": o(j) = j − (W−1)//2.
    cu_seqlens int32 `[num_seqs + 1]` (B = 1): no tap crosses a border. Returns y in x's shape and dtype.
    Call-compatible by keyword with causal_conv1d_fn of Dao-AILab/causal-conv1d. Raises ValueError,
    BackendUnavailable. After Gu & Dao 2023 (arXiv:2312.00752).
    """
    if x.dim() != 3:
        raise ValueError(f"causal_conv1d: x has shape {tuple(x.shape)}; it must be [B,D,L]")
    channels = x.shape[1]
    if weight.dim() != 2 or weight.shape[0] != channels or not 2 <= weight.shape[1] <= 8:
        raise ValueError(
            f"causal_conv1d: weight has shape {tuple(weight.shape)}; x is {tuple(x.shape)}, so it must be "
            f"({channels}, W) with W from 2 to 8"
        )
    if bias is not None and bias.shape != (channels,):
        raise ValueError(f"causal_conv1d: bias has shape {tuple(bias.shape)}; it must be ({channels},)")
    if activation not in (None, "silu"):
        raise ValueError(f"causal_conv1d: activation is {activation!r}; it must be None or 'silu'")
    if direction not in ("forward", "backward", "centred"):
        raise ValueError(f"causal_conv1d: direction is {direction!r}; it must be 'forward', 'backward' or 'centred'")
    for name, p in (("weight", weight), ("bias", bias)):
        if p is not None and p.device != x.device:
            raise ValueError(f"causal_conv1d: {name} is on {p.device}, x on {x.device}; move it there")
    check_cu_seqlens("causal_conv1d", "x", x, cu_seqlens)
    chosen = OP.choose(backend, x)
    args = (x, weight, bias, activation, direction, cu_seqlens)
    if chosen == "reference":
        return reference.causal_conv1d(*args)
    y: torch.Tensor = _forward(*args, chosen)
    return y


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    x, weight, bias, ctx.activation, ctx.direction, cu_seqlens, ctx.backend = inputs
    ctx.save_for_backward(x, weight, bias, cu_seqlens)


def _gradients(ctx, grad):  # type: ignore[no-untyped-def]
    x, weight, bias, cu_seqlens = ctx.saved_tensors
    dx, dweight, dbias = _backward(grad, x, weight, bias, ctx.activation, ctx.direction, cu_seqlens, ctx.backend)
    return dx, dweight, None if bias is None else dbias, None, None, None, None


_OPTIONS = "Tensor x, Tensor weight, Tensor? bias, str? activation, str direction, Tensor? cu_seqlens, str backend"

_forward, _backward = define_differentiable(
    f"causal_conv1d({_OPTIONS}) -> Tensor",
    # dbias is empty where bias is None
    f"causal_conv1d_backward(Tensor grad, {_OPTIONS}) -> (Tensor, Tensor, Tensor)",
    forward=lambda *args: OP.module(args[-1]).forward(*args[:-1]),
    forward_fake=lambda x, *args: dense_like(x),
    backward=lambda *args: OP.module(args[-1]).backward(*args[:-1]),
    backward_fake=lambda grad, x, weight, bias, *args: (
        dense_like(x),
        weight.new_empty(weight.shape),
        x.new_empty(0) if bias is None else bias.new_empty(bias.shape),
    ),
    setup_context=_setup_context,
    gradients=_gradients,
)
