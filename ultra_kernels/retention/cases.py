"""Shapes, inputs, bytes and flops of retention, for tests and bench."""

from __future__ import annotations

from itertools import pairwise

import torch

from .._testing import Case, Inputs

CASES: dict[str, list[Case]] = {"retention": [], "retention_step": []}


def _log_decay(H: int) -> torch.Tensor:
    """Memories of 4 to 512 tokens, and a last head that forgets nothing where there are several."""
    decay = torch.log1p(-1 / torch.logspace(2, 9, H, base=2.0, dtype=torch.float64))
    return torch.where(torch.arange(H) == H - 1, 0.0, decay) if H > 2 else decay


def _flops(T: int, K: int, V: int, C: int = 64) -> int:
    """Of one head in both directions: all scores, or chunks of C with two states, whichever is less."""
    return min(2 * T * T * (K + V), T * (2 * C * (K + V) + 8 * K * V))


def _case(
    name: str,
    B: int,
    T: int,
    H: int,
    K: int,
    V: int,
    *,
    direction: str = "bidirectional",
    cu: tuple[int, ...] | None = None,
    scale: float | str | None = None,
    state: bool = False,
    strided: bool = False,
    bench: bool = False,
    large: bool = False,
) -> None:
    def make(g: torch.Generator) -> Inputs:
        def randn(*shape: int) -> torch.Tensor:
            if large:  # one head's numbers for all: float64 of every head is gigabytes
                B, T, H, K = shape
                return torch.randn(B, T, 1, K, generator=g, dtype=torch.float64).expand(B, T, H, K)
            return torch.randn(*shape, generator=g, dtype=torch.float64)

        inputs: Inputs = {"q": randn(B, T, H, K), "k": randn(B, T, H, K), "v": randn(B, T, H, V)}
        if strided:  # one projection of [q, k, v] rows, and heads before tokens
            qk = randn(B, T, 2, H, K)
            inputs |= {"q": qk[:, :, 0], "k": qk[:, :, 1], "v": randn(B, H, T, V).transpose(1, 2)}
        inputs |= {"log_decay": _log_decay(H), "direction": direction}
        if scale is not None:
            inputs["scale"] = 0.3 + torch.rand(H, generator=g, dtype=torch.float64) if scale == "heads" else scale
        if cu is not None:
            inputs["cu_seqlens"] = torch.tensor(cu, dtype=torch.int32)
        if state:
            inputs |= {
                "initial_state": randn(B if cu is None else len(cu) - 1, H, K, V),
                "output_final_state": True,
            }
        return inputs

    lengths = [T] * B if cu is None else [b - a for a, b in pairwise(cu)]
    CASES["retention"].append(
        Case(
            name=name,
            make=make,
            reduction=max(lengths) * max(K, V) * (B * T if scale == "heads" else 1),
            elements=B * T * H * (2 * K + 2 * V),
            flops=H * sum(_flops(n, K, V) for n in lengths),
            small=("log_decay", "scale", "initial_state"),
            constant=("log_decay",),
            through_half=("out1", "dscale", "dinitial_state"),  # scores and decayed keys are operands of products
            bench=bench,
            large=large,
        )
    )


def _step(name: str, B: int, H: int, K: int, V: int, *, scale: str | None = None, bench: bool = False) -> None:
    def make(g: torch.Generator) -> Inputs:
        def randn(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=g, dtype=torch.float64)

        inputs: Inputs = {
            "q": randn(B, H, K), "k": randn(B, H, K), "v": randn(B, H, V),
            "log_decay": _log_decay(H), "state": randn(B, H, K, V),
        }  # fmt: skip
        return inputs | ({"scale": 0.3 + torch.rand(H, generator=g, dtype=torch.float64)} if scale else {})

    CASES["retention_step"].append(
        Case(
            name=name,
            make=make,
            reduction=max(K, V) * (B * K if scale else 1),
            elements=B * H * 2 * (K * V + K + V),
            flops=5 * B * H * K * V,
            small=("log_decay", "state", "scale"),
            constant=("log_decay",),
            bench=bench,
        )
    )


_case("T1", 1, 1, 1, 2, 2)
_case("T63-forward", 2, 63, 3, 5, 7, direction="forward")
_case("T113-backward-scale", 1, 113, 2, 16, 8, direction="backward", scale=0.7)
_case("T113-bidirectional-heads", 2, 113, 4, 8, 8, scale="heads")
_case("T330-chunked", 1, 330, 3, 8, 4)
_case("T300-chunked-state", 1, 300, 2, 4, 8, direction="forward", state=True)
_case("strided", 2, 20, 3, 8, 6, strided=True)
_case("ragged", 1, 100, 3, 8, 8, cu=(0, 40, 40, 41, 90, 100))
_case("ragged-state", 1, 50, 3, 8, 4, direction="forward", cu=(0, 0, 30, 31, 50, 50), state=True)
_case("equal-packed-backward", 1, 48, 2, 8, 8, direction="backward", cu=(0, 16, 32, 48))
_case("T70-K60-V100-forward", 1, 70, 1, 60, 100, direction="forward", state=True)
_case("T65-K96-V192", 1, 65, 1, 96, 192)
_case("mini-16x128", 1, 2048, 6, 64, 64, cu=tuple(range(0, 2049, 128)), bench=True)
_case("standard-T512", 1, 512, 12, 64, 64, bench=True)
_case("standard-T2048", 1, 2048, 12, 64, 64, bench=True)
_case("T512-K128-V256", 128, 512, 16, 128, 256, bench=True, large=True)
_case("T2048-K128-V256", 32, 2048, 16, 128, 256, bench=True, large=True)

_step("smallest", 1, 1, 1, 1)
_step("B3", 3, 4, 8, 5)
_step("heads", 2, 3, 4, 4, scale="heads")
_step("V32", 2, 1, 70, 32)
_step("standard", 4, 12, 64, 64, bench=True)
