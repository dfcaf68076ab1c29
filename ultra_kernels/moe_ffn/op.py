"""Mixture-of-experts feed-forward network without dropped tokens."""

from __future__ import annotations

from typing import Literal

import torch

from .._dispatch import Op
from ..bitlinear.op import OP as BITLINEAR
from ..bitlinear.op import matmul_dtype
from . import reference
from .reference import MoEStats

OP = Op("moe_ffn", __package__, {"cuda": ("reference",), "cpu": ("reference",)}, {})


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
    select_bias are chosen; the bias (no gradient) plays no other part. Every token reaches all its experts.
    `gated`: w_in has 2F rows, 0..F−1 the gate, and h = act(gate) · up. gelu is the erf form, relu2 is relu squared.
    `sub_norm` `[F]`: RMSNorm (eps 1e-6) of h. `bitnet`: tokens and each expert's matrices are fake-quantised as in
    `bitlinear` with scale=bitnet_scale, on its backends. An expert without tokens gets zero gradients.

    x `[T, D]`, router_logits `[T, E]`, w_in `[E, F, D]` (gated: `[E, 2F, D]`), w_out `[E, D, F]`, b_in `[E, F]` or
    `[E, 2F]`, b_out `[E, D]`, select_bias `[E]`. Returns y `[T, D]` in x's dtype (under autocast in that dtype) and
    MoEStats(counts int64 `[E]`, mean_prob `[E]`, z `[]`), the last two with gradient.
    Raises ValueError on a shape mismatch, an unknown activation or a top_k outside 1..E, BackendUnavailable.
    After Shazeer et al. 2017 (arXiv:1701.06538), dropless as Tan et al. 2024 (arXiv:2403.08245).
    """
    if x.ndim != 2 or router_logits.ndim != 2 or router_logits.shape[0] != x.shape[0]:
        raise ValueError(
            f"moe_ffn: x is {tuple(x.shape)} and router_logits {tuple(router_logits.shape)}; "
            "they must be (T, D) and (T, E)"
        )
    (D, E), F = (x.shape[1], router_logits.shape[1]), w_out.shape[-1]
    wanted = {
        "w_in": (w_in, (E, 2 * F if gated else F, D)),
        "w_out": (w_out, (E, D, F)),
        "b_in": (b_in, (E, 2 * F if gated else F)),
        "b_out": (b_out, (E, D)),
        "select_bias": (select_bias, (E,)),
        "sub_norm": (sub_norm, (F,)),
    }
    for name, (p, shape) in wanted.items():
        if p is not None and p.shape != shape:
            raise ValueError(f"moe_ffn: {name} has shape {tuple(p.shape)}; with gated={gated} it must be {shape}")
    if not 1 <= top_k <= E:
        raise ValueError(f"moe_ffn: top_k={top_k} must be between 1 and the number of experts, {E}")
    if activation not in reference.ACTIVATIONS:
        raise ValueError(f"moe_ffn: activation {activation!r} is unknown; known are {', '.join(reference.ACTIVATIONS)}")
    if bitnet_scale not in ("mean", "median"):
        raise ValueError(f"moe_ffn: bitnet_scale {bitnet_scale!r} is unknown; it must be 'mean' or 'median'")
    if normalize_gates is None:
        normalize_gates = top_k > 1
    chosen = (BITLINEAR if bitnet else OP).choose(backend, x, w_in, w_out)
    return reference.moe_ffn(
        x, router_logits, w_in, w_out, top_k, activation, gated, b_in, b_out, normalize_gates, select_bias, sub_norm,
        bitnet_scale if bitnet else None, matmul_dtype(x), chosen,
    )  # fmt: skip
