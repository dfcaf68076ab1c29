"""Linear maps in float32 on a CPU, by whichever of torch's two libraries is faster there."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from ._dispatch import define_differentiable

# Multiplications from which oneDNN's shorter time is worth its 20 us a call.
WORTH_A_CALL = 2**22


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x weightᵀ + bias, x `[..., K]`, weight `[N, K]`, bias `[N]`, as torch.nn.functional.linear.

    That multiplies float32 with MKL, which uses half the width of an AMD processor with AVX-512: there large products,
    and those of the backward, are oneDNN's (docs/LOG.md, 2026-11-29: 2.2 × as fast). They have no second derivative.
    """
    if not (_serves(x, weight, bias) and onednn_is_faster()):
        return functional.linear(x, weight, bias)
    y: torch.Tensor = _linear(x, weight, bias)
    return y


def _serves(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
    tensors = (x, weight) if bias is None else (x, weight, bias)
    return (
        all(t.device.type == "cpu" and t.dtype == torch.float32 for t in tensors)
        and weight.ndim == 2
        and x.shape[-1] == weight.shape[1]  # else torch says what is wrong
        and not torch.is_autocast_enabled("cpu")
        # a compiled graph calls without Python, and is not to depend on sizes
        and (torch.compiler.is_compiling() or math.prod(x.shape[:-1]) * math.prod(weight.shape) >= WORTH_A_CALL)
    )


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def onednn_is_faster() -> bool:
    return _onednn_is_faster()


@functools.cache
def _onednn_is_faster() -> bool:
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return False
    return torch.backends.cpu.get_cpu_capability() == "AVX512" and _vendor() == "AuthenticAMD"


def _vendor() -> str:
    """What Linux says of the processor; elsewhere nothing, and torch's own choice stays."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id")), "")


def multiply(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x weightᵀ + bias of matrices in any layout."""
    y: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return y


def _forward(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return multiply(x.reshape(-1, x.shape[-1]), weight, bias).view(*x.shape[:-1], weight.shape[0])


def _setup_context(ctx: Any, inputs: Any, output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])


def _gradients(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    wants = ctx.needs_input_grad
    found = _linear_backward(grad, *ctx.saved_tensors, wants)
    return tuple(g if wanted else None for g, wanted in zip(found, wants, strict=True))


def _backward(grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, wants: list[bool]) -> list[torch.Tensor]:
    """Of x, weight and bias; empty where not wanted."""
    (N, K), dy, rows = weight.shape, grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
    dx, dweight, dbias = (dy.new_empty(0) for _ in range(3))
    if wants[0]:
        dx = multiply(dy, weight.t()).view(x.shape)
    if wants[1]:
        # oneDNN copies its left side when it is transposed: the smaller one
        dweight = multiply(dy.t(), rows.t()) if N <= K else multiply(rows.t(), dy.t()).t().contiguous()
    if wants[2]:
        dbias = dy.sum(0)
    return [dx, dweight, dbias]


_linear, _linear_backward = define_differentiable(
    "onednn_linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    "onednn_linear_backward(Tensor grad, Tensor x, Tensor weight, bool[] wants) -> (Tensor, Tensor, Tensor)",
    forward=_forward,
    forward_fake=lambda x, weight, bias: x.new_empty(*x.shape[:-1], weight.shape[0]),
    backward=_backward,
    backward_fake=lambda grad, x, weight, wants: (
        grad.new_empty(x.shape if wants[0] else 0),
        grad.new_empty(weight.shape if wants[1] else 0),
        grad.new_empty(weight.shape[0] if wants[2] else 0),
    ),
    setup_context=_setup_context,
    gradients=_gradients,
    instead="use torch.nn.functional.linear to differentiate twice",
)
