"""One layer: x + mixer(norm(x)), then x + ffn(norm(x)). The only residual additions of the encoder."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import dropout

from ultra.config.fields import ModelFields
from ultra.ffn import FFNS
from ultra.layers.module import Component
from ultra.layers.sequences import Sequences
from ultra.mixers import MIXERS
from ultra.norms import NORMS
from ultra_kernels import MoEStats


class Block(nn.Module):
    def __init__(self, cfg: ModelFields, mixer: str, *, use_moe: bool, layerscale_init: float | None) -> None:
        super().__init__()
        D = cfg.hidden_size
        self.mixer = MIXERS[mixer](cfg)
        self.mixer_norm = NORMS[cfg.norm_type](cfg, D, site="mixer") if self.mixer.prenorm else nn.Identity()
        self.ffn_norm = NORMS[cfg.norm_type](cfg, D, site="ffn")
        self.ffn = FFNS["moe" if use_moe else "dense"](cfg)
        self.mixer_scale = LayerScale(D, layerscale_init) if layerscale_init is not None else nn.Identity()
        self.ffn_scale = LayerScale(D, layerscale_init) if layerscale_init is not None else nn.Identity()
        self.dropout = cfg.dropout

    def forward(self, x: torch.Tensor, seqs: Sequences) -> tuple[torch.Tensor, MoEStats | None]:
        y = self.mixer_scale(self.mixer(self.mixer_norm(x), seqs))
        x = x + dropout(y, self.dropout, self.training)
        y, stats = self.ffn(self.ffn_norm(x))
        return x + dropout(self.ffn_scale(y), self.dropout, self.training), stats


class LayerScale(Component):
    """A learned gain per channel (arXiv:2103.17239)."""

    param_group = "norms"

    def __init__(self, dim: int, init: float) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.full((dim,), init))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.gain
