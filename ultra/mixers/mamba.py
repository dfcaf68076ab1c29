"""Bidirectional selective scan (Mamba, arXiv:2312.00752; quasi-separable as in Hydra, arXiv:2407.09941)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

from pydantic import Field, PositiveInt
from torch import nn

from ultra.config.fields import ModelFields, Problem


class MambaFields(ModelFields):
    mamba_d_state: int = Field(16, ge=1, le=256, description="State size N per channel.")
    mamba_d_conv: Annotated[int, Field(ge=2, le=8)] | Literal["auto"] = Field(
        "auto", description="Width of the depthwise convolution; auto: 5 centred, 4 when causal."
    )
    mamba_expand: int = Field(2, ge=1, le=8, description="Inner width over hidden_size.")
    mamba_dt_rank: PositiveInt | Literal["auto"] = Field(
        "auto", description="Rank of dt; auto: ceil(hidden_size / 16)."
    )
    mamba_bidirectional: Literal["quasi", "add", "none"] = Field(
        "quasi",
        description="How the two scan directions join: quasi-separable, sum, or one causal direction.",
    )

    @property
    def d_conv(self) -> int:
        if self.mamba_d_conv == "auto":
            return 4 if self.mamba_bidirectional == "none" else 5
        return self.mamba_d_conv

    @property
    def dt_rank(self) -> int:
        return -(-self.hidden_size // 16) if self.mamba_dt_rank == "auto" else self.mamba_dt_rank

    def problems(self) -> Iterator[Problem]:
        if self.mamba_bidirectional != "none" and self.d_conv % 2 == 0:
            yield (
                "mamba_d_conv",
                f"{self.d_conv} is even, but a centred convolution needs an odd width: "
                f"{self.d_conv - 1} or {self.d_conv + 1}, or mamba_bidirectional: none",
            )


class Mamba(nn.Module):
    Fields: ClassVar[type[ModelFields]] = MambaFields
    param_group: ClassVar[str] = "mamba"
