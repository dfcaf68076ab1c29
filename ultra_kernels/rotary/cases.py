"""Shapes, inputs, bytes and flops of rotary, for tests and bench."""

from __future__ import annotations

import torch

from .._testing import Case, Inputs


def _case(
    name: str, B: int, T: int, H: int, K: int, *, positions: str = "first", layout: str = "", bench: bool = False
) -> Case:
    def make(g: torch.Generator) -> Inputs:
        x = torch.randn(B, T, H, K, generator=g, dtype=torch.float64)
        if layout == "heads":
            x = x.transpose(1, 2).contiguous().transpose(1, 2)
        if layout == "channels":  # the last axis has gaps
            x = x.transpose(1, 3).contiguous().transpose(1, 3)
        if layout == "projection":  # k, between q and v
            x = torch.randn(B, T, 3, H, K, generator=g, dtype=torch.float64)[:, :, 1]
        inputs: Inputs = {"x": x, "positions": torch.arange(T)}
        if positions == "packed":  # sequences start over
            inputs["positions"] = torch.cat([torch.arange(n) for n in (T // 3, 1, T - T // 3 - 1)])[None].int()
        if positions == "rows":  # of any order and sign, one line per batch row
            inputs["positions"] = torch.randint(-8192, 8192, (B, T), generator=g, dtype=torch.int32)
        if positions == "inv_freq":
            inputs["inv_freq"] = torch.rand(K // 2, generator=g, dtype=torch.float64)
        return inputs

    return Case(
        name=name,
        make=make,
        reduction=2,
        elements=2 * B * T * H * K,
        flops=3 * B * T * H * K,
        small=("inv_freq",),
        constant=("inv_freq",),
        bench=bench,
    )


CASES = [
    _case("T1", 1, 1, 1, 2),
    _case("T63-K6", 2, 63, 3, 6),
    _case("T113-rows", 3, 113, 2, 10, positions="rows"),
    _case("strided-inv-freq", 2, 5, 3, 8, positions="inv_freq", layout="heads"),
    _case("gaps-K20", 2, 7, 3, 20, layout="channels"),
    _case("projection-K60", 2, 9, 5, 60, layout="projection"),
    _case("packed-K128", 1, 37, 2, 128, positions="packed"),
    _case("K256", 1, 9, 1, 256, positions="inv_freq", layout="projection"),
    _case("standard-T2048", 1, 2048, 12, 64, bench=True),
    _case("standard-T2048-projection", 1, 2048, 12, 64, layout="projection", bench=True),
]
