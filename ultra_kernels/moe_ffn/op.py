"""Mixture-of-experts feed-forward network without dropped tokens."""

from __future__ import annotations

from typing import Literal

import torch

from .. import _native
from .._dispatch import Op, define_differentiable, of_all, triton_why_not
from ..bitlinear.op import OP as BITLINEAR
from ..bitlinear.op import matmul_dtype
from . import reference
from .reference import Experts, MoEStats, Routes

MAX_EXPERTS = 256  # of the Triton kernels, whose router has a row of logits in registers


def _triton_why_not(x: torch.Tensor, w_in: torch.Tensor | None = None, *tensors: torch.Tensor | None) -> str | None:
    if (reason := of_all(triton_why_not)(x, w_in, *tensors)) is not None:
        return reason
    if w_in is not None and len(w_in) > MAX_EXPERTS:
        return f"there are {len(w_in)} experts, above {MAX_EXPERTS}; backend='reference' takes them"
    return None


OP = Op(
    "moe_ffn",
    __package__,
    {"cuda": ("triton", "reference"), "cpu": ("native", "reference")},
    {"triton": _triton_why_not, "native": of_all(_native.why_not)},
)


def moe_ffn(
    x: torch.Tensor,
    router_logits: torch.Tensor,
    w_in: torch.Tensor,
    w_out: torch.Tensor,
    *,
    top_k: int,
    activation: Literal["silu", "gelu", "relu", "relu2"] = "silu",
    gated: bool = False,
    b_in: torch.Tensor | None = None,
    b_out: torch.Tensor | None = None,
    normalize_gates: bool | None = None,
    select_bias: torch.Tensor | None = None,
    sub_norm: torch.Tensor | None = None,
    bitnet: bool = False,
    bitnet_scale: Literal["mean", "median"] = "mean",
    backend: str | None = None,
) -> tuple[torch.Tensor, MoEStats]:
    """y_t = Σ_e g_te (w_out_e h_te + b_out_e), h_te = norm(act(w_in_e x_t + b_in_e)), e over t's top_k experts.

    g = softmax(router_logits) in float32 at the chosen experts, divided by its sum over them when `normalize_gates`
    (None: when top_k > 1; with one expert the router would get no gradient). The largest top_k of softmax +
    select_bias are chosen, of equal ones the first; the bias (no gradient) plays no other part. Every token reaches all
    its experts. A NaN among a token's logits makes its y NaN.
    `gated`: w_in has 2F rows, 0..F−1 the gate, and h = act(gate) · up. gelu is the erf form, relu2 is relu squared.
    `sub_norm` `[F]`: RMSNorm (eps 1e-6) of h. `bitnet`: tokens and each expert's matrices are fake-quantised as in
    `bitlinear` with scale=bitnet_scale, on its backends. An expert without tokens gets zero gradients.

    x `[T, D]`, router_logits `[T, E]`, w_in `[E, F, D]` (gated: `[E, 2F, D]`), w_out `[E, D, F]`, b_in `[E, F]` or
    `[E, 2F]`, b_out `[E, D]`, select_bias `[E]`. Returns y `[T, D]` in x's dtype (under autocast in that dtype) and
    MoEStats(counts int64 `[E]`, mean_prob `[E]`, z `[]`), the last two with gradient.
    T may be 0, D and F not. Raises ValueError on a shape, type or device mismatch, an unknown activation or a top_k
    outside 1..E, BackendUnavailable.
    After Shazeer et al. 2017 (arXiv:1701.06538), dropless as Tan et al. 2024 (arXiv:2403.08245).
    """
    if not (x.is_floating_point() and router_logits.is_floating_point()):
        raise ValueError(f"moe_ffn: x is {x.dtype} and router_logits {router_logits.dtype}; they must be floats")
    if x.ndim != 2 or router_logits.ndim != 2 or router_logits.shape[0] != x.shape[0]:
        raise ValueError(
            f"moe_ffn: x is {tuple(x.shape)} and router_logits {tuple(router_logits.shape)}; "
            "they must be (T, D) and (T, E)"
        )
    (T, D), E = x.shape, router_logits.shape[1]
    if w_out.ndim != 3 or w_out.shape[:2] != (E, D):
        raise ValueError(
            f"moe_ffn: w_out has shape {tuple(w_out.shape)}; with x {(T, D)} and router_logits {(T, E)} it must be "
            f"({E}, {D}, F)"
        )
    F = w_out.shape[2]
    if not D or not F:
        raise ValueError(f"moe_ffn: w_out has shape {tuple(w_out.shape)}; D and F must be at least 1")
    rows = 2 * F if gated else F
    for name, p, shape in (
        ("router_logits", router_logits, (T, E)),
        ("w_out", w_out, (E, D, F)),
        ("w_in", w_in, (E, rows, D)),
        ("b_in", b_in, (E, rows)),
        ("b_out", b_out, (E, D)),
        ("select_bias", select_bias, (E,)),
        ("sub_norm", sub_norm, (F,)),
    ):
        if p is None:
            continue
        if p.shape != shape:
            given = f"router_logits {(T, E)}, w_out {tuple(w_out.shape)} and gated={gated}"
            raise ValueError(f"moe_ffn: {name} has shape {tuple(p.shape)}; with {given} it must be {shape}")
        if p.device != x.device:
            raise ValueError(f"moe_ffn: x is on {x.device}, {name} on {p.device}; they must be on one device")
    if not 1 <= top_k <= E:
        raise ValueError(f"moe_ffn: top_k={top_k} must be between 1 and the number of experts, {E}")
    if activation not in reference.ACTIVATIONS:
        raise ValueError(f"moe_ffn: activation {activation!r} is unknown; known are {', '.join(reference.ACTIVATIONS)}")
    if bitnet_scale not in ("mean", "median"):
        raise ValueError(f"moe_ffn: bitnet_scale {bitnet_scale!r} is unknown; it must be 'mean' or 'median'")
    if normalize_gates is None:
        normalize_gates = top_k > 1
    tensors, dtype = (x, w_in, w_out, router_logits, b_in, b_out, sub_norm), matmul_dtype(x)
    chosen = BITLINEAR.choose(backend, *tensors[:3]) if bitnet else OP.choose(backend, *tensors)
    routes, stats = route(router_logits, top_k, normalize_gates, select_bias, chosen)
    if bitnet or chosen == "reference":
        scale = bitnet_scale if bitnet else None
        experts = Experts(w_in, w_out, b_in, b_out, sub_norm, activation, gated)
        return reference.forward(x, routes, experts, scale, dtype, chosen), stats
    small = (t if t is None else t.float() for t in (b_in, b_out, sub_norm))
    y, _ = _experts(x.to(dtype), *routes, w_in.to(dtype), w_out.to(dtype), *small, activation, gated, chosen)
    return y, stats


