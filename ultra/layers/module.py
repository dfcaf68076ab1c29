"""What a component declares about itself: its YAML fields, its optimizer group, its exceptions."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

if TYPE_CHECKING:
    from ultra.config.fields import ModelFields
    from ultra.layers.sequences import Sequences

GROUPS = ("embeddings", "norms", "ode", "retnet", "mamba", "attention", "other")


def wide(x: torch.Tensor) -> torch.Tensor:
    """x in float32, or in float64 if it is that: for what half precision would ruin."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class AutocastState:
    """Whether and how autocast is on for x's device now, to compute the same again in a backward pass."""

    def __init__(self, x: torch.Tensor) -> None:
        self._kind = x.device.type
        if self._kind != "meta":
            self._enabled = torch.is_autocast_enabled(self._kind)
            self._dtype = torch.get_autocast_dtype(self._kind)

    def again(self) -> contextlib.AbstractContextManager[Any]:
        if self._kind == "meta":
            return contextlib.nullcontext()
        return torch.autocast(self._kind, self._dtype, self._enabled)


class Component(nn.Module):
    """A module with its own YAML fields.

    param_group: optimizer group of its parameters; None: that of the module around it.
    no_decay: names of its own parameters that are never decayed (biases never are, wherever they stand).
    no_galore: names of its own or its children's parameters whose updates are never projected.
    """

    Fields: ClassVar[type[ModelFields]]
    param_group: ClassVar[str | None] = None
    no_decay: ClassVar[frozenset[str]] = frozenset()
    no_galore: ClassVar[frozenset[str]] = frozenset()


class Mixer(Component):
    """Mixes tokens: x `[B,T,D]` -> increment `[B,T,D]`; the block adds it to the residual stream.

    prenorm: whether the block normalises x first. A mixer that normalises inside says False and gets x itself.
    """

    prenorm: ClassVar[bool] = True

    def __init__(self, cfg: ModelFields) -> None:
        super().__init__()

    def forward(self, x: torch.Tensor, seqs: Sequences) -> torch.Tensor:
        raise TypeError(f"{type(self).__name__} does not define forward")
