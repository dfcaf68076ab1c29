"""Multi-scale retention (RetNet, arXiv:2307.08621)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import ClassVar, Literal

import torch
from pydantic import Field, PositiveInt
from torch.nn.functional import silu

from ultra.config.fields import ModelFields, Problem, head_problems
from ultra.layers.linear import RMSNorm, make_linear
from ultra.layers.module import Mixer
from ultra.layers.sequences import Sequences
from ultra_kernels import retention, rotary


class RetNetFields(ModelFields):
    retention_heads: int = Field(12, ge=1, description="Heads of retnet, each with its own decay; divides hidden_size.")
    retention_bidirectional: bool = Field(True, description="Decay by |t-s|; false: causal, as in the paper.")
    retention_window: tuple[float, float] = Field(
        (4.0, 512.0),
        description="Memory of the fastest and of the slowest head in tokens: gamma = 1 - 1/window.",
    )
    retention_rotary: bool = Field(True, description="Rotate queries and keys by position.")
    retention_value_factor: int = Field(1, ge=1, le=4, description="Value width over hidden_size.")
    retention_chunk: PositiveInt | Literal["auto"] = Field(
        "auto", description="Chunk length of the chunkwise form; auto: what the backend finds cheapest for the length."
    )

    def problems(self) -> Iterator[Problem]:
        first, last = self.retention_window
        if not 1 < first <= last:
            yield (
                "retention_window",
                f"[{first:g}, {last:g}] must be two ascending lengths above 1, such as [4, 512]",
            )
        if "retnet" in self.layer_pattern:
            pairs = "rotary position encoding" if self.retention_rotary else None
            yield from head_problems(
                self.hidden_size, "retention_heads", self.retention_heads, pairs, used_by="layer retnet"
            )


class RetNet(Mixer):
    """W_o (silu(G) · norm(Y)), Y = (Q Kᵀ · c_h γ_h^|n-m|) V, with an RMSNorm per head.

    c_h = sqrt((1-γ)/(1+γ)) keeps the scores of order 1 whatever the length, so that padding and batch composition
    change nothing; the paper's row normalisations are cancelled by the norm that follows.
    """

    Fields: ClassVar[type[ModelFields]] = RetNetFields
    param_group: ClassVar[str] = "retnet"
    log_decay: torch.Tensor
    scale: torch.Tensor
    inv_freq: torch.Tensor | None

    def __init__(self, cfg: RetNetFields) -> None:
        super().__init__(cfg)
        D, self.H = cfg.hidden_size, cfg.retention_heads
        self.K = D // self.H
        self.V = self.K * cfg.retention_value_factor
        self.direction: Literal["bidirectional", "forward"] = (
            "bidirectional" if cfg.retention_bidirectional else "forward"
        )
        self.chunk_size = None if cfg.retention_chunk == "auto" else cfg.retention_chunk
        self.qkvg = make_linear(cfg, D, 2 * self.H * (self.K + self.V))
        self.head_norm = RMSNorm(self.V, cfg.rms_norm_eps, elementwise_affine=False)
        self.out = make_linear(cfg, self.H * self.V, D, sub_norm=True, residual_out=True)
        first, last = cfg.retention_window
        gamma = 1 - 1 / torch.logspace(math.log2(first), math.log2(last), self.H, base=2.0)
        self.register_buffer("log_decay", gamma.log(), persistent=False)
        self.register_buffer("scale", self.K**-0.5 * ((1 - gamma) / (1 + gamma)).sqrt(), persistent=False)
        angles = 10000.0 ** -torch.linspace(0, 1, self.K // 2)
        self.register_buffer("inv_freq", angles if cfg.retention_rotary else None, persistent=False)

    def forward(self, x: torch.Tensor, seqs: Sequences) -> torch.Tensor:
        B, T, _ = x.shape
        q, k, v, g = self.qkvg(x).split([self.H * n for n in (self.K, self.K, self.V, self.V)], -1)
        q, k, v = (t.view(B, T, self.H, -1) for t in (q, k, v))
        if self.inv_freq is not None:
            q, k = (rotary(t, seqs.positions, inv_freq=self.inv_freq) for t in (q, k))
        y = retention(
            q, k, v, self.log_decay, scale=self.scale, direction=self.direction, cu_seqlens=seqs.cu_seqlens,
            chunk_size=self.chunk_size,
        )  # fmt: skip
        return self.out(silu(g) * self.head_norm(y).reshape(g.shape))
