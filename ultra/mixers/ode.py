"""Attention as a derivative, integrated by Euler or RK4 (ODE Transformer, arXiv:2203.09176)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

from pydantic import Field
from torch import nn

from ultra.config.fields import ModelFields, Problem, attention_problems


class OdeFields(ModelFields):
    ode_solver: Literal["rk4", "euler"] = Field(
        "rk4", description="Classical fourth-order Runge-Kutta, or Euler."
    )
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


class Ode(nn.Module):
    Fields: ClassVar[type[ModelFields]] = OdeFields
    param_group: ClassVar[str] = "ode"
