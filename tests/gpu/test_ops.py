"""What the op suite's cases do not show: layouts, streams, devices, autocast, torch.compile, repetition.

Each test is written once for any device; on the CPU it runs over the CPU's backends, with -m gpu over the GPU's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import ultra_kernels
from ultra_kernels._dispatch import OPS
from ultra_kernels._testing import Case, Inputs, cases, compare, run, widened
from ultra_kernels._triton import ARCHS, recorded_launches

GPU = pytest.mark.gpu


def function(name: str) -> Callable[..., Any]:
    return getattr(ultra_kernels, name)


def backends(devices: tuple[str, ...] = ("cpu", "cuda"), reference: bool = True) -> list[Any]:
    """(device, op, backend) of every table, the GPU's marked gpu."""
    return [
        pytest.param(device, name, backend, id=f"{device}-{name}-{backend}", marks=[GPU] if device == "cuda" else [])
        for device in devices
        for name, op in OPS.items()
        for backend in op.order[device]
        if reference or backend != "reference"
    ]


def require(device: str, name: str, backend: str, dtype: torch.dtype = torch.float32) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if (reason := OPS[name].why_not(backend, torch.empty(0, device=device, dtype=dtype))) is not None:
        pytest.skip(reason)


def small_case(name: str, packed: bool = False) -> Case:
    """The smallest case with more than a handful of elements."""
    chosen = [c for c in cases(name) if c.elements > 100 and not c.bench]
    return min((c for c in chosen if packed or "cu_seqlens" not in c.make(torch.Generator())), key=lambda c: c.elements)


def judge(got: dict[str, torch.Tensor], inputs: Inputs, name: str, case: Case, dtype: torch.dtype) -> None:
    expected = run(function(name), widened(inputs), "reference", dtype)
    wrong = compare(got, expected, case.reduction, case.scales, dict.fromkeys(case.through_half, dtype), case.roundings)
    assert not wrong, "\n".join(wrong)


def displaced(t: torch.Tensor) -> torch.Tensor:
    """The same values at every second element of NaNs, beginning at an odd one: no address is aligned."""
    room = torch.full((2 * t.numel() + 2,), float("nan"), dtype=t.dtype, device=t.device)
    strides = [2 * s for s in torch.empty(t.shape, device="meta").stride()]
    view = room.as_strided(t.shape, strides, 1)
    view.copy_(t.detach())
    return view.requires_grad_(t.requires_grad)


def shifted(t: torch.Tensor) -> torch.Tensor:
    """The same values, contiguous, one element behind an aligned address."""
    room = torch.full((t.numel() + 1,), float("nan"), dtype=t.dtype, device=t.device)
    view = room[1:].view(t.shape)
    view.copy_(t.detach())
    return view.requires_grad_(t.requires_grad)


@pytest.mark.parametrize("layout", [displaced, shifted], ids=lambda f: f.__name__)
@pytest.mark.parametrize(("device", "name", "backend"), backends())
def test_any_layout(device: str, name: str, backend: str, layout: Callable[[torch.Tensor], torch.Tensor]) -> None:
    case = small_case(name)
    for dtype in case.dtypes if device == "cuda" else case.dtypes[:1]:
        require(device, name, backend, dtype)
        inputs = {
            n: layout(v) if isinstance(v, torch.Tensor) and v.is_floating_point() else v
            for n, v in case.inputs(dtype, device).items()
        }
        got = run(function(name), inputs, backend, dtype)
        assert {t.device.type for t in got.values()} == {device}
        judge(got, inputs, name, case, dtype)


@pytest.mark.parametrize(("device", "name", "backend"), backends(reference=False))
def test_the_same_bits_on_every_run(device: str, name: str, backend: str) -> None:
    """A race, or sums in the order of arrival, would move the last bits."""
    require(device, name, backend)
    taken = [c for c in cases(name) if backend not in c.refused_by]
    case = max(taken, key=lambda c: c.elements) if device == "cuda" else small_case(name, packed=True)
    inputs = case.inputs(torch.float32, device)
    first = run(function(name), inputs, backend, torch.float32)
    for _ in range(5):
        again = run(function(name), inputs, backend, torch.float32)
        assert [n for n in first if not torch.equal(first[n], again[n])] == []


