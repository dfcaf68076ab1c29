"""Shapes, inputs, bytes and flops of Derf, for tests and bench."""

from __future__ import annotations

import torch

from .._testing import Case, Inputs


def _inputs(*shape: int, transposed: bool = False, residual: bool = False, spread: float = 2.0):  # type: ignore[no-untyped-def]
    def make(g: torch.Generator) -> Inputs:
        D, share = shape[-1], 0.5**0.5 if residual else 1.0  # the sum of two has the same spread

        def draw() -> torch.Tensor:
            x = torch.randn(*shape, generator=g, dtype=torch.float64) * (spread * share)
            return x.transpose(0, 1).contiguous().transpose(0, 1) if transposed else x  # the same through other strides

        x = draw()
        return {
            "x": x,
            "alpha": torch.tensor([0.6], dtype=torch.float64),
            "shift": torch.tensor([-0.2], dtype=torch.float64),
            "weight": 1 + 0.3 * torch.randn(D, generator=g, dtype=torch.float64),
            "bias": 0.3 * torch.randn(D, generator=g, dtype=torch.float64),
        } | ({"residual": draw()} if residual else {})

    return make


def _case(
    name: str,
    *shape: int,
    transposed: bool = False,
    residual: bool = False,
    spread: float = 2.0,
    bench: bool = False,
) -> Case:
    rows, D = int(torch.Size(shape[:-1]).numel()), shape[-1]
    return Case(
        name=name,
        make=_inputs(*shape, transposed=transposed, residual=residual, spread=spread),
        small=("alpha", "shift", "weight", "bias"),
        reduction=rows * D,  # dalpha and dshift sum over everything
        elements=(4 if residual else 2) * rows * D,
        flops=20 * rows * D,
        # each term is cotangent · weight · slope (· x): of size 1/2 where |x| is up to 2, nothing beyond
        scales=dict.fromkeys(("dalpha", "dshift"), 0.5 * (rows * D / max(1.0, spread / 2)) ** 0.5),
        through_half=("dalpha", "dshift", "dweight") if residual else (),  # the sum x + residual
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
    _case("residual-rows1-D1", 1, 1, residual=True, spread=0.3),
    _case("residual-T65-D64", 65, 64, residual=True),
    _case("residual-strided-B5-T7-D63", 5, 7, 63, transposed=True, residual=True),
    _case("residual-T33-D1024", 33, 1024, residual=True),
    _case("standard-T4096-D768", 4096, 768, bench=True),
    _case("standard-residual-T4096-D768", 4096, 768, residual=True, bench=True),
]
