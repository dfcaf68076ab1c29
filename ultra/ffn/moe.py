"""Mixture of experts: softmax router, top-k, no token dropped (arXiv:2101.03961, arXiv:2403.08245)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

from pydantic import Field
from torch import nn

from ultra.config.fields import ModelFields, Problem


class MoEFFNFields(ModelFields):
    use_moe: bool = Field(True, description="Mixture of experts as the FFN; false: one dense FFN.")
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


class MoEFFN(nn.Module):
    Fields: ClassVar[type[ModelFields]] = MoEFFNFields
    param_group: ClassVar[str] = "other"
