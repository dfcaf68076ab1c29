"""Shapes, inputs, bytes and flops of the short convolution, for tests and bench."""

from __future__ import annotations

import torch

from .._testing import Case, Inputs


def _case(
    name: str,
    batch: int,
    channels: int,
    length: int,
    width: int,
    *,
    activation: str | None = "silu",
    direction: str = "forward",
    bias: bool = True,
    rows: bool = False,
    cu: tuple[int, ...] | None = None,
    bench: bool = False,
) -> Case:
    def make(g: torch.Generator) -> Inputs:
        x = torch.randn(batch, length, channels, generator=g, dtype=torch.float64).transpose(1, 2)
        inputs: Inputs = {
            "x": x if rows else x.contiguous(),
            "weight": torch.randn(channels, width, generator=g, dtype=torch.float64),
            "activation": activation,
            "direction": direction,
        }
        if bias:
            inputs["bias"] = torch.randn(channels, generator=g, dtype=torch.float64)
        if cu is not None:
            inputs["cu_seqlens"] = torch.tensor(cu, dtype=torch.int32)
        return inputs

    return Case(
        name=name,
        make=make,
        small=("weight", "bias"),
        reduction=width + batch * length,  # dweight and dbias sum over batch and time
        elements=2 * batch * channels * length,
        flops=(2 * width + 4) * batch * channels * length,
        bench=bench,
    )


CASES = [
    _case("1x1x1-W2", 1, 1, 1, 2),
    _case("T1-D7-W8", 2, 7, 1, 8, direction="centred"),
    _case("T63-D17-W4", 1, 17, 63, 4),
    _case("rows-T113-D40-W5-centred", 1, 40, 113, 5, rows=True, direction="centred"),
    _case("rows-T65-D16-W3-backward", 2, 16, 65, 3, rows=True, direction="backward", bias=False),
    _case("even-centred-T40-D24-W6", 2, 24, 40, 6, direction="centred", activation=None),
    _case("W7-T70-D33-plain", 1, 33, 70, 7, rows=True, activation=None, bias=False),
    _case("ragged-T150-D19-W4", 1, 19, 150, 4, rows=True, cu=(0, 1, 1, 66, 79, 150, 150)),
    _case("ragged-T97-D9-W5-centred", 1, 9, 97, 5, cu=(0, 0, 3, 96, 97), direction="centred"),
    _case("ragged-T97-D9-W8-backward", 1, 9, 97, 8, cu=(0, 2, 4, 5, 97), direction="backward"),
    _case("standard-T512-D1536-W4", 1, 1536, 512, 4, rows=True, bench=True),
]
