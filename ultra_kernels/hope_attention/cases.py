"""Shapes, inputs, bytes and flops of HoPE attention, for tests and bench."""

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
    damping: float | str = 0.01,
    mode: str = "per_pair",
    causal: bool = False,
    rotary_heads: int = 0,
    prefix: int = 0,
    base: float = 10000.0,
    scale: float | None = None,
    strided: bool = False,
    bench: bool = False,
) -> Case:
    def make(g: torch.Generator) -> Inputs:
        def randn(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=g, dtype=torch.float64)

        qkv = randn(3, B, T, H, K)
        if strided:  # q, k, v interleaved in one projection's rows
            qkv = qkv.permute(1, 2, 0, 3, 4).contiguous().permute(2, 0, 1, 3, 4)
        inputs: Inputs = {
            "q": qkv[0], "k": qkv[1], "v": qkv[2], "base": base, "mode": mode, "causal": causal,
            "damping": torch.tensor(0.05, dtype=torch.float64) if damping == "learned" else damping,
            "scale": scale, "rotary_heads": rotary_heads,
        }  # fmt: skip
        if prefix:
            inputs |= {"prefix_k": randn(prefix, H, K), "prefix_v": randn(prefix, H, K)}
        if cu is not None:
            inputs["cu_seqlens"] = torch.tensor(cu, dtype=torch.int32)
        return inputs

    lengths = [T] * B if cu is None else [b - a for a, b in pairwise(cu)]
    rows = B * T * H if damping == "learned" else B * T if prefix else 1
    return Case(
        name=name,
        make=make,
        reduction=(max(lengths) + prefix) * K * rows,
        elements=B * T * H * 4 * K,
        flops=4 * H * sum(n * (n + prefix) for n in lengths) * K // (2 if causal else 1),
        small=("damping",),
        roundings=3,  # of the factors that carry the positions to q and to k, and of weights or their gradients
        through_half=("ddamping",),
        bench=bench,
    )


CASES = [
    _case("T1", 1, 1, 1, 2),
    _case("T63", 2, 63, 3, 6),
    _case("T113-global", 1, 113, 2, 16, mode="global"),
    _case("T113-causal-damped", 1, 113, 2, 8, causal=True, damping="learned"),
    _case("T64-damped", 2, 64, 2, 8, damping="learned"),
    _case("T70-rotary-half-prefix", 2, 70, 4, 8, rotary_heads=2, prefix=3),
    _case("T33-rotary-all-causal", 1, 33, 2, 8, rotary_heads=2, causal=True, prefix=2),
    _case("T40-base-scale", 1, 40, 2, 8, base=100.0, scale=0.5, damping=0.0),
    _case("T37-K100-causal", 1, 37, 1, 100, causal=True),
    _case("strided", 2, 20, 3, 8, strided=True),
    _case("ragged", 1, 100, 3, 8, cu=(0, 40, 40, 41, 90, 100)),
    _case("ragged-all", 1, 60, 4, 8, cu=(0, 0, 25, 60), rotary_heads=1, prefix=2, causal=True, damping="learned"),
    _case("equal-packed", 1, 48, 2, 8, cu=(0, 16, 32, 48)),
    _case("mini-16x128", 1, 2048, 6, 64, cu=tuple(range(0, 2049, 128)), bench=True),
    _case("standard-T512", 4, 512, 12, 64, bench=True),
    _case("standard-T2048", 1, 2048, 12, 64, bench=True),
]
