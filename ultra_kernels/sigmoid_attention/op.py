"""Sigmoid attention: every weight is a sigmoid of its own logit, rows are not normalised."""

from __future__ import annotations

import torch

from .. import _native
from .._dispatch import Op, autocast, define_differentiable, full_precision, of_all, triton_heads
from .._packed import check_cu_seqlens
from . import reference

MAX_HEAD_DIM = 128  # of the Triton kernels


OP = Op(
    "sigmoid_attention",
    __package__,
    {"cuda": ("triton", "reference"), "cpu": ("native", "reference")},
    {"triton": triton_heads(MAX_HEAD_DIM), "native": of_all(_native.why_not)},
)


def sigmoid_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float | None = None,
    bias: float | torch.Tensor | None = None,
    normalize: bool = False,
    causal: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """o_m = Σ_n sigmoid(scale · q_m·k_n + b) v_n over all n, or n <= m when causal.

    q, k, v `[B,T,H,K]` (v may have another last dimension); scale None = K^-0.5; bias None: b = -ln n, n the length of
    the sequence (the whole length with causal too), else a number or a tensor `[H]`, which gets a gradient.
    normalize=True has b = 0 and divides every row by the sum of its weights + 1e-6. With cu_seqlens int32
    `[num_seqs + 1]`, B is 1 and the sequences lie end to end along T. The output has q's dtype.
    Raises ValueError, also on normalize with a bias, BackendUnavailable. After Ramapuram et al. 2024 (arXiv:2409.04431)
    """
    if q.dim() != 4 or k.shape != q.shape or v.dim() != 4 or v.shape[:3] != q.shape[:3]:
        raise ValueError(
            "sigmoid_attention: q, k and v must be [B, T, H, K]; got "
            f"{tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    if normalize and bias is not None:
        raise ValueError("sigmoid_attention: normalize=True uses no bias; leave one of the two out")
    if isinstance(bias, torch.Tensor) and bias.shape != (q.shape[2],):
        raise ValueError(f"sigmoid_attention: bias has shape {tuple(bias.shape)}, must be ({q.shape[2]},)")
    check_cu_seqlens("sigmoid_attention", q, cu_seqlens)
    q, k, v = autocast(q, k, v)
    chosen = OP.choose(backend, q, k, v)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    number, heads = (None, bias) if isinstance(bias, torch.Tensor) else (bias, None)
    args = (q, k, v, scale, number, heads, normalize, causal, cu_seqlens)
    if chosen == "reference":
        with full_precision(q):
            return reference.sigmoid_attention(*args)
    out: torch.Tensor = _forward(*args, chosen)[0]
    return out


def _fake(q, k, v, scale, bias, head_bias, normalize, causal, cu_seqlens, backend):  # type: ignore[no-untyped-def]
    B, T, H, _ = q.shape
    return q.new_empty(v.shape), q.new_empty((B, H, T) if normalize else (0,), dtype=torch.float32)


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    q, k, v, ctx.scale, ctx.bias, head_bias, ctx.normalize, ctx.causal, cu_seqlens, ctx.backend = inputs
    o, sums = output if ctx.normalize else (None, None)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(o, sums, q, k, v, head_bias, cu_seqlens)


def _gradients(ctx, grad, _):  # type: ignore[no-untyped-def]
    o, sums, q, k, v, head_bias, cu_seqlens = ctx.saved_tensors
    dq, dk, dv, dbias = _backward(
        grad, o, sums, q, k, v, ctx.scale, ctx.bias, head_bias, ctx.normalize, ctx.causal, cu_seqlens, ctx.backend
    )
    return dq, dk, dv, None, None, None if head_bias is None else dbias.to(head_bias.dtype), None, None, None, None


def _backward_fake(grad, o, sums, q, k, v, scale, bias, head_bias, *options):  # type: ignore[no-untyped-def]
    return (
        *(x.new_empty(x.shape) for x in (q, k, v)),
        q.new_empty(0 if head_bias is None else head_bias.shape, dtype=torch.float32),
    )


_INPUTS = (
    "Tensor q, Tensor k, Tensor v, float scale, float? bias, Tensor? head_bias, bool normalize, bool causal, "
    "Tensor? cu_seqlens, str backend"
)
_forward, _backward = define_differentiable(
    # o, and with normalize the sums of each row's weights [B,H,T] in float32, else an empty tensor
    f"sigmoid_attention({_INPUTS}) -> (Tensor, Tensor)",
    # dq, dk, dv, and dhead_bias [H] in float32, empty where there is none; o and sums with normalize alone
    f"sigmoid_attention_backward(Tensor grad, Tensor? o, Tensor? sums, {_INPUTS}) -> (Tensor, Tensor, Tensor, Tensor)",
    forward=lambda *args: OP.module(args[-1]).forward(*args[:-1]),
    forward_fake=_fake,
    backward=lambda *args: OP.module(args[-1]).backward(*args[:-1]),
    backward_fake=_backward_fake,
    setup_context=_setup_context,
    gradients=_gradients,
)
