"""Softmax attention (arXiv:1706.03762) with rotary positions (arXiv:2104.09864)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from ultra.config.fields import ModelFields, Problem, attention_problems
from ultra.layers.attention import SelfAttention


class StandardAttentionFields(ModelFields):
    def problems(self) -> Iterator[Problem]:
        yield from attention_problems(self, "standard_attn")


class StandardAttention(SelfAttention):
    """softmax(q kᵀ / sqrt(K)) v."""

    Fields: ClassVar[type[ModelFields]] = StandardAttentionFields
    param_group: ClassVar[str] = "attention"

    def __init__(self, cfg: StandardAttentionFields) -> None:
        super().__init__(cfg, rotary=cfg.position_encoding != "none", qk_norm=cfg.qk_norm is True)
