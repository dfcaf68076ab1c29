"""Dynamic erf: gamma * erf(alpha x + s) + beta (arXiv:2512.10938)."""

from __future__ import annotations

from typing import ClassVar

from ultra.config.fields import ModelFields
from ultra.layers.module import Component
from ultra.norms.site import Site
from ultra_kernels import nn


class DerfFields(ModelFields):
    """None of its own."""


class Derf(nn.Derf, Component):
    Fields: ClassVar[type[ModelFields]] = DerfFields
    param_group: ClassVar[str] = "norms"
    no_decay: ClassVar[frozenset[str]] = frozenset({"alpha", "shift"})

    def __init__(self, cfg: DerfFields, dim: int, site: Site) -> None:
        # 1.0 is the paper's value for language models, at every site and width
        super().__init__(dim, 1.0 if cfg.norm_alpha_init == "auto" else cfg.norm_alpha_init)
