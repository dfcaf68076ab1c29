"""Dynamic erf: gamma * erf(alpha x + s) + beta (arXiv:2512.10938)."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import nn

from ultra.config.fields import ModelFields
from ultra.layers.module import Component
from ultra.norms.site import Site
from ultra_kernels import derf


class DerfFields(ModelFields):
    """None of its own."""


class Derf(Component):
    Fields: ClassVar[type[ModelFields]] = DerfFields
    param_group: ClassVar[str] = "norms"
    no_decay: ClassVar[frozenset[str]] = frozenset({"alpha", "shift"})

    def __init__(self, cfg: DerfFields, dim: int, site: Site) -> None:
        super().__init__()
        # 1.0 is the paper's value for language models, at every site and width
        self.alpha = nn.Parameter(torch.tensor([1.0 if cfg.norm_alpha_init == "auto" else cfg.norm_alpha_init]))
        self.shift = nn.Parameter(torch.zeros(1))
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return derf(x, self.alpha, self.shift, self.weight, self.bias)
