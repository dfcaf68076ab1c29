"""Feed-forward network: W2 act(W1 x), or gated (arXiv:2002.05202)."""

from __future__ import annotations

from typing import ClassVar

from torch import nn

from ultra.config.fields import ModelFields


class DenseFFNFields(ModelFields):
    """None of its own."""


class DenseFFN(nn.Module):
    Fields: ClassVar[type[ModelFields]] = DenseFFNFields
    param_group: ClassVar[str] = "other"