@pytest.mark.parametrize(("device", "name", "backend"), backends())
def test_autocast(device: str, name: str, backend: str) -> None:
    """float32 inputs that bfloat16 holds exactly: what differs from float64 is the op's own rounding."""
    require(device, name, backend)
    case = small_case(name)
    if torch.bfloat16 not in case.dtypes:
        pytest.skip(f"{name} takes no bfloat16")
    inputs = {
        n: v.detach().float().requires_grad_(v.requires_grad)
        if isinstance(v, torch.Tensor) and v.is_floating_point()
        else v
        for n, v in case.inputs(torch.bfloat16, device).items()
    }
    with torch.autocast(device, torch.bfloat16):
        got = run(function(name), inputs, backend, torch.bfloat16)
    expected = run(function(name), widened(inputs), "reference", torch.bfloat16)
    wrong = compare(got, expected, case.reduction, case.scales, dict.fromkeys(got, torch.bfloat16))
    assert not wrong, "\n".join(wrong)
    with torch.autocast("cpu", torch.bfloat16):
        on_cpu = function(name)(**{n: v.to("cpu") if hasattr(v, "to") else v for n, v in inputs.items()})
    first = on_cpu[0] if isinstance(on_cpu, tuple) else on_cpu
    assert got["out0"].dtype == first.dtype


# On the CPU two ops show that the test works; tests/ops has the rest there.
@pytest.mark.parametrize(
    ("device", "name", "backend"),
    [p for p in backends(reference=False) if p.values[0] == "cuda" or p.values[1] in ("dyt", "causal_conv1d")],
)
def test_compiles_without_a_graph_break(device: str, name: str, backend: str) -> None:
    require(device, name, backend)
    case = small_case(name)
    torch.compiler.reset()
    # aot_eager: the same tracing without minutes of C++ compilation
    compiled = torch.compile(function(name), fullgraph=True, backend="inductor" if device == "cuda" else "aot_eager")
    inputs = case.inputs(torch.float32, device)
    judge(run(compiled, inputs, backend, torch.float32), inputs, name, case, torch.float32)


@pytest.mark.parametrize("name", [n for n in ("dyt", "derf", "layer_norm") if n in OPS])
@pytest.mark.parametrize(
    ("device", "backend", "rows"),
    [("cpu", "native", 300)] + [pytest.param("cuda", b, 2**21 + 3, marks=GPU) for b in ("triton", "cuda")],
)
def test_beyond_2_to_31_elements(device: str, backend: str, rows: int, name: str) -> None:
    """The last rows of a tensor of more than 2^31 elements are those of a small one: no index is 32 bits wide."""
    if backend not in OPS[name].names:
        pytest.skip(f"{name} has no backend {backend}")
    require(device, name, backend, torch.bfloat16)
    D, last = 1024, 7
    if device == "cuda" and torch.cuda.mem_get_info()[0] < 8 * rows * D * 2:
        pytest.skip("needs 32 GiB of free memory on the GPU")
    g = torch.Generator(device).manual_seed(0)
    x, grad = (torch.randn(rows, D, generator=g, device=device, dtype=torch.bfloat16) for _ in range(2))
    numbers = {"dyt": (0.7,), "derf": (0.7, 0.1), "layer_norm": ()}[name]
    scalars = [torch.full((1,), v, device=device) for v in numbers]
    rest = [torch.randn(D, generator=g, device=device) for _ in range(2)]

    def outputs(x: torch.Tensor, grad: torch.Tensor) -> Iterator[torch.Tensor]:
        x = x.detach().requires_grad_()
        y = function(name)(x, *scalars, *rest, backend=backend)
        yield y.detach()[-last:]
        yield torch.autograd.grad(y, x, grad)[0][-last:]

    pairs = zip(outputs(x, grad), outputs(x[-last:].clone(), grad[-last:].clone()), strict=True)
    for whole, alone in pairs:
        assert torch.equal(whole, alone)


# ---- only a GPU has these ------------------------------------------------------------------------------------


