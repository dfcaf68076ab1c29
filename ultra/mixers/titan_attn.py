"""Softmax attention with HoPE positions (arXiv:2509.05218), optional Titans memory (arXiv:2501.00663)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import nn

from ultra.config.fields import ModelFields, Problem, attention_problems
from ultra.layers.attention import SelfAttention, softmax_attention
from ultra.layers.linear import init_normal_
from ultra.layers.linear_memory import LinearMemory
from ultra.layers.module import Component
from ultra.layers.sequences import Sequences
from ultra_kernels import hope_attention


class TitanAttentionFields(ModelFields):
    use_hope: bool = Field(True, description="HoPE positions in titan_attn; false: rotary.")
    hope_base: float = Field(10000.0, gt=1, description="Base of the HoPE frequencies theta_i.")
    hope_damping: float = Field(0.01, ge=0, description="Damping added to theta_i: the decay rate per token.")
    hope_mode: Literal["per_pair", "global"] = Field(
        "per_pair", description="theta' = theta_i + damping for each pair, or max theta + damping for all."
    )
    hope_rope_fraction: Annotated[float, Field(ge=0, le=1)] | Literal["auto"] = Field(
        "auto",
        description="Share of titan_attn's heads that are rotary instead of HoPE; "
        "auto: 0.5 when titan_attn is the only mixer, else 0.",
    )
    hope_learnable_damping: bool = Field(False, description="Train the damping, one value per layer.")
    titan_persistent_tokens: int = Field(0, ge=0, description="Learned keys and values before every sequence.")
    titan_memory: Literal["none", "linear"] = Field(
        "none", description="Gated branch with a linear memory written at test time, or none."
    )

    @property
    def rope_fraction(self) -> float:
        if self.hope_rope_fraction == "auto":
            return 0.5 if set(self.layer_pattern) == {"titan_attn"} else 0.0
        return self.hope_rope_fraction

    def problems(self) -> Iterator[Problem]:
        yield from attention_problems(self, "titan_attn", hope=self.use_hope and self.position_encoding == "auto")


class TitanAttention(SelfAttention):
    """Softmax attention with HoPE; optionally with persistent tokens and a gated linear memory."""

    Fields: ClassVar[type[ModelFields]] = TitanAttentionFields
    param_group: ClassVar[str] = "attention"
    no_decay: ClassVar[frozenset[str]] = frozenset({"damping"})

    def __init__(self, cfg: TitanAttentionFields) -> None:
        hope = cfg.use_hope and cfg.position_encoding == "auto"
        super().__init__(cfg, rotary=not hope and cfg.position_encoding != "none", qk_norm=cfg.qk_norm is True)
        self.hope = hope
        self.base, self.mode = cfg.hope_base, cfg.hope_mode
        self.rotary_heads, self.rotary_theta = round(cfg.rope_fraction * cfg.num_heads), cfg.rope_theta
        self.damping: float | nn.Parameter = cfg.hope_damping
        if cfg.hope_learnable_damping:
            self.damping = nn.Parameter(torch.tensor(cfg.hope_damping))
        P = cfg.titan_persistent_tokens
        self.persistent = PersistentTokens(cfg, P) if P else None
        self.memory = LinearMemory(cfg) if cfg.titan_memory == "linear" else None

    def forward(self, x: torch.Tensor, seqs: Sequences) -> torch.Tensor:
        y = super().forward(x, seqs)
        return y if self.memory is None else y + self.memory(x, seqs)

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seqs: Sequences) -> torch.Tensor:
        prefix = None if self.persistent is None else (self.persistent.keys, self.persistent.values)
        if not self.hope:
            return softmax_attention(q, k, v, seqs, self.theta, prefix)
        prefix_k, prefix_v = prefix or (None, None)
        # a negative rate would grow with distance: the learned damping acts through its absolute value
        damping = self.damping.abs() if isinstance(self.damping, torch.Tensor) else self.damping
        return hope_attention(
            q, k, v, base=self.base, damping=damping, mode=self.mode, rotary_heads=self.rotary_heads,
            rotary_theta=self.rotary_theta, prefix_k=prefix_k, prefix_v=prefix_v, cu_seqlens=seqs.cu_seqlens,
        )  # fmt: skip


class PersistentTokens(Component):
    """Learned keys and values `[P,H,K]` before every sequence, without a position."""

    param_group: ClassVar[str] = "embeddings"

    def __init__(self, cfg: TitanAttentionFields, P: int) -> None:
        super().__init__()
        self.keys = nn.Parameter(torch.empty(P, cfg.num_heads, cfg.head_dim))
        self.values = nn.Parameter(torch.empty(P, cfg.num_heads, cfg.head_dim))
        for p in (self.keys, self.values):
            init_normal_(p, cfg)
