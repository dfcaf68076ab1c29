"""Rotary position encoding."""

from __future__ import annotations

import torch

from .. import _native
from .._dispatch import Op, define_differentiable, triton_heads
from . import reference

MAX_HEAD_DIM = 256  # of the Triton kernel


def _triton_why_not(x: torch.Tensor) -> str | None:
    return triton_heads(MAX_HEAD_DIM)(x, x, x)


OP = Op(
    "rotary",
    __package__,
    {"cuda": ("triton", "reference"), "cpu": ("native", "reference")},
    {"triton": _triton_why_not, "native": _native.why_not},
)


def rotary(
    x: torch.Tensor,
    positions: torch.Tensor,
    *,
    theta: float = 10000.0,
    inv_freq: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Turns the pair (x_2i, x_2i+1) at position p by the angle p·f_i, f_i = theta^(-2i/K), at least in float32.

    x `[B,T,H,K]`, K even; positions `[T]` or `[B,T]`, any integers; inv_freq `[K/2]` replaces f (no gradient).
    Returns x's shape and dtype. Only differences of positions reach the products of two turned vectors.
    Kernels read x in place, such as q in a projection of q, k and v, and write a contiguous result.
    Raises ValueError on an odd K or a shape mismatch, BackendUnavailable. After Su et al. 2021 (arXiv:2104.09864).
    """
    if x.dim() != 4 or x.shape[-1] % 2:
        raise ValueError(f"rotary: x must be [B, T, H, K] with an even K, got {tuple(x.shape)}")
    B, T, _, K = x.shape
    if positions.shape not in ((T,), (B, T)) or positions.is_floating_point():
        raise ValueError(
            f"rotary: positions must be integers [{T}] or [{B}, {T}], got {positions.dtype} {tuple(positions.shape)}"
        )
    if inv_freq is not None and inv_freq.shape != (K // 2,):
        raise ValueError(f"rotary: inv_freq has shape {tuple(inv_freq.shape)}, must be ({K // 2},)")
    chosen = OP.choose(backend, x)
    if chosen == "reference":
        return reference.rotary(x, positions, theta, inv_freq)
    frequency = None if inv_freq is None else inv_freq.detach()
    out: torch.Tensor = _forward(x, positions.to(x.device), theta, frequency, chosen)
    return out


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    _, positions, ctx.theta, inv_freq, ctx.backend = inputs
    ctx.save_for_backward(positions, inv_freq)


def _gradients(ctx, grad):  # type: ignore[no-untyped-def]
    positions, inv_freq = ctx.saved_tensors
    return _backward(grad, positions, ctx.theta, inv_freq, ctx.backend), None, None, None, None


_forward, _backward = define_differentiable(
    "rotary(Tensor x, Tensor positions, float theta, Tensor? inv_freq, str backend) -> Tensor",
    "rotary_backward(Tensor grad, Tensor positions, float theta, Tensor? inv_freq, str backend) -> Tensor",
    forward=lambda *args: OP.module(args[-1]).forward(*args[:-1]),
    forward_fake=lambda x, *args: x.new_empty(x.shape),
    backward=lambda *args: OP.module(args[-1]).backward(*args[:-1]),
    backward_fake=lambda grad, *args: grad.new_empty(grad.shape),
    setup_context=_setup_context,
    gradients=_gradients,
)
