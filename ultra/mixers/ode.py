"""Attention as a derivative, integrated by Euler or RK4 (ODE Transformer, arXiv:2203.09176)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import nn
from torch.utils.checkpoint import checkpoint

from ultra.config.fields import ModelFields, Problem, attention_problems
from ultra.layers.attention import SelfAttention
from ultra.layers.module import Mixer
from ultra.layers.sequences import Sequences
from ultra.norms import NORMS


class OdeFields(ModelFields):
    ode_solver: Literal["rk4", "euler"] = Field("rk4", description="Classical fourth-order Runge-Kutta, or Euler.")
    ode_steps: int = Field(2, ge=1, description="Steps from t = 0 to t = 1.")
    ode_checkpoint: Literal["step", "none"] = Field(
        "step",
        description="Recompute each solver step in the backward pass (step), or keep everything (none).",
    )
    ode_time: Literal["none", "additive"] = Field(
        "none", description="Time conditioning of f: none, or z + t * e with a learned e, zero at first."
    )

    def problems(self) -> Iterator[Problem]:
        yield from attention_problems(self, "ode")


class Ode(Mixer):
    """z(1) - z(0) of dz/dt = f(z, t), z(0) = x, f(z, t) = W_o Attn(norm(z + t·e)).

    The block's residual addition then gives z(1). There is no dropout inside f: a mask drawn anew at every stage makes
    f a random field, and the solver's order is lost.
    """

    Fields: ClassVar[type[ModelFields]] = OdeFields
    param_group: ClassVar[str] = "ode"
    prenorm: ClassVar[bool] = False
    no_decay: ClassVar[frozenset[str]] = frozenset({"time"})

    def __init__(self, cfg: OdeFields) -> None:
        super().__init__(cfg)
        self.norm = NORMS[cfg.norm_type](cfg, cfg.hidden_size, site="mixer")
        self.attention = SelfAttention(cfg, rotary=cfg.position_encoding != "none", qk_norm=cfg.qk_norm is True)
        self.time = nn.Parameter(torch.zeros(cfg.hidden_size)) if cfg.ode_time == "additive" else None
        self.steps, self.solver = cfg.ode_steps, cfg.ode_solver
        self.checkpoint = cfg.ode_checkpoint == "step"

    def f(self, z: torch.Tensor, t: float, seqs: Sequences) -> torch.Tensor:
        # in z's dtype: under autocast attention answers in half precision, which would round each stage of z
        return self.attention(self.norm(z if self.time is None else z + t * self.time), seqs).to(z.dtype)

    def step(self, x: torch.Tensor, increment: torch.Tensor, i: int, seqs: Sequences) -> torch.Tensor:
        """The increment at t = (i+1)/steps from the one at t = i/steps."""
        h, t, z = 1 / self.steps, i / self.steps, x + increment
        k1 = self.f(z, t, seqs)
        if self.solver == "euler":
            return increment + h * k1
        k2 = self.f(z + h / 2 * k1, t + h / 2, seqs)
        k3 = self.f(z + h / 2 * k2, t + h / 2, seqs)
        k4 = self.f(z + h * k3, t + h, seqs)
        return increment + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)

    def forward(self, x: torch.Tensor, seqs: Sequences) -> torch.Tensor:
        increment = torch.zeros_like(x)
        for i in range(self.steps):
            if self.checkpoint and torch.is_grad_enabled():
                # f draws no random numbers, so there is no generator state to keep
                increment = checkpoint(self.step, x, increment, i, seqs, use_reentrant=False, preserve_rng_state=False)
            else:
                increment = self.step(x, increment, i, seqs)
        return increment
