"""The encoder: embedding, looped stack of blocks, final norm, head."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field
from torch import nn

from ultra.config.fields import ModelFields


class EncoderFields(ModelFields):
    loop_embedding: bool = Field(
        True, description="A learned vector per loop, zero at first; needs num_loops > 1."
    )
    loop_injection: Literal["gated", "none"] = Field(
        "gated", description="Feed the embedding into every further loop through a gate, zero at first."
    )
    layerscale_init: float | None = Field(
        None,
        gt=0,
        description="Initial value of a learned scale per channel on each block's output; null: no scale.",
    )
    bitnet_two_stage: bool = Field(
        False, description="With use_bitnet, weight decay 0 and half the rates in the second half."
    )
    gradient_checkpointing: bool = Field(
        False, description="Recompute each layer in the backward pass: less memory."
    )


class Encoder(nn.Module):
    Fields: ClassVar[type[ModelFields]] = EncoderFields
