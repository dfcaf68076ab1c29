"""Linear maps of the blocks: plain, or BitLinear where `use_bitnet` puts one."""

from __future__ import annotations

import torch
from torch import nn

import ultra_kernels.nn
from ultra.config.fields import ModelFields
from ultra.layers.module import Component


class RMSNorm(ultra_kernels.nn.RMSNorm, Component):
    """Where a formula needs a norm whatever `norm_type` says: per head in retention and attention, in BitLinear."""

    param_group = "norms"


class BitLinear(ultra_kernels.nn.BitLinear):
    """Without a bias, so that `use_bitnet` changes no other parameter of the architecture; norm: SubLN."""

    def __init__(self, cfg: ModelFields, in_features: int, out_features: int, *, norm: bool) -> None:
        super().__init__(in_features, out_features, bias=False, scale=cfg.bitnet_scale)
        self.norm = RMSNorm(in_features, 1e-6) if norm else None


def make_linear(
    cfg: ModelFields, in_features: int, out_features: int, *, sub_norm: bool = False, residual_out: bool = False
) -> nn.Module:
    """A linear map of a block, without bias.

    sub_norm: a BitLinear here has its own RMSNorm (before out- and down-projections; everywhere when the block's norm
    is pointwise and does not fix the scale). residual_out: the map writes to the residual stream, so its initial
    standard deviation shrinks with the logical depth.
    """
    if cfg.use_bitnet:
        norm = sub_norm or cfg.norm_type != "layer_norm"
        linear: nn.Module = BitLinear(cfg, in_features, out_features, norm=norm)
    else:
        linear = ultra_kernels.nn.Linear(in_features, out_features, bias=False)
    init_normal_(linear.weight, cfg, residual_out=residual_out)  # type: ignore[arg-type]
    return linear


@torch.no_grad()
def init_normal_(weight: torch.Tensor, cfg: ModelFields, *, residual_out: bool = False) -> None:
    """N(0, init_std) cut at 3 sigma; maps into the residual stream × 1/sqrt(2 · layers · loops)."""
    std = cfg.initial_std
    if residual_out:
        std /= (2 * cfg.num_layers * cfg.num_loops) ** 0.5
    nn.init.trunc_normal_(weight, 0.0, std, -3 * std, 3 * std)
