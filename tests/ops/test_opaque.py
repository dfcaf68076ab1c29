"""What a compiled graph holds instead of a data-dependent reference: one op, equal to the reference it hides."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import ultra_kernels
from ultra_kernels._dispatch import opaque
from ultra_kernels._testing import Case, cases, compare, run, widened

OPAQUE = ("retention", "sigmoid_attention", "hope_attention", "selective_scan", "bidirectional_scan")
CASES = [
    pytest.param(name, case, id=f"{name}-{case.name}") for name in OPAQUE for case in cases(name) if not case.bench
]
HALF = torch.bfloat16


@opaque("test_cumulative(Tensor x, Tensor? scale, SymInt steps) -> (Tensor, Tensor)", lambda x, scale, steps: (
    x.new_empty(x.shape), x.new_empty(x.shape[:1])
))  # fmt: skip
def cumulative(x: torch.Tensor, scale: torch.Tensor | None, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A loop whose length is data: scale · (x + x² + … to the power of its first entry's integer part)."""
    y = total = x
    for _ in range(int(x.detach().flatten()[0]) + steps):
        y = y * x
        total = total + y
    return (total if scale is None else total * scale), total.t()[0]


def as_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)


@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
@pytest.mark.parametrize(("name", "case"), CASES)
def test_the_op_is_the_reference(name: str, case: Case, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values and every gradient against float64, as tests/ops/test_all_ops.py does for what eager calls run."""
    function, inputs = getattr(ultra_kernels, name), case.inputs(dtype)
    expected = run(function, widened(inputs), "reference", dtype)
    as_compiled(monkeypatch)
    got = run(function, inputs, "reference", dtype)
    wrong = compare(got, expected, case.reduction, case.scales, dict.fromkeys(case.through_half, dtype), case.roundings)
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(("name", "case"), [p.values for p in CASES if "packed" in p.id or "ragged" in p.id])
def test_opcheck(name: str, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    class Spy(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "ultra_kernels":
                calls.append((func, args))
            return func(*args, **(kwargs or {}))

    with monkeypatch.context() as patch, Spy():
        as_compiled(patch)
        getattr(ultra_kernels, name)(**case.inputs(torch.float32), backend="reference")
    ((func, args),) = calls
    assert func._schema.name == f"ultra_kernels::{name}_reference"
    fresh = tuple(
        a.detach().clone().requires_grad_(a.is_floating_point()) if isinstance(a, torch.Tensor) else a for a in args
    )
    torch.library.opcheck(func, fresh)


def leaves() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return (1 + torch.rand(3, 4, dtype=torch.float64)).requires_grad_(), torch.tensor([0.5], dtype=torch.float64)


def test_compiled_once_for_all_lengths_and_data() -> None:
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda *a: cumulative(*a), fullgraph=True, backend=counter, dynamic=True)
    for rows, steps in ((3, 2), (5, 4), (7, 3)):
        x, scale = leaves()
        x = x.detach().repeat(3, 1)[:rows].clone().requires_grad_()
        eager, traced = cumulative(x, scale, steps), compiled(x, scale, steps)
        for a, b in zip(eager, traced, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)
        for chosen in (slice(0, 1), slice(1, 2), slice(0, 2)):  # an output without a gradient counts as zero
            sums = [sum(o.square().sum() for o in outputs[chosen]) for outputs in (eager, traced)]
            a, b = (torch.autograd.grad(total, x, retain_graph=True)[0] for total in sums)
            torch.testing.assert_close(a, b, rtol=1e-14, atol=0)
    assert counter.frame_count == 1


def test_an_output_is_contiguous_and_no_alias(monkeypatch: pytest.MonkeyPatch) -> None:
    as_compiled(monkeypatch)
    x, _ = leaves()
    total, row = cumulative(x, None, 1)
    assert total.is_contiguous() and row.is_contiguous() and row.data_ptr() != total.data_ptr()


def test_second_derivative(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is one in eager mode; the op refuses it with the reason."""
    x, scale = leaves()
    assert torch.autograd.gradgradcheck(lambda x: cumulative(x, scale, 1)[0], x)
    as_compiled(monkeypatch)
    (first,) = torch.autograd.grad(cumulative(x, scale, 1)[0].sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"test_cumulative has no second derivative: torch.compile .* eagerly"):
        first.sum().backward()
