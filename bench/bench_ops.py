"""Every op × backend × bench case: time, and what it is of the machine's limit. `pytest bench -k "dyt and forward"`."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import ultra_kernels
from bench.limits import least_seconds, seconds, synchronize
from ultra_kernels._dispatch import OPS
from ultra_kernels._testing import Case, cases

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.bfloat16)

ALL = [
    pytest.param(name, backend, case, dtype, mode, id=f"{name}-{backend}-{case.name}-{str(dtype)[6:]}-{mode}")
    for name, op in OPS.items()
    for case in cases(name)
    if case.bench
    for dtype in DTYPES
    if dtype in case.dtypes
    for mode in ("forward", "training")
    for backend in op.names
]


def leaves_and_outputs(result: Any) -> list[torch.Tensor]:
    parts = result if isinstance(result, tuple) else (result,)
    return [p for p in parts if isinstance(p, torch.Tensor) and p.requires_grad]


@pytest.mark.parametrize(("name", "backend", "case", "dtype", "mode"), ALL)
def test_op(name: str, backend: str, case: Case, dtype: torch.dtype, mode: str, benchmark: Any) -> None:
    """Mode "training" is forward and backward."""
    reason = OPS[name].why_not(backend, torch.empty(0, device=DEVICE, dtype=dtype))
    if reason is not None:
        pytest.skip(reason)
    function, inputs = getattr(ultra_kernels, name), case.inputs(dtype, DEVICE)
    leaves = [v for v in inputs.values() if isinstance(v, torch.Tensor) and v.requires_grad]
    nbytes, flops = case.elements * dtype.itemsize, case.flops

    if mode == "training":
        outputs = leaves_and_outputs(function(**inputs, backend=backend)) if leaves else []
        if not outputs:
            pytest.skip("no gradient")
        cotangents = [torch.randn_like(o) for o in outputs]
        # the backward reads inputs and output gradients and writes input gradients; a product has two of its own size
        nbytes = 2 * nbytes + sum(leaf.numel() * leaf.element_size() for leaf in leaves)
        flops = 3 * flops

        def call() -> None:
            outputs = leaves_and_outputs(function(**inputs, backend=backend))
            torch.autograd.grad(outputs, leaves, cotangents, allow_unused=True)
            synchronize(DEVICE)
    else:

        def call() -> None:
            with torch.no_grad():
                function(**inputs, backend=backend)
            synchronize(DEVICE)

    once = seconds(call, DEVICE, budget=0.0, least=1)
    benchmark.pedantic(call, rounds=max(3, min(100, int(1.0 / once))), warmup_rounds=1)
    least, limit = least_seconds(nbytes, flops, DEVICE, dtype)
    benchmark.extra_info.update(
        op=name, backend=backend, case=case.name, dtype=str(dtype)[6:], mode=mode, device=DEVICE,
        bytes=nbytes, flops=flops, limit=limit, limit_ms=least * 1e3,
    )  # fmt: skip
