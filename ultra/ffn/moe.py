"""Mixture of experts: softmax router, top-k, no token dropped (arXiv:2101.03961, arXiv:2403.08245)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import nn

from ultra.config.fields import ModelFields, Problem
from ultra.ffn.dense import inner_width
from ultra.layers.linear import RMSNorm, init_normal_
from ultra.layers.module import Component, wide
from ultra_kernels import MoEStats, moe_ffn


class MoEFFNFields(ModelFields):
    num_experts: int = Field(4, ge=1, description="Experts per layer.")
    top_k_experts: int = Field(2, ge=1, description="Experts that each token visits.")
    moe_norm_topk: bool | Literal["auto"] = Field(
        "auto", description="Scale the chosen gates to sum 1; auto: when top_k_experts > 1."
    )
    moe_aux_loss: float = Field(0.01, ge=0, description="Weight of the load balancing loss.")
    moe_z_loss: float = Field(0.001, ge=0, description="Weight of the mean squared logsumexp of the router.")
    moe_balance: Literal["aux", "bias", "both"] = Field(
        "aux", description="Balance by the loss, by a selection bias updated after each step, or by both."
    )
    moe_bias_rate: float = Field(0.001, ge=0, description="Step of the selection bias.")

    @property
    def norm_topk(self) -> bool:
        # With one expert a gate scaled to 1 is constant, and the router would get no gradient.
        return self.top_k_experts > 1 if self.moe_norm_topk == "auto" else self.moe_norm_topk

    def problems(self) -> Iterator[Problem]:
        if self.use_moe and self.top_k_experts > self.num_experts:
            yield "top_k_experts", f"{self.top_k_experts} is more than num_experts {self.num_experts}"
        if self.use_moe and self.top_k_experts == 1 and self.moe_norm_topk is True:
            yield (
                "moe_norm_topk",
                "must be false or auto with top_k_experts 1: the router would get no gradient",
            )


class MoEFFN(Component):
    """y_t = sum over the top-k experts e of g_te · FFN_e(x_t), g from a softmax router in float32."""

    Fields: ClassVar[type[ModelFields]] = MoEFFNFields
    param_group: ClassVar[str] = "other"
    select_bias: torch.Tensor | None
    no_galore: ClassVar[frozenset[str]] = frozenset({"router.weight"})

    def __init__(self, cfg: MoEFFNFields) -> None:
        super().__init__()
        D, E, F = cfg.hidden_size, cfg.num_experts, inner_width(cfg)
        self.top_k, self.activation, self.gated = cfg.top_k_experts, cfg.ffn_activation, cfg.ffn_gated
        self.normalize_gates, self.bitnet, self.bitnet_scale = cfg.norm_topk, cfg.use_bitnet, cfg.bitnet_scale
        self.router = nn.Linear(D, E, bias=False)
        self.w_in = nn.Parameter(torch.empty(E, 2 * F if self.gated else F, D))
        self.w_out = nn.Parameter(torch.empty(E, D, F))
        self.sub_norm = RMSNorm(F, 1e-6) if self.bitnet else None
        init_normal_(self.router.weight, cfg)
        init_normal_(self.w_in, cfg)
        init_normal_(self.w_out, cfg, residual_out=True)
        by_bias = cfg.moe_balance in ("bias", "both")
        self.bias_rate = cfg.moe_bias_rate if by_bias else 0.0
        self.aux_weight = cfg.moe_aux_loss if cfg.moe_balance in ("aux", "both") else 0.0
        self.z_weight = cfg.moe_z_loss
        self.register_buffer("select_bias", torch.zeros(E) if by_bias else None)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, MoEStats]:
        rows = x.reshape(-1, x.shape[-1])
        with torch.autocast(x.device.type, enabled=False):
            logits = wide(rows) @ wide(self.router.weight).t()
        y, stats = moe_ffn(
            rows, logits, self.w_in, self.w_out, top_k=self.top_k, activation=self.activation, gated=self.gated,
            normalize_gates=self.normalize_gates, select_bias=self.select_bias,
            sub_norm=None if self.sub_norm is None else self.sub_norm.weight, bitnet=self.bitnet,
            bitnet_scale=self.bitnet_scale,
        )  # fmt: skip
        return y.view(x.shape), stats

    def auxiliary_loss(self, stats: MoEStats) -> torch.Tensor:
        """aux · E Σ_e f_e P_e + z · mean(logsumexp²); f the routed share of tokens, P the mean probability."""
        share = stats.counts.float() / stats.counts.sum().clamp(min=1)
        balance = len(share) * (share * stats.mean_prob).sum()
        return self.aux_weight * balance + self.z_weight * stats.z

    @torch.no_grad()
    def update_bias(self, counts: torch.Tensor) -> None:
        """Moves the selection bias of every expert towards the mean load (arXiv:2408.15664); counts `[E]`."""
        if self.select_bias is not None:
            load = counts.float()
            self.select_bias += self.bias_rate * torch.sign(load.mean() - load)
