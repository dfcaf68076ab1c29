"""Layer normalisation (arXiv:1607.06450)."""

from __future__ import annotations

from typing import ClassVar

from torch import nn

from ultra.config.fields import ModelFields


class LayerNormFields(ModelFields):
    """None of its own."""


class LayerNorm(nn.Module):
    Fields: ClassVar[type[ModelFields]] = LayerNormFields
    param_group: ClassVar[str] = "norms"
