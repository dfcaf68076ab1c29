"""Masked-language-model head: transform, then the (tied) vocabulary projection."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import nn
from torch.nn.functional import gelu

from ultra.config.fields import ModelFields
from ultra.layers.linear import BitLinear, init_normal_
from ultra.layers.module import Component
from ultra.model.embedding import Embedding
from ultra.norms import NORMS
from ultra_kernels import masked_linear_cross_entropy
from ultra_kernels._products import linear
from ultra_kernels.nn import Linear


class HeadFields(ModelFields):
    tie_embeddings: bool = Field(True, description="The vocabulary projection is the token table.")
    head_bias: bool = Field(True, description="Bias per vocabulary entry.")
    mlm_head: Literal["dense", "none"] = Field("dense", description="Dense, GELU, norm before the projection, or none.")
    bitnet_head: bool = Field(False, description="With use_bitnet, also the head's dense layer is a BitLinear.")


class MLMHead(Component):
    """logits = norm(gelu(W h)) Eᵀ + b, E the token table (through the embedding's projection when factorised)."""

    Fields: ClassVar[type[ModelFields]] = HeadFields
    param_group: ClassVar[str] = "other"
    no_galore: ClassVar[frozenset[str]] = frozenset({"decoder", "dense.weight"})

    def __init__(self, cfg: HeadFields, embedding: Embedding) -> None:
        super().__init__()
        D = cfg.hidden_size
        self.dense: nn.Module | None = None
        self.norm: nn.Module | None = None
        if cfg.mlm_head == "dense":
            quantised = cfg.use_bitnet and cfg.bitnet_head
            self.dense = BitLinear(cfg, D, D, norm=True) if quantised else Linear(D, D, bias=False)
            init_normal_(self.dense.weight, cfg)
            self.norm = NORMS[cfg.norm_type](cfg, D, site="head")
        self.bias = nn.Parameter(torch.zeros(cfg.vocab_size)) if cfg.head_bias else None
        self.decoder = None
        if not cfg.tie_embeddings:
            self.decoder = nn.Parameter(torch.empty(cfg.vocab_size, D))
            init_normal_(self.decoder, cfg)
        # in a tuple, so that the shared parameters are registered (and saved) once, by the embedding
        self._embedding = (embedding,)

    def transform(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden rows `[M,D]` -> rows that multiply the vocabulary matrix."""
        if self.dense is not None and self.norm is not None:
            hidden = self.norm(gelu(self.dense(hidden)))
        projection = self._embedding[0].projection
        return hidden if self.decoder is not None or projection is None else linear(hidden, projection.weight.t())

    @property
    def vocabulary(self) -> torch.Tensor:
        """`[V, width]`: the tied table, or the head's own matrix."""
        return self._embedding[0].table.weight if self.decoder is None else self.decoder

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return linear(self.transform(hidden), self.vocabulary, self.bias)

    def loss(self, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Summed cross-entropy of hidden rows `[...,D]` against labels `[...]`, -100 = none."""
        if not torch.compiler.is_compiling():  # how many are labelled is data: a compiled graph transforms every row
            labelled = labels != -100
            hidden, labels = hidden[labelled], labels[labelled]
        return masked_linear_cross_entropy(self.transform(hidden), self.vocabulary, labels, self.bias, reduction="sum")