def route(
    router_logits: torch.Tensor, top_k: int, normalize_gates: bool, select_bias: torch.Tensor | None, backend: str
) -> tuple[Routes, MoEStats]:
    """Which tokens go where. Neither way has the host wait for a GPU."""
    kernels = backend == "native" or (backend == "triton" and router_logits.shape[1] <= MAX_EXPERTS)
    if not kernels or router_logits.dtype == torch.float64:
        return reference.route(router_logits, top_k, normalize_gates, select_bias)
    options = top_k, normalize_gates, backend
    gates, _, order, inverse, ends, *of_router = _route(router_logits.float(), select_bias, *options)
    return Routes(gates, order, inverse, ends), MoEStats(*of_router)


def _forward_op(x, *arguments):  # type: ignore[no-untyped-def]
    routes, experts, backend = Routes(*arguments[:4]), Experts(*arguments[4:-1]), arguments[-1]
    hidden = _hidden_like(x, routes.order, experts.w_out, experts.gated)
    return OP.module(backend).forward(x, routes, experts, hidden), hidden


def _hidden_like(x: torch.Tensor, order: torch.Tensor, w_out: torch.Tensor, gated: bool) -> torch.Tensor:
    """What stands before the activations `[T·k, F or 2F]`, each F padded to a multiple of 32 (moe_row in C++)."""
    return x.new_empty(order.shape[0], (2 if gated else 1) * ((w_out.shape[-1] + 31) // 32 * 32))


def _forward_fake(x, gates, order, inverse, ends, w_in, w_out, *others):  # type: ignore[no-untyped-def]
    gated = others[-2]
    return x.new_empty(x.shape), _hidden_like(x, order, w_out, gated)


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    *tensors, activation, gated, backend = inputs
    hidden = output[1]
    ctx.mark_non_differentiable(hidden)
    ctx.options = activation, gated, backend
    ctx.save_for_backward(*tensors, hidden)


def _gradients(ctx, grad, _):  # type: ignore[no-untyped-def]
    needs = ctx.needs_input_grad
    wants = [needs[0], True, *needs[5:10]]  # the gates' gradient comes with the others
    found = _experts_backward(grad, *ctx.saved_tensors, wants, *ctx.options)
    dx, dgates, *others = (g if wanted else None for g, wanted in zip(found, wants, strict=True))
    return dx, dgates, None, None, None, *others, None, None, None


def _backward_op(grad, x, *arguments):  # type: ignore[no-untyped-def]
    *tensors, hidden, wants, activation, gated, backend = arguments
    routes, experts = Routes(*tensors[:4]), Experts._make((*tensors[4:], activation, gated))
    grads = _backward_fake(grad, x, *arguments)
    filled = [g if wanted else None for g, wanted in zip(grads, wants, strict=True)]
    OP.module(backend).backward(grad, x, routes, experts, hidden, filled)
    return grads


def _backward_fake(grad, x, gates, order, inverse, ends, *arguments):  # type: ignore[no-untyped-def]
    """Of x, gates, w_in, w_out, b_in, b_out and sub_norm; empty where not wanted."""
    *of_experts, _, wants, _, _, _ = arguments
    return tuple(
        gates.new_empty(0) if t is None or not wanted else t.new_empty(t.shape)
        for t, wanted in zip((x, gates, *of_experts), wants, strict=True)
    )


# The experts given the routes; x and the weights have one dtype, the others are float32.
_experts, _experts_backward = define_differentiable(
    # y, and for the backward what stands before the activations, in the order of the experts
    "moe_experts(Tensor x, Tensor gates, Tensor order, Tensor inverse, Tensor ends, Tensor w_in, Tensor w_out, "
    "Tensor? b_in, Tensor? b_out, Tensor? sub_norm, str activation, bool gated, str backend) -> (Tensor, Tensor)",
    # of x, gates, w_in, w_out, b_in, b_out and sub_norm
    "moe_experts_backward(Tensor grad, Tensor x, Tensor gates, Tensor order, Tensor inverse, Tensor ends, Tensor w_in, "
    "Tensor w_out, Tensor? b_in, Tensor? b_out, Tensor? sub_norm, Tensor hidden, bool[] wants, str activation, "
    "bool gated, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    forward=_forward_op,
    forward_fake=_forward_fake,
    backward=_backward_op,
    backward_fake=_backward_fake,
    setup_context=_setup_context,
    gradients=_gradients,
    instead=reference.ONCE,
)


def _route_op(logits, select_bias, top_k, normalize, backend):  # type: ignore[no-untyped-def]
    return OP.module(backend).route(logits, select_bias, top_k, normalize)


def _route_fake(logits, select_bias, top_k, normalize, backend):  # type: ignore[no-untyped-def]
    T, E = logits.shape
    return (
        logits.new_empty(T, top_k),
        logits.new_empty(T, top_k, dtype=torch.int32),
        *(logits.new_empty(n, dtype=torch.int64) for n in (T * top_k, T * top_k, E, E)),
        logits.new_empty(E),
        logits.new_empty(()),
    )


def _route_setup(ctx, inputs, output):  # type: ignore[no-untyped-def]
    logits, _, _, *ctx.options = inputs  # normalize, backend
    ctx.mark_non_differentiable(*output[1:6])
    ctx.save_for_backward(logits, output[1])


def _route_gradients(ctx, dgates, *grads):  # type: ignore[no-untyped-def]
    return _route_backward(dgates, *grads[-2:], *ctx.saved_tensors, *ctx.options), *[None] * 4


def _route_backward_op(dgates, dmean_prob, dz, logits, chosen, normalize, backend):  # type: ignore[no-untyped-def]
    return OP.module(backend).route_backward(dgates, dmean_prob, dz, logits, chosen, normalize)


# `reference.route` of float32 logits in the kernels of a backend.
_route, _route_backward = define_differentiable(
    # gates, chosen int32 [T, k], order, inverse, ends, counts, mean_prob, z
    "moe_route(Tensor logits, Tensor? select_bias, int top_k, bool normalize, str backend) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    "moe_route_backward(Tensor dgates, Tensor dmean_prob, Tensor dz, Tensor logits, Tensor chosen, bool normalize, "
    "str backend) -> Tensor",
    forward=_route_op,
    forward_fake=_route_fake,
    backward=_route_backward_op,
    backward_fake=lambda dgates, dmean_prob, dz, logits, *_: logits.new_empty(logits.shape),
    setup_context=_route_setup,
    gradients=_route_gradients,
    instead=reference.ONCE,
)
