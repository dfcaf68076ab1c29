"""Dynamic tanh: gamma * tanh(alpha x) + beta (arXiv:2503.10622)."""

from __future__ import annotations

from typing import ClassVar

from ultra.config.fields import ModelFields
from ultra.layers.module import Component
from ultra.norms.site import Site
from ultra_kernels import nn


class DynamicTanhFields(ModelFields):
    """None of its own."""


class DynamicTanh(nn.DyT, Component):
    Fields: ClassVar[type[ModelFields]] = DynamicTanhFields
    param_group: ClassVar[str] = "norms"
    no_decay: ClassVar[frozenset[str]] = frozenset({"alpha"})

    def __init__(self, cfg: DynamicTanhFields, dim: int, site: Site) -> None:
        super().__init__(dim, initial_alpha(dim, site) if cfg.norm_alpha_init == "auto" else cfg.norm_alpha_init)


def initial_alpha(dim: int, site: Site) -> float:
    """The paper's values for language models, table 12: smaller for wider models, larger before attention."""
    if dim <= 1024:
        return 1.0
    mixer, other = (0.8, 0.2) if dim <= 4096 else (0.6, 0.15) if dim < 8192 else (0.2, 0.05)
    return mixer if site == "mixer" else other
