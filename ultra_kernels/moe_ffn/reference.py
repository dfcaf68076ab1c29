"""Mixture-of-experts FFN in PyTorch; the contract is in op.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.nn import functional

from .._dispatch import define_differentiable
from ..bitlinear.op import grouped_bitlinear, segments
from ..bitlinear.reference import fake_quantize_tokens, fake_quantize_weight, rms_norm

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,  # the erf form
    "relu": functional.relu,
    "relu2": lambda x: functional.relu(x).square(),
}


ONCE = "no backend of moe_ffn can be differentiated twice"


class MoEStats(NamedTuple):
    """What the router did: counts int64 `[E]`, tokens per expert; mean_prob `[E]`, the mean softmax; z `[]`, the mean
    squared logsumexp. The last two are float32 and differentiable, for the balance and z losses."""

    counts: torch.Tensor
    mean_prob: torch.Tensor
    z: torch.Tensor


class _Take(torch.autograd.Function):
    """x[index], where every row of x is taken `copies` times and `back` lists, row by row, where its copies went.

    The gradient is a gather and a sum: index_select's own is an index_add_, serial on the CPU, atomic on CUDA.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, index: torch.Tensor, back: torch.Tensor, copies: int) -> torch.Tensor:
        ctx.save_for_backward(back)
        ctx.copies = copies
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        (back,) = ctx.saved_tensors
        wide = torch.promote_types(grad.dtype, torch.float32)
        gathered = grad.index_select(0, back)
        if ctx.copies > 1:
            gathered = gathered.unflatten(0, (-1, ctx.copies)).sum(1, dtype=wide).to(grad.dtype)
        return gathered, None, None, None


def _grouped_forward(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, ends: torch.Tensor
) -> torch.Tensor:
    y = x.new_empty(x.shape[0], weight.shape[1])
    for e, rows in segments(ends):
        if bias is None:
            torch.mm(x[rows], weight[e].t(), out=y[rows])
        else:
            torch.addmm(bias[e].to(x.dtype), x[rows], weight[e].t(), out=y[rows])
    return y


