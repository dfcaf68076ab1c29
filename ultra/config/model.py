"""UltraConfig: the `model` section, composed of the fields that each component declares beside its module."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, TypeAlias

from pydantic import Field, create_model

from ultra.config.fields import ModelFields
from ultra.ffn import FFNS
from ultra.mixers import MIXERS
from ultra.model.embedding import EmbeddingFields
from ultra.model.encoder import EncoderFields
from ultra.model.head import HeadFields
from ultra.norms import NORMS

if TYPE_CHECKING:  # a type checker cannot read the dicts
    MixerName: TypeAlias = str
    NormName: TypeAlias = str
    BlockFields = ModelFields
else:
    MixerName = Literal[tuple(MIXERS)]
    NormName = Literal[tuple(NORMS)]
    blocks = [*MIXERS.values(), *NORMS.values(), *FFNS.values()]
    # Python's field order runs from the last base to the first.
    BlockFields = create_model("BlockFields", __base__=tuple(block.Fields for block in reversed(blocks)))


class UltraConfig(EncoderFields, HeadFields, EmbeddingFields, BlockFields):
    """Architecture of the encoder. It is a RetNetFields, a MambaFields ...: each component takes it whole."""

    layer_pattern: tuple[MixerName, ...] = Field(
        ("standard_attn",),
        min_length=1,
        description="Mixers of the layers, repeated cyclically over num_layers.",
    )
    norm_type: NormName = Field("layer_norm", description="Normalisation before each mixer, FFN and the head.")
