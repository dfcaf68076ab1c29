"""Mixture of experts: softmax router, top-k, no token dropped (arXiv:2101.03961, arXiv:2403.08245)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

import torch
from pydantic import Field

from ultra.config.fields import ModelFields, Problem
from ultra.ffn.dense import inner_width
from ultra.layers.linear import RMSNorm
from ultra.layers.module import Component
from ultra_kernels import MoEStats, nn


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


class MoEFFN(nn.MoE, Component):
    Fields: ClassVar[type[ModelFields]] = MoEFFNFields
    param_group: ClassVar[str] = "other"
    no_galore: ClassVar[frozenset[str]] = frozenset({"router.weight"})

    def __init__(self, cfg: MoEFFNFields) -> None:
        F = inner_width(cfg)
        by_bias = cfg.moe_balance in ("bias", "both")
        super().__init__(
            cfg.hidden_size, F, cfg.num_experts, cfg.top_k_experts, activation=cfg.ffn_activation,
            gated=cfg.ffn_gated, normalize_gates=cfg.norm_topk, balance_bias=by_bias, bitnet=cfg.use_bitnet,
            bitnet_scale=cfg.bitnet_scale, init_std=cfg.initial_std, layers=cfg.num_layers * cfg.num_loops,
        )  # fmt: skip
        self.sub_norm = RMSNorm(F, 1e-6) if self.bitnet else None
        self.bias_rate = cfg.moe_bias_rate if by_bias else 0.0
        self.aux_weight = cfg.moe_aux_loss if cfg.moe_balance in ("aux", "both") else 0.0
        self.z_weight = cfg.moe_z_loss

    def auxiliary_loss(self, stats: MoEStats) -> torch.Tensor:
        """moe_aux_loss · E Σ_e f_e P_e + moe_z_loss · mean(logsumexp²)."""
        return self.aux_weight * self.balance_loss(stats) + self.z_weight * stats.z

    def update_bias(self, counts: torch.Tensor) -> None:
        """Moves the selection bias of every expert towards the mean load; counts `[E]`."""
        self.update_select_bias(counts, self.bias_rate)
