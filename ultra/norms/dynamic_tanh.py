"""Dynamic tanh: gamma * tanh(alpha x) + beta (arXiv:2503.10622)."""

from __future__ import annotations

from typing import ClassVar

from torch import nn

from ultra.config.fields import ModelFields


class DynamicTanhFields(ModelFields):
    """None of its own."""


class DynamicTanh(nn.Module):
    Fields: ClassVar[type[ModelFields]] = DynamicTanhFields
    param_group: ClassVar[str] = "norms"
