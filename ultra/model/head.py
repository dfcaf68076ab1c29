"""Masked-language-model head: transform, then the (tied) vocabulary projection."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field
from torch import nn

from ultra.config.fields import ModelFields


class HeadFields(ModelFields):
    tie_embeddings: bool = Field(True, description="The vocabulary projection is the token table.")
    head_bias: bool = Field(True, description="Bias per vocabulary entry.")
    mlm_head: Literal["dense", "none"] = Field(
        "dense", description="Dense, GELU, norm before the projection, or none."
    )
    bitnet_head: bool = Field(
        False, description="With use_bitnet, also the head's dense layer is a BitLinear."
    )


class MLMHead(nn.Module):
    Fields: ClassVar[type[ModelFields]] = HeadFields
    param_group: ClassVar[str] = "other"
