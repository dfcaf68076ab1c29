"""Shapes, inputs, bytes and flops of the masked cross-entropy, for tests and bench."""

from __future__ import annotations

import torch

from .._testing import Case, Inputs


def _case(
    name: str,
    *shape: int,
    V: int,
    labelled: float = 0.3,
    bias: bool = False,
    z_loss: float = 0.0,
    reduction: str = "mean",
    ignore_index: int = -100,
    strided: bool = False,
    bench: bool = False,
    large: bool = False,
    slow: bool = False,
) -> Case:
    T, D = int(torch.Size(shape[:-1]).numel()), shape[-1]

    def make(g: torch.Generator) -> Inputs:
        hidden = torch.randn(*shape, generator=g, dtype=torch.float64)
        weight = torch.randn(V, D, generator=g, dtype=torch.float64) * D**-0.5
        labels = torch.randint(0, V, shape[:-1], generator=g)
        dropped = torch.rand(shape[:-1], generator=g) >= labelled
        if strided:
            hidden = hidden.transpose(0, 1).contiguous().transpose(0, 1)
            weight = weight.t().contiguous().t()
        inputs: Inputs = {
            "hidden": hidden,
            "weight": weight,
            "labels": labels.masked_fill(dropped, ignore_index),
            "ignore_index": ignore_index,
            "z_loss": z_loss,
            "reduction": reduction,
        }
        return inputs | ({"bias": torch.randn(V, generator=g, dtype=torch.float64)} if bias else {})

    rows = max(1, round(T * labelled))
    return Case(
        name=name,
        make=make,
        small=("bias",),
        through_half=("out0", "dbias"),
        reduction=max(V, T, D),
        elements=rows * D * 2 + V * D * 2,
        flops=2 * rows * D * V,
        bench=bench,
        large=large,
        slow=slow,
    )


CASES = [
    _case("T1-D1-V2", 1, 1, V=2, labelled=1),
    _case("T0-D8-V9", 0, 8, V=9),
    _case("T63-D16-none-labelled", 63, 16, V=40, labelled=0, bias=True),
    _case("T63-D32-V113", 63, 32, V=113),
    _case("B3-T21-D24-V200-bias-z-sum", 3, 21, 24, V=200, labelled=0.5, bias=True, z_loss=1e-2, reduction="sum"),
    _case("strided-ignore0", 5, 31, 40, V=97, labelled=0.4, ignore_index=0, strided=True),
    _case("T113-all-labelled", 113, 48, V=600, labelled=1, z_loss=1e-3, bias=True),
    _case("embbert-T2048-D192-V8192", 2048, 192, V=8192, labelled=0.15, bench=True),
    _case("mini-T4096-D384-V50000", 4096, 384, V=50000, labelled=0.15, bench=True, slow=True),
    _case("standard-T4096-D768-V50000", 4096, 768, V=50000, labelled=0.15, bench=True, slow=True),
    _case("T16384-D768-V50368", 16384, 768, V=50368, labelled=0.3, bench=True, large=True),
]
