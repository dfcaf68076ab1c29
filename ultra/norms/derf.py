"""Dynamic erf: gamma * erf(alpha x + s) + beta (arXiv:2512.10938)."""

from __future__ import annotations

from typing import ClassVar

from torch import nn

from ultra.config.fields import ModelFields


class DerfFields(ModelFields):
    """None of its own."""


class Derf(nn.Module):
    Fields: ClassVar[type[ModelFields]] = DerfFields
    param_group: ClassVar[str] = "norms"
