"""Shapes, inputs, bytes and flops of Derf, for tests and bench."""

from __future__ import annotations

import torch

from .._testing import Case, Inputs


def _inputs(*shape: int, transposed: bool = False, spread: float = 2.0):  # type: ignore[no-untyped-def]
    def make(g: torch.Generator) -> Inputs:
        x = torch.randn(*shape, generator=g, dtype=torch.float64) * spread
        D = shape[-1]
        if transposed:  # the same values read through other strides
            x = x.transpose(0, 1).contiguous().transpose(0, 1)
        return {
            "x": x,
            "alpha": torch.tensor([0.6], dtype=torch.float64),
            "shift": torch.tensor([-0.2], dtype=torch.float64),
            "weight": 1 + 0.3 * torch.randn(D, generator=g, dtype=torch.float64),
            "bias": 0.3 * torch.randn(D, generator=g, dtype=torch.float64),
        }

    return make


def _case(name: str, *shape: int, transposed: bool = False, spread: float = 2.0, bench: bool = False) -> Case:
    rows, D = int(torch.Size(shape[:-1]).numel()), shape[-1]
    return Case(
        name=name,
        make=_inputs(*shape, transposed=transposed, spread=spread),
        small=("alpha", "shift", "weight", "bias"),
        reduction=rows * D,  # dalpha and dshift sum over everything
        elements=2 * rows * D,
        flops=20 * rows * D,
        # each term is cotangent · weight · slope (· x): of size 1/2 where |x| is up to 2, nothing beyond
        scales=dict.fromkeys(("dalpha", "dshift"), 0.5 * (rows * D / max(1.0, spread / 2)) ** 0.5),
        bench=bench,
    )


CASES = [
    _case("1x1", 1, 1, spread=0.3),
    _case("rows1-D63", 1, 63),
    _case("B3-T7-D113", 3, 7, 113),
    _case("strided-B4-T5-D40", 4, 5, 40, transposed=True),
    _case("large-values-D17", 130, 17, spread=30.0),
    _case("mini-T512-D384", 512, 384),
    _case("frankenstein-T64-D1024", 64, 1024),
    _case("standard-T4096-D768", 4096, 768, bench=True),
]
