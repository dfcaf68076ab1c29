"""Bidirectional selective scan (Mamba, arXiv:2312.00752; quasi-separable as in Hydra, arXiv:2407.09941)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, PositiveInt
from torch import nn
from torch.nn.functional import rms_norm

from ultra.config.fields import ModelFields, Problem
from ultra.layers.linear import init_normal_, make_linear
from ultra.layers.module import Mixer, wide
from ultra.layers.sequences import Sequences
from ultra_kernels import bidirectional_scan, causal_conv1d, selective_scan
from ultra_kernels._products import linear


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
    mamba_bc_norm: bool = Field(
        True, description="RMS norm of B and of C over the states (Jamba, Falcon-Mamba); needs 2 states or more."
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


class Mamba(Mixer):
    """W_o scan(silu(conv(W_x u)), Δ, A, B, C) · silu(W_z u); Δ, B, C depend on the token, for each direction its own.

    Both directions share projections, convolution, skip D and gate. A = -exp(A_log), Δ = softplus(W_dt dt + b).
    The scan's part of y is a product of three small numbers, B, C and Δ: at width 64 it starts 1e-4 times as large as
    D u, and nothing draws it out in a short run. So B and C are normalised (arXiv:2403.19887).
    """

    Fields: ClassVar[type[ModelFields]] = MambaFields
    param_group: ClassVar[str] = "mamba"
    no_decay: ClassVar[frozenset[str]] = frozenset({"A_log", "D", "dt_bias"})
    no_galore: ClassVar[frozenset[str]] = frozenset({"conv_weight", "dt_weight", "A_log", "x_proj.weight"})

    def __init__(self, cfg: MambaFields) -> None:
        super().__init__(cfg)
        self.E = cfg.mamba_expand * cfg.hidden_size
        self.N, self.R = cfg.mamba_d_state, cfg.dt_rank
        self.mode = cfg.mamba_bidirectional
        self.bc_norm, self.eps = cfg.mamba_bc_norm and self.N > 1, cfg.rms_norm_eps
        self.directions = 1 if self.mode == "none" else 2
        self.in_proj = make_linear(cfg, cfg.hidden_size, 2 * self.E)
        self.conv_weight = nn.Parameter(torch.empty(self.E, cfg.d_conv))
        self.conv_bias = nn.Parameter(torch.zeros(self.E))
        self.x_proj = nn.Linear(self.E, self.directions * (self.R + 2 * self.N), bias=False)
        self.dt_weight = nn.Parameter(torch.empty(self.directions, self.E, self.R))
        self.dt_bias = nn.Parameter(torch.empty(self.directions, self.E))
        A = torch.arange(1.0, self.N + 1).log()
        self.A_log = nn.Parameter(A.expand(self.directions, self.E, self.N).clone())
        self.D = nn.Parameter(torch.ones(self.E))
        self.out_proj = make_linear(cfg, self.E, cfg.hidden_size, sub_norm=True, residual_out=True)
        init_normal_(self.x_proj.weight, cfg)
        nn.init.uniform_(self.conv_weight, -(cfg.d_conv**-0.5), cfg.d_conv**-0.5)
        nn.init.uniform_(self.dt_weight, -(self.R**-0.5), self.R**-0.5)
        with torch.no_grad():
            # softplus(dt_bias) is log-uniform in [1e-3, 1e-1], the time scales of the paper
            dt = torch.empty_like(self.dt_bias).uniform_(math.log(1e-3), math.log(1e-1)).exp()
            self.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))

    def forward(self, x: torch.Tensor, seqs: Sequences) -> torch.Tensor:
        B, T, _ = x.shape
        u, z = self.in_proj(x).transpose(1, 2).chunk(2, 1)  # [B,E,T], read through strides
        u = causal_conv1d(
            u, self.conv_weight, self.conv_bias, activation="silu", cu_seqlens=seqs.cu_seqlens,
            direction="forward" if self.mode == "none" else "centred",
        )  # fmt: skip
        # Δ multiplies ln-spaced decays over the whole sequence: bfloat16 would change the memory length
        with torch.autocast(x.device.type, enabled=False):
            rows = wide(u.transpose(1, 2))  # [B,T,E]
            parts = linear(rows, wide(self.x_proj.weight)).view(B, T, self.directions, -1).permute(2, 0, 1, 3)
            dt, b, c = parts.split([self.R, self.N, self.N], -1)  # [directions,B,T,.]
            delta = (dt @ self.dt_weight.transpose(1, 2)[:, None]).transpose(2, 3)  # [directions,B,E,T]
            if self.bc_norm:
                b, c = (rms_norm(t, (self.N,), eps=self.eps) for t in (b, c))
            b, c = b.transpose(2, 3), c.transpose(2, 3)  # [directions,B,N,T]
            A, u, z = -wide(self.A_log).exp(), wide(u), wide(z)
            if self.mode == "none":
                y = selective_scan(
                    u, delta[0], A[0], b[0], c[0], self.D, z, self.dt_bias[0], True, cu_seqlens=seqs.cu_seqlens
                )
                assert isinstance(y, torch.Tensor)  # no last state was asked for
            else:
                y = bidirectional_scan(
                    u, delta, A, b, c, self.D, z, self.dt_bias, True,
                    shift=self.mode == "quasi", cu_seqlens=seqs.cu_seqlens,
                )  # fmt: skip
        return self.out_proj(y.transpose(1, 2).to(x.dtype))
