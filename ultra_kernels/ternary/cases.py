"""Shapes, inputs, bytes and flops of the ternary ops, for tests and bench."""

from __future__ import annotations

import torch

from .._testing import Case, Inputs
from ..bitlinear.cases import grid_tokens, ternary_weights
from .op import MAX_M, PackedTernary, pack_ternary


def _packed(g: torch.Generator, N: int, K: int) -> PackedTernary:
    codes = torch.randint(-1, 2, (N, K), generator=g, dtype=torch.int8)
    return pack_ternary(codes, torch.rand((), generator=g) + 0.5)


def _quantize(name: str, N: int, K: int, scale: str = "mean", transposed: bool = False, bench: bool = False) -> Case:
    def make(g: torch.Generator) -> Inputs:
        weight = ternary_weights(g, N, K)
        return {"weight": weight.t().contiguous().t() if transposed else weight, "scale": scale}

    return Case(name, make, reduction=N * K, elements=N * K, flops=3 * N * K, constant=("weight",), bench=bench)


def _matmul(
    name: str, M: int, N: int, K: int, transposed: bool = False, bench: bool = False, large: bool = False
) -> Case:
    def make(g: torch.Generator) -> Inputs:
        x = torch.randint(-128, 128, (M, K), generator=g, dtype=torch.int8)
        return {"x": x.t().contiguous().t() if transposed else x, "packed": _packed(g, N, K)}

    # Integers: the dtype under test plays no part.
    return Case(
        name, make, reduction=K, elements=M * (K + 4 * N) + N * K // 4, flops=2 * M * N * K, bench=bench, large=large,
        dtypes=(torch.float32,), bytes_at=lambda size: M * (K + 4 * N) + N * K // 4, int8=True,
        refused_by=("cuda",) if M > MAX_M else (),
    )  # fmt: skip


def _linear(
    name: str,
    *shape: int,
    N: int,
    bias: bool = False,
    transposed: bool = False,
    bench: bool = False,
    large: bool = False,
) -> Case:
    M, K = int(torch.Size(shape[:-1]).numel()), shape[-1]

    def make(g: torch.Generator) -> Inputs:
        x = grid_tokens(g, *shape)
        if transposed:
            x = x.transpose(0, 1).contiguous().transpose(0, 1)
        inputs: Inputs = {"x": x, "packed": _packed(g, N, K)}
        return inputs | ({"bias": torch.randn(N, generator=g, dtype=torch.float64)} if bias else {})

    return Case(
        name, make, reduction=K, elements=M * (K + N) + N * K // 16, flops=2 * M * N * K, small=("bias",),
        constant=("x", "bias"), bench=bench, large=large, bytes_at=lambda size: M * (K + N) * size + N * K // 4,
        int8=True, refused_by=("cuda",) if M > MAX_M else (),
    )  # fmt: skip


CASES = {
    "quantize_ternary": [
        _quantize("1x1", 1, 1),
        _quantize("N7-K113", 7, 113),
        _quantize("N64-K63-median", 64, 63, scale="median"),
        _quantize("strided-N48-K33", 48, 33, transposed=True),
        _quantize("frankenstein-N2048-K1024", 2048, 1024, bench=True),
    ],
    "ternary_matmul": [
        _matmul("1x1x1", 1, 1, 1),
        _matmul("M0-N3-K5", 0, 3, 5),
        _matmul("M3-N1-K4", 3, 1, 4),
        _matmul("M7-N17-K63", 7, 17, 63),
        _matmul("M33-N16-K128", 33, 16, 128),
        _matmul("M65-N33-K130", 65, 33, 130),
        _matmul("strided-M9-N24-K41", 9, 24, 41, transposed=True),
        _matmul("M1-N2048-K2048", 1, 2048, 2048, bench=True),
        _matmul("M8-N2048-K2048", 8, 2048, 2048, bench=True),
        _matmul("M512-N2048-K2048", 512, 2048, 2048, bench=True),
        _matmul("M1-N13824-K2560", 1, 13824, 2560, bench=True, large=True),
    ],
    "ternary_linear": [
        _linear("1x1x1", 1, 1, N=1),
        _linear("rows0-K6-N3", 0, 6, N=3, bias=True),
        _linear("M2-K16-N20", 2, 16, N=20),
        _linear("B2-T2-K48-N17-bias", 2, 2, 48, N=17, bias=True),
        _linear("strided-T3-B2-K41-N24", 3, 2, 41, N=24, transposed=True),
        _linear("B2-T7-K113-N31-bias", 2, 7, 113, N=31, bias=True),
        _linear("T63-K64-N48", 63, 64, N=48),
        _linear("T70-K33-N40-bias", 70, 33, N=40, bias=True),
        _linear("strided-T5-B3-K40-N24", 5, 3, 40, N=24, transposed=True),
        _linear("M1-N2048-K2048", 1, 2048, N=2048, bench=True),
        _linear("M8-N2048-K2048", 8, 2048, N=2048, bench=True),
        _linear("M512-N2048-K2048", 512, 2048, N=2048, bench=True),
        _linear("M1-N13824-K2560", 1, 2560, N=13824, bench=True, large=True),
    ],
}
