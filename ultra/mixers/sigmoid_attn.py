"""Sigmoid attention (arXiv:2409.04431)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

from pydantic import Field
from torch import nn

from ultra.config.fields import ModelFields, Problem, attention_problems


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


class SigmoidAttention(nn.Module):
    Fields: ClassVar[type[ModelFields]] = SigmoidAttentionFields
    param_group: ClassVar[str] = "attention"
