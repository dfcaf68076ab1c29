"""Token embedding: table, optional factorisation (arXiv:1909.11942), optional convolution, optional scale."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import nn
from torch.nn.functional import conv1d, pad

from ultra.config.fields import ModelFields
from ultra.layers.linear import init_normal_
from ultra.layers.module import Component
from ultra.layers.sequences import Sequences
from ultra_kernels.nn import Linear


class EmbeddingFields(ModelFields):
    use_embedding_conv: bool = Field(False, description="Conv1d along the sequence on the table's output.")
    embedding_conv_kernel: int = Field(3, ge=1, le=1025, description="Kernel size of the embedding convolution.")
    embedding_conv_residual: bool = Field(True, description="Add the convolution to its input.")
    embedding_conv_depthwise: bool = Field(False, description="One filter per channel.")
    embedding_conv_causal: bool = Field(False, description="Look at earlier tokens only.")
    embedding_scale: bool = Field(True, description="Learned scalar on the embedding, sqrt(hidden_size) at first.")


class Embedding(Component):
    """e = s · P (t + Conv(t)), t the token's row of the table; P, Conv and s are optional."""

    Fields: ClassVar[type[ModelFields]] = EmbeddingFields
    param_group: ClassVar[str] = "embeddings"
    no_decay: ClassVar[frozenset[str]] = frozenset({"scale"})

    def __init__(self, cfg: EmbeddingFields) -> None:
        super().__init__()
        width = cfg.factorized_embedding_dim if cfg.use_factorized_embedding else cfg.hidden_size
        self.table = nn.Embedding(cfg.vocab_size, width)
        init_normal_(self.table.weight, cfg)
        self.conv = EmbeddingConv(cfg, width) if cfg.use_embedding_conv else None
        self.projection = None
        if cfg.use_factorized_embedding:
            self.projection = Linear(width, cfg.hidden_size, bias=False)
            nn.init.normal_(self.projection.weight, 0.0, width**-0.5)  # keeps the rows' root mean square
        # Rows of 0.02 under a norm bring loss spikes (arXiv:2312.16903): docs/LOG.md has the runs without this
        self.scale = nn.Parameter(torch.tensor(cfg.hidden_size**0.5)) if cfg.embedding_scale else None

    def forward(self, ids: torch.Tensor, seqs: Sequences) -> torch.Tensor:
        x = self.table(ids)
        if self.conv is not None:
            x = self.conv(x, seqs)
        if self.projection is not None:
            x = self.projection(x).to(self.table.weight.dtype)  # autocast must not halve the residual stream
        return x if self.scale is None else x * self.scale


class EmbeddingConv(Component):
    """y = x + Conv1d(x) along each sequence, exactly T outputs for any kernel; near the identity at first."""

    param_group: ClassVar[str] = "embeddings"

    def __init__(self, cfg: EmbeddingFields, width: int) -> None:
        super().__init__()
        self.kernel, self.residual = cfg.embedding_conv_kernel, cfg.embedding_conv_residual
        self.groups = width if cfg.embedding_conv_depthwise else 1
        self.left = self.kernel - 1 if cfg.embedding_conv_causal else (self.kernel - 1) // 2
        self.weight = nn.Parameter(torch.empty(width, width // self.groups, self.kernel))
        init_normal_(self.weight, cfg)

    def forward(self, x: torch.Tensor, seqs: Sequences) -> torch.Tensor:
        y = self.dense(x) if seqs.cu_seqlens is None else self.packed(x, seqs.cu_seqlens)
        return x + y if self.residual else y

    def dense(self, x: torch.Tensor) -> torch.Tensor:
        padded = pad(x.transpose(1, 2), (self.left, self.kernel - 1 - self.left))
        return conv1d(padded, self.weight, groups=self.groups).transpose(1, 2)

    def packed(self, x: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
        """One row with kernel - 1 zeros between the sequences: a tap beyond a border reads zeros."""
        T, gap = x.shape[1], self.kernel - 1
        place = torch.arange(T, device=x.device)
        sequence = torch.searchsorted(cu_seqlens, place.to(cu_seqlens.dtype), right=True) - 1
        spread = place + gap * sequence
        row = x.new_zeros(1, T + gap * (cu_seqlens.shape[0] - 1), x.shape[2]).index_copy(1, spread, x)
        return self.dense(row).index_select(1, spread)
