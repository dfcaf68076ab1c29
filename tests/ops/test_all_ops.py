"""Every op × backend × case × dtype against the float64 reference: forward and every gradient."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable

import pytest
import torch

import ultra_kernels
from ultra_kernels import _native
from ultra_kernels._dispatch import OPS, BackendUnavailable
from ultra_kernels._testing import Case, cases, compare, errors, run, widened

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"


def op_cases() -> list[tuple[str, Case]]:
    return [(name, case) for name in OPS for case in cases(name)]


def function(name: str):
    return getattr(ultra_kernels, name)


def require(name: str, backend: str, device: str, dtype: torch.dtype) -> None:
    reason = OPS[name].why_not(backend, torch.empty(0, device=device, dtype=dtype))
    if reason is not None:
        pytest.skip(f"{name} on {backend}: {reason}")


@pytest.fixture
def poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs that a kernel forgets to write are NaN, not the zeros that fresh memory often holds."""

    def fill(t: torch.Tensor) -> torch.Tensor:
        return t.fill_(float("nan")) if t.is_floating_point() else t.fill_(-7) if t.numel() else t

    for fn in ("empty", "empty_like"):
        real = getattr(torch, fn)
        monkeypatch.setattr(torch, fn, lambda *a, _real=real, **k: fill(_real(*a, **k)))
    real_new = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda self, *a, **k: fill(real_new(self, *a, **k)))


def check(name: str, backend: str, case: Case, dtype: torch.dtype, device: str) -> float:
    """Fails unless every output and gradient is within its tolerance; returns the largest share used of one."""
    require(name, backend, device, dtype)
    inputs = case.inputs(dtype, device)
    expected = run(function(name), widened(inputs), "reference", dtype)
    got = run(function(name), inputs, backend, dtype)
    judged = (case.reduction, case.scales, dict.fromkeys(case.through_half, dtype), case.roundings)
    wrong = compare(got, expected, *judged)
    assert not wrong, f"{name} [{backend}, {case.name}, {dtype}]:\n" + "\n".join(wrong)
    return max((error / limit for error, limit in errors(got, expected, *judged).values()), default=0.0)


ALL = [
    pytest.param(name, backend, case, dtype, id=f"{name}-{backend}-{case.name}-{str(dtype)[6:]}")
    for name, case in op_cases()
    for backend in OPS[name].names
    if backend not in case.refused_by
    for dtype in case.dtypes
    if not (case.bench and dtype != torch.float32)
]


@pytest.mark.parametrize(("name", "backend", "case", "dtype"), ALL)
def test_against_float64(name: str, backend: str, case: Case, dtype: torch.dtype, poisoned_empty: None) -> None:
    # Triton's interpreter computes bfloat16 wrongly and large cases slowly; float16 differs in conversions alone
    largest = {torch.float32: 200_000, torch.float16: 10_000, torch.bfloat16: 0}[dtype]
    if backend == "triton" and INTERPRET and case.elements > largest:
        pytest.skip(f"Triton's interpreter: {dtype} up to {largest} elements")
    check(name, backend, case, dtype, "cpu")


# The reference in half precision at bench sizes shows nothing that it does not show at smaller ones.
ON_GPU = [
    pytest.param(name, backend, case, dtype, id=f"{name}-{backend}-{case.name}-{str(dtype)[6:]}")
    for name, case in op_cases()
    for backend in OPS[name].order["cuda"]
    if backend not in case.refused_by
    for dtype in case.dtypes
    if not (case.bench and backend == "reference" and dtype != torch.float32)
]


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "backend", "case", "dtype"), ON_GPU)
def test_against_float64_gpu(
    name: str, backend: str, case: Case, dtype: torch.dtype, poisoned_empty: None,
    record_property: Callable[[str, object], None],
) -> None:  # fmt: skip
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    record_property("cell", [name, backend, str(dtype)[6:]])
    record_property("of_tolerance", check(name, backend, case, dtype, "cuda"))


@pytest.mark.parametrize("isa", ["baseline", "avx2"])
@pytest.mark.parametrize("name", [n for n, op in OPS.items() if "native" in op.names])
def test_other_instruction_sets(name: str, isa: str) -> None:
    """The dispatched library must be right on older CPUs too."""
    if (reason := _native.missing()) is not None:
        pytest.skip(reason)
    C = _native.load()
    if isa not in C.isas():
        pytest.skip(f"this CPU has {C.isas()}")
    best = C.isa()
    C.set_isa(isa)
    try:
        for case in cases(name):
            if not case.bench and "native" not in case.refused_by:
                check(name, "native", case, torch.float32, "cpu")
    finally:
        C.set_isa(best)


@pytest.mark.parametrize("name", list(OPS))
def test_opcheck(name: str) -> None:
    """torch's own audit of the registration: schema, fakes, autograd, AOT dispatch."""
    case = min(cases(name), key=lambda c: c.elements)
    inputs = case.inputs(torch.float32)
    calls: list[tuple] = []

    class Spy(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "ultra_kernels":
                calls.append((func, args))
            return func(*args, **(kwargs or {}))

    with Spy():
        function(name)(**inputs)
    for func, args in calls:
        if not func._schema.name.endswith("_backward"):
            fresh = tuple(
                a.detach().clone().requires_grad_(a.is_floating_point()) if isinstance(a, torch.Tensor) else a
                for a in args
            )
            torch.library.opcheck(func, fresh)


@pytest.mark.parametrize("name", list(OPS))
def test_contract(name: str) -> None:
    fn = function(name)
    assert fn.__doc__ and "[" in fn.__doc__ and ("arXiv" in fn.__doc__ or "et al" in fn.__doc__), "shapes and source"
    parameters = inspect.signature(fn).parameters
    assert parameters["backend"].default is None
    assert not any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    assert name in ultra_kernels.__all__


@pytest.mark.parametrize("name", list(OPS))
def test_named_backend_is_refused_with_a_reason(name: str) -> None:
    case = min(cases(name), key=lambda c: c.elements)
    with pytest.raises(BackendUnavailable, match=name):
        function(name)(**case.inputs(torch.float32), backend="cuda" if "cuda" not in OPS[name].names else "triton")