@GPU
@pytest.mark.parametrize(("device", "name", "backend"), backends(("cuda",)))
def test_launches_go_to_the_current_stream(device: str, name: str, backend: str) -> None:
    """The inputs are NaN until a stream that has been asleep fills them; a launch on another stream would read NaN."""
    require(device, name, backend)
    case = small_case(name)
    inputs = case.inputs(torch.float32, device)
    run(function(name), inputs, backend, torch.float32)  # compiled, loaded and allocated before the clock runs
    late = {
        n: torch.full_like(v, float("nan")).requires_grad_(v.requires_grad)
        for n, v in inputs.items()
        if isinstance(v, torch.Tensor) and v.is_floating_point()
    }
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(100_000_000)  # cycles: some 50 ms
        with torch.no_grad():
            for n, v in late.items():
                v.copy_(inputs[n])
        got = run(function(name), inputs | late, backend, torch.float32)
    side.synchronize()
    judge(got, inputs, name, case, torch.float32)


@GPU
@pytest.mark.parametrize(("device", "name", "backend"), backends(("cuda",)))
def test_runs_on_a_device_that_is_not_the_current_one(device: str, name: str, backend: str) -> None:
    require(device, name, backend)
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device")
    case = small_case(name)
    inputs = case.inputs(torch.float32, "cuda:1")
    got = run(function(name), inputs, backend, torch.float32)
    assert {t.device.index for t in got.values()} == {1}
    judge(got, inputs, name, case, torch.float32)


@GPU
@pytest.mark.parametrize(("device", "name", "backend"), backends(("cuda",)))
def test_the_host_does_not_wait(
    device: str, name: str, backend: str, record_property: Callable[[str, object], None]
) -> None:
    """A kernel never makes the host wait. A reference may; which one does is recorded."""
    require(device, name, backend)
    inputs = small_case(name).inputs(torch.float32, device)
    leaves = [v for v in inputs.values() if isinstance(v, torch.Tensor) and v.requires_grad]

    def call() -> None:
        result = function(name)(**inputs, backend=backend)
        outputs = [o for o in (result if isinstance(result, tuple) else (result,)) if isinstance(o, torch.Tensor)]
        outputs = [o for o in outputs if o.requires_grad]
        if outputs and leaves:
            torch.autograd.grad(outputs, leaves, [torch.ones_like(o) for o in outputs], allow_unused=True)

    call()
    try:
        torch.cuda.set_sync_debug_mode("error")
        call()
    except RuntimeError as error:
        if backend != "reference" or "synchroniz" not in str(error):
            raise
        record_property("host_waits", name)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@GPU
@pytest.mark.parametrize("folder", dict.fromkeys(op.kernels for op in OPS.values() if "triton" in op.names))
def test_every_shipped_configuration_runs(folder: str, record_property: Callable[[str, object], None]) -> None:
    """Of this architecture's configurations none is left out by the cases, and nothing is launched that no op lists."""
    names = [n for n, op in OPS.items() if op.kernels == folder and "triton" in op.names]
    require("cuda", names[0], "triton")
    major, minor = torch.cuda.get_device_capability()
    arch = max((a for a in ARCHS if a <= 10 * major + minor), default=ARCHS[0])
    modules = {op.kernels: op.module("triton") for op in OPS.values() if "triton" in op.names}
    by_folder = {f: [c for c in m.configurations() if arch in c.archs] for f, m in modules.items()}
    shipped = by_folder[folder]
    with recorded_launches() as seen:
        for name, case in ((n, c) for n in names for c in cases(n)):
            for dtype in case.dtypes:
                run(function(name), case.inputs(dtype, "cuda"), "triton", dtype)
    torch.cuda.synchronize()
    listed = [c for found in by_folder.values() for c in found]
    unlisted = [launch for launch in seen if not any(c.covers(launch) for c in listed)]
    assert not unlisted, f"not a shipped configuration: {unlisted[0]}"
    unreached = [c.name for c in shipped if not any(map(c.covers, seen))]
    assert not unreached, f"never launched: {', '.join(unreached)}"
    record_property("configurations", [folder.rpartition(".")[2], len(shipped)])
