"""Attention as a derivative, integrated by Euler or RK4 (ODE Transformer, arXiv:2203.09176)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from ultra.config.fields import ModelFields, Problem, attention_problems
from ultra.layers.attention import SelfAttention, recomputed_heads
from ultra.layers.module import AutocastState, Mixer
from ultra.layers.sequences import Sequences
from ultra.norms import NORMS


class OdeFields(ModelFields):
    ode_solver: Literal["rk4", "euler"] = Field("rk4", description="Classical fourth-order Runge-Kutta, or Euler.")
    ode_steps: int = Field(2, ge=1, description="Steps from t = 0 to t = 1.")
    ode_checkpoint: Literal["step", "none"] = Field(
        "step",
        description="The backward recomputes and keeps one state per solver step (step), or keeps everything (none).",
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

    def f(self, z: torch.Tensor, t: float, seqs: Sequences, keep: bool = False) -> torch.Tensor:
        """keep: the backward keeps the stage's queries, keys and values instead of computing them again."""
        if self.checkpoint and not keep and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            o = recomputed_heads(self.attention, lambda z: self.inside(z, t), z, seqs, self._before_attention())
        else:
            o = self.attention.heads(self.inside(z, t), seqs)
        # in z's dtype: under autocast attention answers in half precision, which would round each stage of z
        return self.attention.out(o).to(z.dtype)

    def inside(self, z: torch.Tensor, t: float) -> torch.Tensor:
        """What attention sees of z at time t."""
        return self.norm(z if self.time is None else z + t * self.time)

    def _before_attention(self) -> list[nn.Parameter]:
        after = set(self.attention.out.parameters())
        return [p for p in self.parameters() if p.requires_grad and p not in after]

    def step(self, z: torch.Tensor, i: int, seqs: Sequences) -> torch.Tensor:
        """What z gains from t = i/steps to t = (i+1)/steps."""
        h, t = 1 / self.steps, i / self.steps
        if self.solver == "euler":
            return h * self.f(z, t, seqs, keep=True)
        k1 = self.f(z, t, seqs)
        k2 = self.f(z + h / 2 * k1, t + h / 2, seqs)
        k3 = self.f(z + h / 2 * k2, t + h / 2, seqs)
        k4 = self.f(z + h * k3, t + h, seqs, keep=True)  # its backward comes first: nothing else is alive by then
        return h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)

    def forward(self, x: torch.Tensor, seqs: Sequences) -> torch.Tensor:
        recompute = self.checkpoint and torch.is_grad_enabled()
        if recompute and not torch.compiler.is_compiling():
            trained = [p for p in self.parameters() if p.requires_grad]
            solved: torch.Tensor = _Solve.apply(self, seqs, x, *trained)  # type: ignore[no-untyped-call]
            return solved
        increment = torch.zeros_like(x)
        for i in range(self.steps):
            z = x + increment
            if recompute:  # f draws no random numbers, so there is no generator state to keep
                gain = checkpoint(self.step, z, i, seqs, use_reentrant=False, preserve_rng_state=False)
            else:
                gain = self.step(z, i, seqs)
            increment = increment + gain
        return increment


class _Solve(torch.autograd.Function):
    """All steps of an Ode; the increment before each step is kept, and the backward computes one step at a time again.

    Within that step in turn, each stage but the last keeps its z and what attention answered (recomputed_heads). A
    torch.utils.checkpoint within another one would free nothing, and torch.compile needs it around the steps.
    """

    @staticmethod
    def forward(ctx: Any, ode: Ode, seqs: Sequences, x: torch.Tensor, *trained: torch.Tensor) -> torch.Tensor:
        increments: list[torch.Tensor] = []
        for i in range(ode.steps):
            gain = ode.step(x + increments[-1] if increments else x, i, seqs)
            increments.append(increments[-1] + gain if increments else gain)
        ctx.ode, ctx.seqs, ctx.trained, ctx.autocast = ode, seqs, trained, AutocastState(x)
        ctx.save_for_backward(x, *increments[:-1])
        return increments[-1]

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        x, *increments = ctx.saved_tensors
        dx, dtrained = torch.zeros_like(x), [torch.zeros_like(p) for p in ctx.trained]
        for i in reversed(range(ctx.ode.steps)):
            z = (x + increments[i - 1] if i else x.detach()).requires_grad_()
            with torch.enable_grad(), ctx.autocast.again():
                gain = ctx.ode.step(z, i, ctx.seqs)
            dz, *parts = torch.autograd.grad(gain, (z, *ctx.trained), grad, allow_unused=True)
            del gain, z
            dx += dz
            grad = grad + dz
            for total, part in zip(dtrained, parts, strict=True):
                if part is not None:
                    total += part
        return None, None, dx, *dtrained
