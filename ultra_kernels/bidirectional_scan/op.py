"""Two selective scans over the same sequence, one per direction, joined in one pass."""

from __future__ import annotations

import torch

from .._dispatch import Op, define_differentiable
from ..selective_scan.op import (
    GRADIENTS,
    ORDER,
    TENSORS,
    WHY_NOT,
    Scan,
    check_scan,
    dense_like,
    fake_gradients,
    saved_states,
)
from ..selective_scan.op import OP as SELECTIVE_SCAN
from . import reference

OP = Op("bidirectional_scan", __package__, ORDER, WHY_NOT, kernels=SELECTIVE_SCAN.package)


def bidirectional_scan(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    delta_bias: torch.Tensor | None = None,
    delta_softplus: bool = False,
    *,
    shift: bool = True,
    cu_seqlens: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """out_t = (s_f(t−1) + s_b(t+1) + D u_t) · silu(z_t), s_f and s_b the two selective scans of u.

    u, z `[B,D,L]`; delta `[2,B,D,L]`, A `[2,D,N]`, B, C `[2,B,N,L]`, delta_bias `[2,D]`: index 0 reads
    forwards, index 1 backwards; D `[D]`. s = 0 outside its sequence, so D alone ties an output to the input
    at its own position. shift=False joins s_f(t) + s_b(t) instead. Each scan, Δ and cu_seqlens are those of
    `selective_scan`, without a gate. Returns out in u's shape and dtype. Raises ValueError,
    BackendUnavailable. The quasi-separable form of Hwang et al. 2024 (Hydra, arXiv:2407.09941).
    """
    check_scan("bidirectional_scan", u, delta, A, B, C, D, z, delta_bias, cu_seqlens, (2,))
    chosen = OP.choose(backend, u, delta, z, A.shape[-1])
    args = (u, delta, A, B, C, D, z, delta_bias, delta_softplus, shift, cu_seqlens)
    if chosen == "reference":
        return reference.bidirectional_scan(*args)
    out: torch.Tensor = _forward(*args, chosen)[0]
    return out


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    *tensors, ctx.delta_softplus, ctx.shift, cu_seqlens, ctx.backend = inputs
    ctx.save_for_backward(*tensors, cu_seqlens, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _gradients(ctx, grad, grad_saved):  # type: ignore[no-untyped-def]
    *tensors, cu_seqlens, saved = ctx.saved_tensors
    grads = _backward(grad, *tensors, ctx.delta_softplus, ctx.shift, cu_seqlens, saved, ctx.backend)
    return *(None if t is None else g for t, g in zip(tensors, grads, strict=True)), None, None, None, None


def _scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, shift, cu_seqlens) -> Scan:  # type: ignore[no-untyped-def]
    rows = (B.unsqueeze(2), C.unsqueeze(2))
    return Scan(u, delta, A, *rows, D, z, delta_bias, delta_softplus, False, shift, cu_seqlens)


def _run_backward(grad, *args):  # type: ignore[no-untyped-def]
    *inputs, saved, backend = args
    du, ddelta, dA, dB, dC, *rest = OP.module(backend).backward(_scan(*inputs), grad, None, saved)
    return du, ddelta, dA, dB[:, :, 0], dC[:, :, 0], *rest


_forward, _backward = define_differentiable(
    f"bidirectional_scan({TENSORS}, bool shift, Tensor? cu_seqlens, str backend) -> (Tensor, Tensor)",
    f"bidirectional_scan_backward(Tensor grad, {TENSORS}, bool shift, Tensor? cu_seqlens, Tensor saved, "
    f"str backend) -> {GRADIENTS}",
    forward=lambda *args: OP.module(args[-1]).forward(_scan(*args[:-1]), False)[::2],
    forward_fake=lambda u, delta, A, B, C, D, z, delta_bias, delta_softplus, shift, cu_seqlens, backend: (
        dense_like(u),
        saved_states(u, A, cu_seqlens),
    ),
    backward=_run_backward,
    backward_fake=lambda grad, *args: fake_gradients(*args[:8]),
    setup_context=_setup_context,
    gradients=_gradients,
)
