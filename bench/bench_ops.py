"""Every op × backend × bench case: time, and what it is of the machine's limit. `pytest bench -k "dyt and forward"`.

Beside an op's own backends stand torch.compile of its reference (with --ultra-compile) and other libraries (peers.py).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch

import ultra_kernels
from bench.limits import limits
from bench.peers import PEERS, PREPARED
from bench.timing import measure
from ultra_kernels._dispatch import OPS
from ultra_kernels._testing import Case, cases

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.bfloat16)
COMPILED = "torch.compile"
LOOPS = ("selective_scan", "bidirectional_scan")  # references that step through time: minutes to compile


def contenders(name: str) -> list[str]:
    """The op's backends, peers, and the compiled reference where a kernel of ours on this device must beat it."""
    own = OPS[name].names
    fused = name not in LOOPS and any(b != "reference" for b in OPS[name].order[DEVICE])
    return [*own, *([COMPILED] if fused else []), *PEERS.get(name, ())]


ALL = [
    pytest.param(name, backend, case, dtype, mode, id=f"{name}-{backend}-{case.name}-{str(dtype)[6:]}-{mode}")
    for name in OPS
    for case in cases(name, large=DEVICE == "cuda", slow=True)
    if case.bench
    for dtype in DTYPES
    if dtype in case.dtypes
    for mode in ("forward", "training")
    for backend in contenders(name)
    if backend not in case.refused_by
]


def implementation(name: str, backend: str, dtype: torch.dtype, compile_too: bool) -> Callable[..., Any]:
    """The function that stands for `backend`; skips with the reason where it cannot run here."""
    function = getattr(ultra_kernels, name)
    if backend in PEERS.get(name, ()):
        return PEERS[name][backend]
    if backend == COMPILED:
        if not compile_too:
            pytest.skip("torch.compile takes long: --ultra-compile")
        torch.compiler.reset()
        return torch.compile(lambda **inputs: function(**inputs, backend="reference"))
    if (reason := OPS[name].why_not(backend, torch.empty(0, device=DEVICE, dtype=dtype))) is not None:
        pytest.skip(reason)
    return functools.partial(function, backend=backend)


def differentiable(result: Any) -> list[torch.Tensor]:
    parts = result if isinstance(result, tuple) else (result,)
    return [p for p in parts if isinstance(p, torch.Tensor) and p.requires_grad]


@pytest.mark.parametrize(("name", "backend", "case", "dtype", "mode"), ALL)
def test_op(
    name: str, backend: str, case: Case, dtype: torch.dtype, mode: str,
    pytestconfig: pytest.Config, record_cell: Callable[[dict[str, Any]], None],
) -> None:  # fmt: skip
    """Mode "training" is forward and backward."""
    function = implementation(name, backend, dtype, pytestconfig.getoption("--ultra-compile"))
    inputs = case.inputs(dtype, DEVICE)
    leaves = [v for v in inputs.values() if isinstance(v, torch.Tensor) and v.requires_grad]
    nbytes, flops, exps = case.nbytes(dtype), case.flops, case.exps
    int8_ops = flops if case.int8 else 0  # of the forward alone
    try:
        if backend in PREPARED and "packed" in inputs:
            inputs["packed"] = PREPARED[backend](inputs["packed"], dtype)
        outputs = differentiable(function(**inputs))
    except (ImportError, NotImplementedError) as error:
        pytest.skip(str(error))

    if mode == "training":
        if not outputs:
            pytest.skip("no gradient")
        cotangents = [torch.randn_like(o) for o in outputs]
        # the backward reads inputs and output gradients and writes input gradients; a product has two of its own size
        nbytes = 2 * nbytes + sum(leaf.numel() * leaf.element_size() for leaf in leaves)
        flops, exps = 3 * flops, 2 * exps  # the backward makes the decays again

        def call() -> None:
            torch.autograd.grad(differentiable(function(**inputs)), leaves, cotangents, allow_unused=True)
    else:

        def call() -> None:
            with torch.no_grad():
                function(**inputs)

    timing = measure(call, DEVICE, pytestconfig.getoption("--ultra-seconds"))
    least = limits(nbytes, flops - int8_ops, exps, DEVICE, dtype, int8_ops)
    limit = next(iter(least))
    record_cell(
        {
            "op": name, "backend": backend, "case": case.name, "dtype": str(dtype)[6:], "mode": mode, "device": DEVICE,
            "ms": timing.median * 1e3, "min_ms": timing.best * 1e3, "rounds": timing.rounds,
            "bytes": nbytes, "flops": flops, "exps": exps, "limit": limit, "limit_ms": least[limit] * 1e3,
            "limits_ms": {name: seconds * 1e3 for name, seconds in least.items()},
        }
    )  # fmt: skip