def _grouped_backward(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    dweight = torch.zeros_like(weight, memory_format=torch.contiguous_format)  # zeros stay where an expert had no row
    dbias = weight.new_zeros(weight.shape[:2], dtype=torch.promote_types(weight.dtype, torch.float32))
    for e, rows in segments(ends):
        torch.mm(grad[rows], weight[e], out=dx[rows])
        torch.mm(grad[rows].t(), x[rows], out=dweight[e])
        torch.sum(grad[rows], 0, dtype=dbias.dtype, out=dbias[e])
    return dx, dweight, dbias


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    x, weight, bias, ends = inputs
    ctx.save_for_backward(x, weight, ends)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _gradients(ctx, grad):  # type: ignore[no-untyped-def]
    dx, dweight, dbias = _grouped_linear_backward(grad, *ctx.saved_tensors)
    return dx, dweight, None if ctx.bias_dtype is None else dbias.to(ctx.bias_dtype), None


# y[r] = weight[e] x[r] + bias[e] for the rows r of expert e, ends[e−1] <= r < ends[e]. Opaque to torch.compile, because
# the lengths of the segments are data.
_grouped_linear, _grouped_linear_backward = define_differentiable(
    "moe_grouped_linear(Tensor x, Tensor weight, Tensor? bias, Tensor ends) -> Tensor",
    "moe_grouped_linear_backward(Tensor grad, Tensor x, Tensor weight, Tensor ends) -> (Tensor, Tensor, Tensor)",
    forward=_grouped_forward,
    forward_fake=lambda x, weight, bias, ends: x.new_empty(x.shape[0], weight.shape[1]),
    backward=_grouped_backward,
    backward_fake=lambda grad, x, weight, ends: (
        torch.empty_like(x, memory_format=torch.contiguous_format),
        torch.empty_like(weight, memory_format=torch.contiguous_format),
        weight.new_empty(weight.shape[:2], dtype=torch.promote_types(weight.dtype, torch.float32)),
    ),
    setup_context=_setup_context,
    gradients=_gradients,
    instead=ONCE,
)


def forward(
    x: torch.Tensor,
    routes: Routes,
    experts: Experts,
    bitnet_scale: str | None,
    dtype: torch.dtype,
    bitlinear_backend: str = "reference",
) -> torch.Tensor:
    """y of `moe_ffn`. `dtype` is that of the matrix products and of y; bitnet_scale None: experts in full precision."""
    top_k = routes.gates.shape[1]
    w_in, w_out, b_in, b_out, sub_norm, activation, gated = experts

    def expert_linear(
        rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, norm: torch.Tensor | None = None
    ) -> torch.Tensor:
        if bitnet_scale is not None and bitlinear_backend != "reference":
            return grouped_bitlinear(rows, weight, bias, norm, routes.ends, bitnet_scale, dtype, bitlinear_backend)
        rows = rows if norm is None else rms_norm(rows, norm)
        if bitnet_scale is not None:
            # One scale per expert: the weights are quantised matrix by matrix.
            weight = torch.stack([fake_quantize_weight(w, bitnet_scale, dtype) for w in weight.unbind(0)])
            rows = fake_quantize_tokens(rows, dtype)
        return _grouped_linear(rows.to(dtype), weight.to(dtype), bias, routes.ends)

    h = expert_linear(_Take.apply(x, routes.order // top_k, routes.inverse, top_k), w_in, b_in)
    h_wide = inner(h, activation, gated)
    out = _Take.apply(expert_linear(h_wide, w_out, b_out, sub_norm), routes.inverse, routes.order, 1)
    return (out.unflatten(0, routes.gates.shape) * routes.gates.unsqueeze(-1)).sum(1).to(dtype)


class Experts(NamedTuple):
    """w_in `[E,F,D]` (gated: `[E,2F,D]`), w_out `[E,D,F]`, biases `[E,·]`, sub_norm `[F]`, as in `moe_ffn`."""

    w_in: torch.Tensor
    w_out: torch.Tensor
    b_in: torch.Tensor | None
    b_out: torch.Tensor | None
    sub_norm: torch.Tensor | None
    activation: str
    gated: bool


class Routes(NamedTuple):
    """gates `[T, k]`; order `[T·k]`: the pairs token · k + choice, sorted by expert; inverse `[T·k]`: where each pair
    went; ends `[E]`: the end of each expert's rows in that order."""

    gates: torch.Tensor
    order: torch.Tensor
    inverse: torch.Tensor
    ends: torch.Tensor


def route(
    router_logits: torch.Tensor, top_k: int, normalize_gates: bool, select_bias: torch.Tensor | None
) -> tuple[Routes, MoEStats]:
    T, E = router_logits.shape
    wide = torch.promote_types(router_logits.dtype, torch.float32)
    logits = router_logits.to(wide)
    probs = logits.softmax(-1)
    # Without a bias the logits order the experts as the probabilities do, and do not saturate.
    scores = logits.detach() if select_bias is None else probs.detach() + select_bias.detach().to(wide)
    chosen = scores.sort(stable=True, descending=True).indices[:, :top_k]  # topk promises nothing of equal scores
    gates = logits.gather(1, chosen).softmax(-1) if normalize_gates else probs.gather(1, chosen)
    gates = gates.masked_fill(logits.isnan().any(-1, keepdim=True), torch.nan)

    experts, order = chosen.flatten().sort(stable=True)
    ends = torch.searchsorted(experts, torch.arange(E, device=experts.device), right=True)
    slots = torch.arange(T * top_k, device=order.device)
    inverse = torch.empty_like(order).scatter_(0, order, slots)

    tokens = max(T, 1)
    counts = torch.diff(ends, prepend=ends.new_zeros(1))
    z = logits.logsumexp(-1).square().sum() / tokens
    return Routes(gates, order, inverse, ends), MoEStats(counts, probs.sum(0) / tokens, z)


def inner(h: torch.Tensor, activation: str, gated: bool) -> torch.Tensor:
    """What stands between the two products of an expert, in promote_types(h.dtype, float32)."""
    act = ACTIVATIONS[activation]
    wide = h.to(torch.promote_types(h.dtype, torch.float32))
    if gated:
        gate, up = wide.chunk(2, dim=-1)
        wide = act(gate) * up
    else:
        wide = act(wide)
    return wide
