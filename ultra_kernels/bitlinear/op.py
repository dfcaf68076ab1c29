"""BitLinear: ternary weights and 8-bit activations, trained through the rounding."""

from __future__ import annotations

import functools
import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch

from .. import _native
from .._dispatch import Op, define_differentiable, triton_why_not
from . import reference


def _one_device(why_not: Callable[[torch.Tensor], str | None]) -> Callable[..., str | None]:
    """The reasons of `why_not`, and tensors of other dtypes than kernels read, on another device, or empty."""

    def limits(x: torch.Tensor, *tensors: torch.Tensor | None) -> str | None:
        if (reason := why_not(x)) is not None:
            return reason
        for t in tensors:
            if t is None:
                continue
            if t.device != x.device:
                return f"x is on {x.device}, another tensor on {t.device}; move it there"
            if (reason := why_not(t)) is not None:
                return reason
            if not t.numel():
                return "the weight is empty"
        return None

    return limits


OP = Op(
    "bitlinear",
    __package__,
    {"cuda": ("triton", "reference"), "cpu": ("native", "reference")},
    {"triton": _one_device(triton_why_not), "native": _one_device(_native.why_not)},
)
# A backend's file has quantize_weight(weight, scale), forward(x, weight, gamma, N, bias, norm_weight, ends, dtype) and
# backward(...), which take what quantize_weight has made. With `ends` weight, gamma and bias are those of all groups.


def bitlinear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    norm_weight: torch.Tensor | None = None,
    scale: Literal["mean", "median"] = "mean",
    backend: str | None = None,
) -> torch.Tensor:
    """y = x̂ Ŵᵀ + bias with x̂ and Ŵ quantised on the fly (quantisation-aware training).

    Ŵ = γ · clip(round(W / (γ + 1e-5)), −1, 1), γ the mean (or lower median) of |W| over the whole matrix;
    x̂ = s · round(x / s), s = max(absmax(x), 1e-5) / 127 per token. Rounding is half to even, scales are float32. The
    gradient passes the rounding straight through with the scales held constant: dx = dy Ŵ, dW = dyᵀ x̂.
    With `norm_weight` `[K]` x is first replaced by norm_weight · x / sqrt(mean(x²) + 1e-6), also differentiated.

    x `[..., K]`, weight `[N, K]`, bias `[N]`; returns `[..., N]` in x's dtype. Under autocast x and weight are
    quantised as they are, and product and result have the autocast dtype. The quantised weight is kept from a forward
    to its backward: on a GPU a write through `weight.data` in between goes unnoticed.
    Raises ValueError on a shape mismatch or an unknown scale, BackendUnavailable.
    After Ma et al. 2024 (arXiv:2402.17764).
    """
    K = x.shape[-1]
    if weight.ndim != 2 or weight.shape[1] != K:
        raise ValueError(
            f"bitlinear: weight has shape {tuple(weight.shape)}; x is {tuple(x.shape)}, so it must be (N, {K})"
        )
    for name, p, n in (("bias", bias, weight.shape[0]), ("norm_weight", norm_weight, K)):
        if p is not None and p.shape != (n,):
            raise ValueError(f"bitlinear: {name} has shape {tuple(p.shape)}; it must be ({n},)")
    if scale not in ("mean", "median"):
        raise ValueError(f"bitlinear: scale {scale!r} is unknown; it must be 'mean' or 'median'")
    chosen = OP.choose(backend, x, weight, bias, norm_weight)
    dtype = matmul_dtype(x)
    if chosen == "reference":
        return reference.bitlinear(x, weight, bias, norm_weight, scale, dtype)
    return _bitlinear(x, weight, bias, norm_weight, None, scale, dtype, chosen)


def grouped_bitlinear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    ends: torch.Tensor,
    scale: str,
    dtype: torch.dtype,
    backend: str,
) -> torch.Tensor:
    """`bitlinear` with weight[e] and bias[e] for the rows ends[e−1] <= r < ends[e] of x, each with a scale of its own.

    x `[S, K]`, weight `[E, N, K]`, bias `[E, N]`, norm_weight `[K]` of all, ends int64 `[E]`; returns `[S, N]` in
    `dtype`. backend: one of `bitlinear` but the reference. For `moe_ffn`, which has checked all of it.
    """
    return _bitlinear(x, weight, bias, norm_weight, ends, scale, dtype, backend)


