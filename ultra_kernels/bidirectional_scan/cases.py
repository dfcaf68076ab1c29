"""Shapes, inputs, bytes and flops of the bidirectional scan, for tests and bench."""

from __future__ import annotations

import torch

from .._testing import Case, Inputs
from ..selective_scan.cases import scan_case, scan_inputs


def _case(
    name: str,
    batch: int,
    channels: int,
    length: int,
    states: int,
    *,
    shift: bool = True,
    rows: bool = False,
    bare: bool = False,
    cu: tuple[int, ...] | None = None,
    bench: bool = False,
) -> Case:
    def make(g: torch.Generator) -> Inputs:
        inputs = scan_inputs(g, batch, channels, length, states, directions=(2,), rows=rows, bare=bare, cu=cu)
        return inputs | {"shift": shift}

    return scan_case(name, make, batch, channels, length, states, directions=2, bench=bench)


CASES = [
    _case("1x1x2-N1", 1, 1, 2, 1),
    _case("T1-D7-N16", 2, 7, 1, 16),
    _case("T63-D17-N16", 1, 17, 63, 16),
    _case("rows-T113-D40-N17", 1, 40, 113, 17, rows=True),
    _case("sum-T65-D16-N3", 2, 16, 65, 3, shift=False),
    _case("bare-T130-D33-N4", 1, 33, 130, 4, bare=True),
    _case("ragged-T150-D19-N8", 1, 19, 150, 8, rows=True, cu=(0, 1, 1, 66, 79, 150, 150)),
    _case("ragged-sum-T97-D9-N2", 1, 9, 97, 2, cu=(0, 0, 3, 96, 97), shift=False),
    _case("standard-T512-D1536-N16", 1, 1536, 512, 16, rows=True, bench=True),
]
