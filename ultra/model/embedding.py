"""Token embedding: table, optional factorisation (arXiv:1909.11942), optional convolution, optional scale."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field
from torch import nn

from ultra.config.fields import ModelFields


class EmbeddingFields(ModelFields):
    use_embedding_conv: bool = Field(False, description="Conv1d along the sequence on the table's output.")
    embedding_conv_kernel: int = Field(
        3, ge=1, le=1025, description="Kernel size of the embedding convolution."
    )
    embedding_conv_residual: bool = Field(True, description="Add the convolution to its input.")
    embedding_conv_depthwise: bool = Field(False, description="One filter per channel.")
    embedding_conv_causal: bool = Field(False, description="Look at earlier tokens only.")
    embedding_scale: bool | Literal["auto"] = Field(
        "auto",
        description="Learned scalar on the embedding, sqrt(hidden_size) at first; auto: with pointwise norms.",
    )


class Embedding(nn.Module):
    Fields: ClassVar[type[ModelFields]] = EmbeddingFields
    param_group: ClassVar[str] = "embeddings"