def _bitlinear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    ends: torch.Tensor | None,
    scale: str,
    dtype: torch.dtype,
    backend: str,
) -> torch.Tensor:
    trains = torch.is_grad_enabled() and weight.requires_grad
    y: torch.Tensor = _forward(x, weight, bias, norm_weight, ends, scale, dtype, trains, backend)[0]
    return y


def matmul_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype of a product with x: the autocast dtype where autocast is on, as for torch's matmul, else x's own."""
    kind = x.device.type
    if kind == "meta" or x.dtype == torch.float64 or not torch.is_autocast_enabled(kind):
        return x.dtype
    return torch.get_autocast_dtype(kind)


@dataclass
class _Quantised:
    """What became of a weight."""

    state: tuple[int, int]  # of the weight when it was quantised
    owner: weakref.ref[torch.Tensor]  # with which this entry goes
    weight: torch.Tensor  # as the backend's products take it
    gamma: torch.Tensor
    used_up: bool = False  # by a backward


# By the elements that a weight is of: what a backward is given may be another tensor of the same.
_quantised: dict[tuple[Any, ...], _Quantised] = {}


def _forget(key: tuple[Any, ...], owner: weakref.ref[torch.Tensor]) -> None:
    if (entry := _quantised.get(key)) is not None and entry.owner is owner:
        del _quantised[key]


def _quantise(
    weight: torch.Tensor, scale: str, backend: str, trains: bool, backward: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """`quantize_weight` of the backend's file, kept from the first forward of a weight to its last backward.

    A weight counts the writes to it, but neither those of torch's fused optimizers nor those through `.data`. So a
    forward after a backward, where optimizers come between, quantises again; one within a backward recomputes. What no
    backward ends is kept only where the backend's file has a `fingerprint` of the values. The graph of a capture
    quantises for itself: it is replayed when the weight has other values.
    """
    module = OP.module(backend)
    fingerprint = getattr(module, "fingerprint", None)
    capturing = weight.is_cuda and torch.cuda.is_current_stream_capturing()
    if capturing or weight.is_inference() or not (trains or fingerprint):
        found: tuple[torch.Tensor, torch.Tensor] = module.quantize_weight(weight, scale)
        return found
    key = (weight.data_ptr(), weight.shape, weight.stride(), weight.dtype, scale, backend)
    state = weight._version, fingerprint(weight) if fingerprint else 0
    entry = _quantised.get(key)
    backward |= torch._C._current_graph_task_id() != -1
    if entry is None or entry.state != state or (entry.used_up and not backward):
        whole = weight if weight._base is None else weight._base
        owner = weakref.ref(whole, functools.partial(_forget, key))
        entry = _quantised[key] = _Quantised(state, owner, *module.quantize_weight(weight, scale))
    entry.used_up |= backward
    return entry.weight, entry.gamma


def groups(ends: torch.Tensor) -> list[tuple[int, slice]]:
    """Every group with its rows: ends[e−1] <= r < ends[e]. Waits for a GPU."""
    stops = ends.tolist()
    return [(e, slice(a, b)) for e, (a, b) in enumerate(zip([0, *stops[:-1]], stops, strict=True))]


def segments(ends: torch.Tensor) -> list[tuple[int, slice]]:
    """Those of `groups` that have rows."""
    return [(e, rows) for e, rows in groups(ends) if rows.stop > rows.start]


def _forward_op(x, weight, bias, norm_weight, ends, scale, dtype, trains, backend):  # type: ignore[no-untyped-def]
    N, K = weight.shape[-2:]
    quantised = _quantise(weight, scale, backend, trains)
    y, *kept = OP.module(backend).forward(x.reshape(-1, K), *quantised, N, bias, norm_weight, ends, dtype)
    return y.view(*x.shape[:-1], N), *kept


def _forward_fake(x, weight, bias, norm_weight, ends, scale, dtype, trains, backend):  # type: ignore[no-untyped-def]
    (N, K), M = weight.shape[-2:], math.prod(x.shape[:-1])  # Size.numel() would make a dynamic size a constant
    return (
        x.new_empty(*x.shape[:-1], N, dtype=dtype),
        x.new_empty(M, K, dtype=torch.int8),
        x.new_empty(M, dtype=torch.float32),
        x.new_empty(0 if norm_weight is None else M, dtype=torch.float32),
    )


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    x, weight, _, norm_weight, ends, ctx.scale, _, ctx.trains, ctx.backend = inputs
    _, codes, step, rstd = output
    ctx.mark_non_differentiable(codes, step, rstd)
    wants_x, wants_weight, _, wants_norm, *_ = ctx.needs_input_grad
    norm = norm_weight is not None and (wants_x or wants_norm)
    ctx.x_dtype = x.dtype
    ctx.save_for_backward(
        *((codes, step) if wants_weight else (None, None)),
        *((rstd, x, norm_weight) if norm else (None, None, None)),
        weight,
        ends,
    )


def _gradients(ctx, grad, *_):  # type: ignore[no-untyped-def]
    codes, step, rstd, x, norm_weight, weight, ends = ctx.saved_tensors
    wants = list(ctx.needs_input_grad[:4])
    options = ctx.scale, ctx.x_dtype, wants, ctx.trains, ctx.backend
    found = _backward(grad, codes, step, rstd, x, norm_weight, weight, ends, *options)
    dx, dweight, dbias, dnorm_weight = (g if wanted else None for g, wanted in zip(found, wants, strict=True))
    # autograd casts dbias to the dtype of the bias
    return dx, dweight, dbias, dnorm_weight, *[None] * 5


def _backward_op(  # type: ignore[no-untyped-def]
    grad, codes, step, rstd, x, norm_weight, weight, ends, scale, x_dtype, wants, trains, backend
):
    N, K = weight.shape[-2:]
    none, no_codes = grad.new_empty(0, dtype=torch.float32), grad.new_empty(0, dtype=torch.int8)
    found = OP.module(backend).backward(
        grad.reshape(-1, N).contiguous(),
        no_codes if codes is None else codes,
        *(none if t is None else t for t in (step, rstd)),
        None if x is None else x.reshape(-1, K),
        *_quantise(weight, scale, backend, trains, backward=True),
        weight.shape,
        norm_weight,
        ends,
        wants,
    )
    dtypes = x_dtype, weight.dtype, torch.float32, torch.float32 if norm_weight is None else norm_weight.dtype
    # outputs of an op may not be one tensor
    dx, *others = (g.to(d) if w else g.new_empty(0, dtype=d) for g, w, d in zip(found, wants, dtypes, strict=True))
    return dx.view(*grad.shape[:-1], K) if wants[0] else dx, *others


def _backward_fake(  # type: ignore[no-untyped-def]
    grad, codes, step, rstd, x, norm_weight, weight, ends, scale, x_dtype, wants, *options
):
    K = weight.shape[-1]
    return (
        grad.new_empty((*grad.shape[:-1], K) if wants[0] else 0, dtype=x_dtype),
        weight.new_empty(weight.shape if wants[1] else 0),
        grad.new_empty(weight.shape[:-1] if wants[2] else 0, dtype=torch.float32),
        weight.new_empty(K if wants[3] else 0, dtype=torch.float32 if norm_weight is None else norm_weight.dtype),
    )


_forward, _backward = define_differentiable(
    # y, and for the backward: the codes of x as int8 [M,K], their step [M], with a norm its factor [M], else empty
    "bitlinear(Tensor x, Tensor weight, Tensor? bias, Tensor? norm_weight, Tensor? ends, str scale, ScalarType dtype, "
    "bool trains, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    # dx, dweight, dbias in float32, dnorm_weight; empty where not wanted. Codes and step for dweight alone; rstd, x and
    # norm_weight with a norm alone
    "bitlinear_backward(Tensor grad, Tensor? codes, Tensor? step, Tensor? rstd, Tensor? x, Tensor? norm_weight, "
    "Tensor weight, Tensor? ends, str scale, ScalarType x_dtype, bool[] wants, bool trains, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    forward=_forward_op,
    forward_fake=_forward_fake,
    backward=_backward_op,
    backward_fake=_backward_fake,
    setup_context=_setup_context,
    gradients=_gradients,
)
