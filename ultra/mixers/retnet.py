"""Multi-scale retention (RetNet, arXiv:2307.08621)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from pydantic import Field
from torch import nn

from ultra.config.fields import ModelFields, Problem, head_problems


class RetNetFields(ModelFields):
    retention_heads: int = Field(
        12, ge=1, description="Heads of retnet, each with its own decay; divides hidden_size."
    )
    retention_bidirectional: bool = Field(True, description="Decay by |t-s|; false: causal, as in the paper.")
    retention_window: tuple[float, float] = Field(
        (4.0, 512.0), description="Memory of the fastest and of the slowest head in tokens: gamma = 1 - 1/window."
    )
    retention_rotary: bool = Field(True, description="Rotate queries and keys by position.")
    retention_value_factor: int = Field(1, ge=1, le=4, description="Value width over hidden_size.")
    retention_chunk: int = Field(64, ge=1, description="Chunk length of the chunkwise form.")

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


class RetNet(nn.Module):
    Fields: ClassVar[type[ModelFields]] = RetNetFields
    param_group: ClassVar[str] = "retnet"
