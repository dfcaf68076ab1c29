"""Shapes, inputs, bytes and flops of layer normalisation, for tests and bench."""

from __future__ import annotations

import torch

from .._testing import Case, Inputs


def _case(
    name: str,
    *shape: int,
    transposed: bool = False,
    residual: bool = False,
    offset: float = 0.5,
    bench: bool = False,
) -> Case:
    rows, D = int(torch.Size(shape[:-1]).numel()), shape[-1]

    def make(g: torch.Generator) -> Inputs:
        def draw() -> torch.Tensor:
            x = 2 * torch.randn(*shape, generator=g, dtype=torch.float64) + offset
            return x.transpose(0, 1).contiguous().transpose(0, 1) if transposed else x  # the same through other strides

        return {
            "x": draw(),
            "weight": 1 + 0.3 * torch.randn(D, generator=g, dtype=torch.float64),
            "bias": 0.3 * torch.randn(D, generator=g, dtype=torch.float64),
        } | ({"residual": draw()} if residual else {})

    return Case(
        name=name,
        make=make,
        small=("weight", "bias"),
        through_half=("dweight",) if residual else (),  # the sum x + residual
        reduction=max(rows, D),
        elements=(4 if residual else 2) * rows * D,
        flops=8 * rows * D,
        bench=bench,
    )


CASES = [
    _case("rows1-D3", 1, 3),
    _case("rows0-D8", 0, 8),
    _case("rows1-D63", 1, 63),
    _case("B3-T7-D113", 3, 7, 113),
    _case("residual-T63-D64", 63, 64, residual=True),
    _case("residual-T70-D63", 70, 63, residual=True),
    _case("strided-B4-T5-D40", 4, 5, 40, transposed=True),
    _case("residual-strided-B4-T5-D40", 4, 5, 40, transposed=True, residual=True),
    _case("T130-D192", 130, 192),
    _case("T512-D384", 512, 384),
    # by the widths of Triton's tiles, and D divisible by 16 or not
    *(
        _case(f"{'residual-' if residual else ''}T3-D{D}", 3, D, residual=residual)
        for D in (768, 1000, 1100, 2048, 8200, 8208)
        for residual in (False, True)
    ),
    _case("standard-T4096-D768", 4096, 768, bench=True),
    _case("standard-residual-T4096-D768", 4096, 768, residual=True, bench=True),
]
