"""Shapes, inputs, bytes and flops of sigmoid attention, for tests and bench."""

from __future__ import annotations

from itertools import pairwise

import torch

from .._testing import Case, Inputs


def _case(
    name: str,
    B: int,
    T: int,
    H: int,
    K: int,
    *,
    cu: tuple[int, ...] | None = None,
    bias: float | str | None = None,
    scale: float | None = None,
    normalize: bool = False,
    causal: bool = False,
    strided: bool = False,
    bench: bool = False,
) -> Case:
    def make(g: torch.Generator) -> Inputs:
        qkv = torch.randn(3, B, T, H, K, generator=g, dtype=torch.float64)
        if strided:  # q, k, v interleaved in one projection's rows
            qkv = qkv.permute(1, 2, 0, 3, 4).contiguous().permute(2, 0, 1, 3, 4)
        inputs: Inputs = {"q": qkv[0], "k": qkv[1], "v": qkv[2], "normalize": normalize, "causal": causal}
        if bias == "heads":
            inputs["bias"] = torch.randn(H, generator=g, dtype=torch.float64) - 2
        elif bias is not None:
            inputs["bias"] = bias
        if scale is not None:
            inputs["scale"] = scale
        if cu is not None:
            inputs["cu_seqlens"] = torch.tensor(cu, dtype=torch.int32)
        return inputs

    lengths = [T] * B if cu is None else [b - a for a, b in pairwise(cu)]
    return Case(
        name=name,
        make=make,
        reduction=max(lengths) * K * (B * T if bias == "heads" else 1),
        elements=B * T * H * 4 * K,
        flops=4 * H * sum(n * n for n in lengths) * K // (2 if causal else 1),
        small=("bias",),
        bench=bench,
    )


CASES = [
    _case("T1", 1, 1, 1, 1),
    _case("T63", 2, 63, 3, 5),
    _case("T17-K30", 1, 17, 1, 30),
    _case("T17-K30-normalize", 1, 17, 1, 30, normalize=True),
    _case("T17-K64-normalize", 1, 17, 1, 64, normalize=True),
    _case("T17-K100-causal", 1, 17, 1, 100, causal=True),
    _case("T17-K128-normalize", 1, 17, 1, 128, normalize=True),
    _case("T113-causal", 1, 113, 2, 16, causal=True),
    _case("T63-normalize", 2, 63, 2, 8, normalize=True),
    _case("T40-normalize-causal", 1, 40, 2, 8, normalize=True, causal=True),
    _case("T50-bias-scale", 2, 50, 2, 8, bias=-3.0, scale=0.5),
    _case("T50-bias-heads", 2, 50, 3, 8, bias="heads"),
    _case("strided", 2, 20, 3, 8, strided=True),
    _case("ragged", 1, 100, 3, 8, cu=(0, 40, 40, 41, 90, 100)),
    _case("ragged-bias-heads", 1, 70, 3, 8, cu=(0, 40, 40, 70), bias="heads"),
    _case("ragged-normalize-causal", 1, 60, 2, 8, cu=(0, 0, 25, 60, 60), normalize=True, causal=True),
    _case("equal-packed", 1, 48, 2, 8, cu=(0, 16, 32, 48)),
    _case("mini-16x128", 1, 2048, 6, 64, cu=tuple(range(0, 2049, 128)), bench=True),
    _case("standard-T512", 4, 512, 12, 64, bench=True),
    _case("standard-T2048", 1, 2048, 12, 64, bench=True),
]
