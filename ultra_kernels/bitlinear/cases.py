"""Shapes, inputs, bytes and flops of BitLinear, for tests and bench.

Rounding is discontinuous: a value that float32 and float64 put on different sides of a tie gives results one whole
step apart. So activations here lie on a grid at least a quarter of a step away from every tie, and weights at least
0.09 γ, with numbers that bfloat16 and float16 hold exactly; then every precision takes the same rounding decisions.
"""

from __future__ import annotations

import torch

from .._testing import Case, Inputs


def grid_tokens(g: torch.Generator, *shape: int) -> torch.Tensor:
    """Rows of p · (n + f): p a power of two per row, n an integer up to 127 (reached), f in {−¼, 0, ¼} for |n| < 64.

    p · 127 is the row's absmax, so round(127 x / absmax) = n, a quarter away from a tie. 8 significand bits suffice.
    """
    n = torch.randint(-126, 127, shape, generator=g).double()
    n += torch.randint(-1, 2, shape, generator=g) * 0.25 * (n.abs() < 63)
    n[..., 0] = torch.where(torch.rand(shape[:-1], generator=g) < 0.5, 127.0, -127.0).double()
    return n * 2.0 ** torch.randint(-8, -4, (*shape[:-1], 1), generator=g)


def tokens_at_ties(g: torch.Generator, rows: int) -> torch.Tensor:
    """Float32 rows `[rows, 382]` of numbers that scale to a half and to the floats beside it: every last bit counts."""
    absmax = 0.5 + torch.rand(rows, 1, generator=g)
    half = (torch.arange(127) + 0.5) / (127 / absmax)
    beside = [torch.nextafter(half, torch.tensor(limit)) for limit in (0.0, 2.0)]
    return torch.cat([absmax, half, -beside[0], beside[1]], 1)


def ternary_weights(g: torch.Generator, *shape: int) -> torch.Tensor:
    """Random signs and magnitudes near ¼, 1 and 1¾, equally often: γ is about 1, so |W| / γ stays away from ½."""
    count = torch.Size(shape).numel()
    magnitude = torch.tensor([1.0, 1.75, 0.25], dtype=torch.float64).repeat(count // 3 + 1)[:count]
    magnitude = magnitude[torch.randperm(count, generator=g)] * (1 + 0.05 * torch.rand(count, generator=g))
    return (magnitude * (torch.randint(0, 2, (count,), generator=g) * 2 - 1)).reshape(shape)


def _case(
    name: str,
    *shape: int,
    N: int,
    bias: bool = False,
    norm: bool = False,
    scale: str = "mean",
    transposed: bool = False,
    bench: bool = False,
) -> Case:
    rows, K = int(torch.Size(shape[:-1]).numel()), shape[-1]

    def make(g: torch.Generator) -> Inputs:
        x, weight = grid_tokens(g, *shape), ternary_weights(g, N, K)
        if transposed:  # the same values read through other strides
            x, weight = x.transpose(0, 1).contiguous().transpose(0, 1), weight.t().contiguous().t()
        inputs: Inputs = {"x": x, "weight": weight, "scale": scale}
        if bias:
            inputs["bias"] = torch.randn(N, generator=g, dtype=torch.float64)
        if norm:
            # Powers of two undone in x keep the normalised values on the grid.
            gain = 2.0 ** torch.randint(-1, 2, (K,), generator=g).double()
            inputs["norm_weight"] = gain
            inputs["x"] = x / gain
        return inputs

    return Case(
        name=name,
        make=make,
        small=("bias", "norm_weight"),
        through_half=("dnorm_weight",),
        reduction=max(rows, K, N) * (2 if norm else 1),
        elements=rows * (K + N) + N * K,
        flops=2 * rows * N * K,
        bench=bench,
        int8=True,
    )


CASES = [
    _case("1x1x1", 1, 1, N=1),
    _case("rows0-K8-N5", 0, 8, N=5, bias=True),
    _case("rows1-K63-N17", 1, 63, N=17),
    _case("B2-T7-K113-N31-bias", 2, 7, 113, N=31, bias=True),
    _case("T63-K64-N48-norm", 63, 64, N=48, norm=True, bias=True),
    _case("T63-K65-N33-median", 63, 65, N=33, scale="median", norm=True),
    _case("strided-T9-K40-N24", 9, 40, N=24, transposed=True),
    _case("T1500-K32-N1500", 1500, 32, N=1500),
    _case("frankenstein-T512-K1024-N2048", 512, 1024, N=2048, norm=True, bench=True),
    _case("T512-K2048-N2048", 512, 2048, N=2048, bench=True),
]
