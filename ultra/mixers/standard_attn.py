"""Softmax attention (arXiv:1706.03762) with rotary positions (arXiv:2104.09864)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from torch import nn

from ultra.config.fields import ModelFields, Problem, attention_problems


class StandardAttentionFields(ModelFields):
    def problems(self) -> Iterator[Problem]:
        yield from attention_problems(self, "standard_attn")


class StandardAttention(nn.Module):
    Fields: ClassVar[type[ModelFields]] = StandardAttentionFields
    param_group: ClassVar[str] = "attention"
