"""Sigmoid attention (arXiv:2409.04431)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

import torch
from pydantic import Field

from ultra.config.fields import ModelFields, Problem, attention_problems
from ultra.layers.attention import SelfAttention
from ultra.layers.sequences import Sequences
from ultra_kernels import rotary, sigmoid_attention


class SigmoidAttentionFields(ModelFields):
    sigmoid_bias: float | Literal["auto"] = Field(
        "auto", description="Added to the logits; auto: -ln of the sequence's length."
    )
    sigmoid_normalize: bool = Field(False, description="Divide each row by its sum.")

    def problems(self) -> Iterator[Problem]:
        yield from attention_problems(self, "sigmoid_attn")
        if self.sigmoid_normalize and self.sigmoid_bias != "auto":
            yield (
                "sigmoid_bias",
                "has no effect with sigmoid_normalize: leave it out, or set sigmoid_normalize: false",
            )


class SigmoidAttention(SelfAttention):
    """sigmoid(q kᵀ / sqrt(K) + b) v with b = -ln n: rows do not couple, and sum to about 1 at initialisation."""

    Fields: ClassVar[type[ModelFields]] = SigmoidAttentionFields
    param_group: ClassVar[str] = "attention"

    def __init__(self, cfg: SigmoidAttentionFields) -> None:
        # Without a sum over the row nothing bounds the logits, so queries and keys are normalised by default.
        super().__init__(cfg, rotary=cfg.position_encoding != "none", qk_norm=cfg.qk_norm is not False)
        self.bias = None if cfg.sigmoid_bias == "auto" else cfg.sigmoid_bias
        self.normalize = cfg.sigmoid_normalize

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seqs: Sequences) -> torch.Tensor:
        if self.theta is not None:
            q, k = (rotary(t, seqs.positions, theta=self.theta) for t in (q, k))
        return sigmoid_attention(q, k, v, bias=self.bias, normalize=self.normalize, cu_seqlens=seqs.cu_seqlens)
