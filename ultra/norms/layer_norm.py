"""Layer normalisation (arXiv:1607.06450)."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import nn

from ultra.config.fields import ModelFields
from ultra.layers.module import Component
from ultra.norms.site import Site
from ultra_kernels import layer_norm


class LayerNormFields(ModelFields):
    """None of its own."""


class LayerNorm(Component):
    Fields: ClassVar[type[ModelFields]] = LayerNormFields
    param_group: ClassVar[str] = "norms"

    def __init__(self, cfg: LayerNormFields, dim: int, site: Site) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))
        self.eps = cfg.layer_norm_eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return layer_norm(x, self.weight, self.bias, self.eps)
