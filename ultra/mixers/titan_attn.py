"""Softmax attention with HoPE positions (arXiv:2509.05218), optional Titans memory (arXiv:2501.00663)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

from pydantic import Field
from torch import nn

from ultra.config.fields import ModelFields, Problem, attention_problems


class TitanAttentionFields(ModelFields):
    use_hope: bool = Field(True, description="HoPE positions in titan_attn; false: rotary.")
    hope_base: float = Field(10000.0, gt=1, description="Base of the HoPE frequencies theta_i.")
    hope_damping: float = Field(0.01, ge=0, description="Damping added to theta_i: the decay rate per token.")
    hope_mode: Literal["per_pair", "global"] = Field(
        "per_pair", description="theta' = theta_i + damping for each pair, or max theta + damping for all."
    )
    hope_rope_fraction: Annotated[float, Field(ge=0, le=1)] | Literal["auto"] = Field(
        "auto",
        description="Share of titan_attn's heads that are rotary instead of HoPE; "
        "auto: 0.5 when titan_attn is the only mixer, else 0.",
    )
    hope_learnable_damping: bool = Field(False, description="Train the damping, one value per layer.")
    titan_persistent_tokens: int = Field(
        0, ge=0, description="Learned keys and values before every sequence."
    )
    titan_memory: Literal["none", "linear"] = Field(
        "none", description="Gated branch with a linear memory written at test time, or none."
    )

    @property
    def rope_fraction(self) -> float:
        if self.hope_rope_fraction == "auto":
            return 0.5 if set(self.layer_pattern) == {"titan_attn"} else 0.0
        return self.hope_rope_fraction

    def problems(self) -> Iterator[Problem]:
        yield from attention_problems(
            self, "titan_attn", hope=self.use_hope and self.position_encoding == "auto"
        )


class TitanAttention(nn.Module):
    Fields: ClassVar[type[ModelFields]] = TitanAttentionFields
    param_group: ClassVar[str] = "attention"
