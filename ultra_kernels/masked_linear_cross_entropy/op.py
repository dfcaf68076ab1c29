"""The masked-language-model loss: a linear map and its cross-entropy, at labelled rows alone."""

from __future__ import annotations

from typing import Literal

import torch

from .. import _native
from .._dispatch import Op, define_differentiable, of_all, triton_why_not
from ..bitlinear.op import matmul_dtype
from .reference import waiting_dtype

OP = Op(
    "masked_linear_cross_entropy",
    __package__,
    {"cuda": ("triton", "reference"), "cpu": ("native", "reference")},
    {"native": of_all(_native.why_not), "triton": of_all(triton_why_not)},
)


def masked_linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    ignore_index: int = -100,
    z_loss: float = 0.0,
    reduction: Literal["mean", "sum"] = "mean",
    backend: str | None = None,
) -> torch.Tensor:
    """loss = Σ_i logsumexp(l_i) − l_i[labels_i] + z_loss · logsumexp(l_i)², l_i = weight · hidden_i + bias.

    The sum runs over the M rows whose label is not `ignore_index`; only they are multiplied. "mean" divides by M.
    Without a labelled row the loss is 0 and so are its gradients. The gradients are computed with the loss, block by
    block of rows: memory holds the gradients and one block of logits.

    hidden `[..., D]`, weight `[V, D]`, labels int64 `[...]`, bias `[V]`; returns a float32 scalar. Raises ValueError on
    a shape mismatch, an unknown reduction, or (on the CPU; CUDA asserts on the device) a label outside 0..V−1;
    BackendUnavailable.
    Blockwise after Hsu et al. 2024 (arXiv:2410.10989); z-loss after Chowdhery et al. 2022 (arXiv:2204.02311).
    """
    D, V = hidden.shape[-1], weight.shape[0]
    if weight.ndim != 2 or weight.shape[1] != D:
        raise ValueError(
            f"masked_linear_cross_entropy: weight has shape {tuple(weight.shape)}; hidden is {tuple(hidden.shape)}, "
            f"so it must be (V, {D})"
        )
    if labels.shape != hidden.shape[:-1] or labels.dtype != torch.int64:
        raise ValueError(
            f"masked_linear_cross_entropy: labels are {labels.dtype} {tuple(labels.shape)}; hidden is "
            f"{tuple(hidden.shape)}, so they must be int64 {tuple(hidden.shape[:-1])}"
        )
    if bias is not None and bias.shape != (V,):
        raise ValueError(f"masked_linear_cross_entropy: bias has shape {tuple(bias.shape)}; it must be ({V},)")
    if reduction not in ("mean", "sum"):
        raise ValueError(f"masked_linear_cross_entropy: reduction {reduction!r} is unknown; it must be 'mean' or 'sum'")
    chosen = OP.choose(backend, hidden, weight, bias)
    grads = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (hidden, weight, bias))
    outputs = _forward(
        hidden.reshape(-1, D),
        weight,
        labels.reshape(-1),
        bias,
        ignore_index,
        z_loss,
        reduction == "mean",
        grads,
        matmul_dtype(hidden),
        chosen,
    )
    return outputs[0]


def _forward_op(hidden, weight, labels, bias, ignore_index, z_loss, mean, grads, dtype, backend):  # type: ignore[no-untyped-def]
    if labels.device.type == "cpu":
        wrong = (labels != ignore_index) & ((labels < 0) | (labels >= len(weight)))
        if bool(wrong.any()):
            raise ValueError(
                f"masked_linear_cross_entropy: label {int(labels[wrong][0])} is outside 0..{len(weight) - 1} and is "
                f"not ignore_index ({ignore_index})"
            )
    return OP.module(backend).masked_linear_cross_entropy(
        hidden, weight, labels, bias, ignore_index, z_loss, mean, grads, dtype
    )


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    hidden, weight, _, bias, *_ = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # otherwise zeros the size of every gradient
    ctx.save_for_backward(hidden, *output[1:])
    ctx.dtypes = hidden.dtype, weight.dtype, None if bias is None else bias.dtype


def _gradients(ctx, grad, *unused):  # type: ignore[no-untyped-def]
    if grad is None:
        return (None,) * 10
    scaled = (_scale_in_place if _may_overwrite(grad) else _scale)(grad, *ctx.saved_tensors)
    dhidden, dweight, dbias = (
        None if dtype is None else g.to(dtype) for g, dtype in zip(scaled, ctx.dtypes, strict=True)
    )
    return dhidden, dweight, None, dbias, None, None, None, None, None, None


def _may_overwrite(grad: torch.Tensor) -> bool:
    """Whether this is an eager backward after which the graph goes: what it saved is then nobody's any more.

    A copy of the weight's gradient would be the largest tensor of the whole loss.
    """
    traced = torch.compiler.is_compiling() or type(grad) is not torch.Tensor or torch._C._len_torch_dispatch_stack()
    return not (traced or torch.is_grad_enabled() or torch._C._autograd._get_current_graph_task_keep_graph())


def _scale_in_place(grad, hidden, *sums_and_scale):  # type: ignore[no-untyped-def]
    *sums, scale = sums_and_scale
    factor = grad * scale
    if factor.device.type != "cpu" or factor != 1:  # a GPU would have to be waited for
        for s in sums:
            s.mul_(factor)
    return sums


def _fake(hidden, weight, labels, bias, ignore_index, z_loss, mean, grads, dtype, backend):  # type: ignore[no-untyped-def]
    wide = torch.promote_types(dtype, torch.float32)

    def empty(shape, dtype=wide):  # type: ignore[no-untyped-def]
        return hidden.new_empty(shape if grads else (0, *shape[1:]), dtype=dtype)

    return (
        hidden.new_empty((), dtype=wide),
        empty(hidden.shape, waiting_dtype(hidden.dtype)),
        empty(weight.shape, waiting_dtype(weight.dtype)),
        hidden.new_empty(0, dtype=wide) if bias is None else empty(weight.shape[:1]),
        hidden.new_empty((), dtype=wide),
    )


# One op rather than autograd over torch calls: the number of labelled rows is data, which torch.compile cannot trace.
# Its forward returns the gradients of the sum too, and its backward only scales them. `hidden` is an argument of the
# backward so that a second derivative is refused.
_forward, _scale = define_differentiable(
    "masked_linear_cross_entropy(Tensor hidden, Tensor weight, Tensor labels, Tensor? bias, int ignore_index, "
    "float z_loss, bool mean, bool grads, ScalarType dtype, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    "masked_linear_cross_entropy_backward(Tensor grad, Tensor hidden, Tensor dhidden, Tensor dweight, Tensor dbias, "
    "Tensor scale) -> (Tensor, Tensor, Tensor)",
    forward=_forward_op,
    forward_fake=_fake,
    backward=lambda grad, hidden, *sums_and_scale: tuple(s * (grad * sums_and_scale[3]) for s in sums_and_scale[:3]),
    backward_fake=lambda grad, hidden, *sums_and_scale: tuple(torch.empty_like(s) for s in sums_and_scale[:3]),
    setup_context=_setup_context,
    gradients=_gradients,
)
