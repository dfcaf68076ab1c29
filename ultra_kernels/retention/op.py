"""Multi-scale retention: attention without softmax whose scores decay with distance."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, overload

import torch

from .. import _native
from .._dispatch import Op, autocast, define_differentiable, full_precision, of_all, triton_heads
from .._packed import check_cu_seqlens
from . import reference

Direction = Literal["forward", "backward", "bidirectional"]

MAX_HEAD_DIM = 256  # of the Triton kernels: a tile of queries is kept on the chip as a whole


_ORDER: dict[str, tuple[str, ...]] = {"cuda": ("triton", "reference"), "cpu": ("native", "reference")}
_WHY_NOT: dict[str, Callable[..., str | None]] = {
    "triton": triton_heads(MAX_HEAD_DIM),
    "native": of_all(_native.why_not),
}
OP = Op("retention", __package__, _ORDER, _WHY_NOT)
STEP = Op("retention_step", __package__, _ORDER, _WHY_NOT)


@overload
def retention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor,
    *,
    scale: float | torch.Tensor | None = None,
    direction: Direction = "bidirectional",
    cu_seqlens: torch.Tensor | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: Literal[False] = False,
    chunk_size: int | None = None,
    backend: str | None = None,
) -> torch.Tensor: ...


@overload
def retention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor,
    *,
    scale: float | torch.Tensor | None = None,
    direction: Direction = "bidirectional",
    cu_seqlens: torch.Tensor | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: Literal[True],
    chunk_size: int | None = None,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]: ...


def retention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor,
    *,
    scale: float | torch.Tensor | None = None,
    direction: Direction = "bidirectional",
    cu_seqlens: torch.Tensor | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    chunk_size: int | None = None,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """o_n = scale · Σ_m gamma_h^|n-m| (q_n·k_m) v_m over m <= n (forward), m >= n (backward) or all m (bidirectional).

    q, k `[B,T,H,K]`, v `[B,T,H,V]`; log_decay `[H]` = ln gamma <= 0, without gradient; scale None = K^-0.5, a number,
    or a tensor `[H]`. With cu_seqlens int32 `[num_seqs + 1]`, B is 1 and the sequences lie end to end along T.
    Forward only: initial_state `[num_seqs,H,K,V]` is S_0 in S_n = gamma S_{n-1} + k_n v_n^T, o_n = scale · q_n^T S_n,
    and output_final_state returns (o, S_T), float32 or wider. o has q's dtype. chunk_size asks for
    the chunkwise form with chunks of that length (of 128 at most in C++), None chooses by cost; the result differs in
    rounding alone.
    Raises ValueError, BackendUnavailable. After Sun et al. 2023 (arXiv:2307.08621).
    """
    if direction not in ("forward", "backward", "bidirectional"):
        raise ValueError(f"retention: direction {direction!r} is none of forward, backward, bidirectional")
    if q.dim() != 4 or k.shape != q.shape or v.dim() != 4 or v.shape[:3] != q.shape[:3]:
        raise ValueError(
            "retention: q and k must be [B, T, H, K] and v [B, T, H, V]; got "
            f"{tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    B, _, H, K = q.shape
    _check_heads(H, log_decay, scale)
    check_cu_seqlens("retention", q, cu_seqlens)
    if direction != "forward" and (initial_state is not None or output_final_state):
        raise ValueError(f"retention: a state needs direction='forward', got {direction!r}")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"retention: chunk_size is {chunk_size}; it must be at least 1")
    want = (B if cu_seqlens is None else cu_seqlens.numel() - 1, H, K, v.shape[-1])
    if initial_state is not None and initial_state.shape != want:
        raise ValueError(f"retention: initial_state has shape {tuple(initial_state.shape)}, must be {want}")
    q, k, v = autocast(q, k, v)
    chosen = OP.choose(backend, q, k, v)
    args = (
        q, k, v, log_decay, *_scales(K, scale), direction, cu_seqlens, initial_state, output_final_state, chunk_size
    )  # fmt: skip
    if chosen == "reference":
        with full_precision(q):
            o, state = reference.retention(*args)
    else:
        o, state = _forward(*args, chosen)
    return (o, state) if output_final_state else o


def retention_step(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor,
    state: torch.Tensor,
    *,
    scale: float | torch.Tensor | None = None,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token of forward retention: S' = gamma_h S + k v^T, o = scale · q^T S'; returns (o, S').

    q, k `[B,H,K]`, v `[B,H,V]`, log_decay `[H]` (no gradient), state `[B,H,K,V]`; scale as in `retention`. o has q's
    dtype, S' is float32 or wider. Raises ValueError, BackendUnavailable. After Sun et al. 2023 (arXiv:2307.08621).
    """
    if q.dim() != 3 or k.shape != q.shape or v.dim() != 3 or v.shape[:2] != q.shape[:2]:
        raise ValueError(
            "retention_step: q and k must be [B, H, K] and v [B, H, V]; got "
            f"{tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    _check_heads(q.shape[1], log_decay, scale)
    if state.shape != (*q.shape, v.shape[-1]):
        raise ValueError(f"retention_step: state has shape {tuple(state.shape)}, must be {(*q.shape, v.shape[-1])}")
    q, k, v = autocast(q, k, v)
    chosen = STEP.choose(backend, q, k, v)
    args = (q, k, v, log_decay, state, *_scales(q.shape[2], scale))
    if chosen == "reference":
        with full_precision(q):
            return reference.retention_step(*args)
    o, new_state = _step(*args, chosen)
    return o, new_state


def _scales(K: int, scale: float | torch.Tensor | None) -> tuple[float, torch.Tensor | None]:
    """The factor of all heads, and one of each head where there are such."""
    return (1.0, scale) if isinstance(scale, torch.Tensor) else (K**-0.5 if scale is None else scale, None)


def _check_heads(H: int, log_decay: torch.Tensor, scale: float | torch.Tensor | None) -> None:
    for name, x in (("log_decay", log_decay), ("scale", scale)):
        if isinstance(x, torch.Tensor) and x.shape != (H,):
            raise ValueError(f"retention: {name} has shape {tuple(x.shape)}, must be ({H},)")


def _fake(q, k, v, log_decay, scale, head_scale, direction, cu_seqlens, initial, output_final_state, chunk, backend):  # type: ignore[no-untyped-def]
    S = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    shape = (S, *q.shape[2:], v.shape[3]) if output_final_state else (0,)
    return q.new_empty(v.shape), q.new_empty(shape, dtype=torch.float32)


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    q, k, v, log_decay, ctx.scale, head_scale, ctx.direction, cu_seqlens, initial, _, ctx.chunk, ctx.backend = inputs
    ctx.save_for_backward(q, k, v, log_decay, head_scale, cu_seqlens, initial)
    ctx.set_materialize_grads(False)  # no zeros for a final state that nobody used


def _gradients(ctx, grad, grad_final):  # type: ignore[no-untyped-def]
    q, k, v, log_decay, head_scale, cu_seqlens, initial = ctx.saved_tensors
    args = (q, k, v, log_decay, ctx.scale, head_scale, ctx.direction, cu_seqlens, initial, ctx.chunk, ctx.backend)
    dq, dk, dv, dscale, dinitial = _backward(torch.zeros_like(v) if grad is None else grad, grad_final, *args)
    dscale = None if head_scale is None else dscale.to(head_scale.dtype)
    dinitial = None if initial is None else dinitial.to(initial.dtype)
    return dq, dk, dv, None, None, dscale, None, None, dinitial, None, None, None


def _backward_fake(grad, grad_final, q, k, v, log_decay, scale, head_scale, direction, cu_seqlens, initial, *options):  # type: ignore[no-untyped-def]
    return (
        *(x.new_empty(x.shape) for x in (q, k, v)),
        *(q.new_empty(0 if x is None else x.shape, dtype=torch.float32) for x in (head_scale, initial)),
    )


_INPUTS = (
    "Tensor q, Tensor k, Tensor v, Tensor log_decay, float scale, Tensor? head_scale, str direction, "
    "Tensor? cu_seqlens, Tensor? initial_state"
)

_forward, _backward = define_differentiable(
    f"retention({_INPUTS}, bool output_final_state, int? chunk, str backend) -> (Tensor, Tensor)",
    # dhead_scale [H] and dinitial_state in float32, empty where there is no such input
    f"retention_backward(Tensor grad, Tensor? grad_final, {_INPUTS}, int? chunk, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    forward=lambda *args: OP.module(args[-1]).forward(*args[:-1]),
    forward_fake=_fake,
    backward=lambda *args: OP.module(args[-1]).backward(*args[:-1]),
    backward_fake=_backward_fake,
    setup_context=_setup_context,
    gradients=_gradients,
)


def _step_setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    q, k, v, log_decay, state, ctx.scale, head_scale, _ = inputs
    ctx.save_for_backward(q, k, v, log_decay, head_scale, output[1])
    ctx.state_dtype = state.dtype


def _step_gradients(ctx, grad, grad_state):  # type: ignore[no-untyped-def]
    *tensors, new_state = ctx.saved_tensors
    dq, dk, dv, dstate, dscale = _step_backward(grad, grad_state, *tensors, new_state, ctx.scale)
    head_scale = tensors[-1]
    dscale = None if head_scale is None else dscale.to(head_scale.dtype)
    return dq, dk, dv, None, dstate.to(ctx.state_dtype), None, dscale, None


def _step_backward_impl(
    grad: torch.Tensor,
    grad_state: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor,
    head_scale: torch.Tensor | None,
    new_state: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, ...]:
    """dq, dk, dv, and in float32 dstate and dhead_scale (empty without head_scale)."""
    with full_precision(q):
        factor = scale if head_scale is None else head_scale.float()[:, None]
        wide, g = q.float(), grad.float()
        unscaled = (new_state @ g[..., None]).squeeze(-1)  # [B,H,K]
        dnew = grad_state + (factor * wide)[..., None] * g[..., None, :]
        return (
            (factor * unscaled).to(q.dtype),
            (dnew @ v.float()[..., None]).squeeze(-1).to(k.dtype),
            (k.float()[..., None, :] @ dnew).squeeze(-2).to(v.dtype),
            log_decay.float().exp()[:, None, None] * dnew,
            q.new_empty(0, dtype=torch.float32) if head_scale is None else (wide * unscaled).sum((0, 2)),
        )


_step, _step_backward = define_differentiable(
    "retention_step(Tensor q, Tensor k, Tensor v, Tensor log_decay, Tensor state, float scale, Tensor? head_scale, "
    "str backend) -> (Tensor, Tensor)",
    "retention_step_backward(Tensor grad, Tensor grad_state, Tensor q, Tensor k, Tensor v, Tensor log_decay, "
    "Tensor? head_scale, Tensor new_state, float scale) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    forward=lambda *args: STEP.module(args[-1]).step_forward(*args[:-1]),
    forward_fake=lambda q, k, v, log_decay, state, scale, head_scale, backend: (
        v.new_empty(v.shape),
        state.new_empty(state.shape, dtype=torch.float32),
    ),
    backward=_step_backward_impl,
    backward_fake=lambda grad, grad_state, q, k, v, log_decay, head_scale, new_state, scale: (
        *(x.new_empty(x.shape) for x in (q, k, v)),
        new_state.new_empty(new_state.shape),
        q.new_empty(0 if head_scale is None else head_scale.shape, dtype=torch.float32),
    ),
    setup_context=_step_setup_context,
    gradients=_step_gradients,
)
