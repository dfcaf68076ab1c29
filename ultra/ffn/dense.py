"""Feed-forward network: W2 act(W1 x), or gated (arXiv:2002.05202)."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch.nn.functional import gelu, silu

from ultra.config.fields import ModelFields
from ultra.layers.linear import make_linear
from ultra.layers.module import Component


class DenseFFNFields(ModelFields):
    """None of its own."""


class DenseFFN(Component):
    Fields: ClassVar[type[ModelFields]] = DenseFFNFields
    param_group: ClassVar[str] = "other"

    def __init__(self, cfg: DenseFFNFields) -> None:
        super().__init__()
        F = inner_width(cfg)
        self.gated, self.activation = cfg.ffn_gated, ACTIVATIONS[cfg.ffn_activation]
        self.up = make_linear(cfg, cfg.hidden_size, 2 * F if self.gated else F)
        self.down = make_linear(cfg, F, cfg.hidden_size, sub_norm=True, residual_out=True)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        h = self.up(x)
        if self.gated:
            gate, h = h.chunk(2, -1)
            return self.down(self.activation(gate) * h), None
        return self.down(self.activation(h)), None


ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"silu": silu, "gelu": gelu}


def inner_width(cfg: ModelFields) -> int:
    """F: ffn_hidden_size, or 2/3 of it when gated, so that the parameters stay about as many; a multiple of 8."""
    return -(-cfg.ffn_hidden_size * 2 // 24) * 8 if cfg.ffn_gated else cfg.ffn_hidden_size
