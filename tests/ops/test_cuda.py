"""The CUDA C++ kernels without a GPU: run under an emulation, compiled for every architecture, loaded and refused.

The emulation (cuda_emulation/) compiles csrc/*/*_cuda.cu with g++; results of both compilers are kept in pytest's cache
by a hash of the sources.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import itertools
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import ultra_kernels
from ultra_kernels import _cuda, _native, derf, dyt, pack_ternary, ternary_linear, ternary_matmul
from ultra_kernels._dispatch import OPS, BackendUnavailable
from ultra_kernels._testing import Case, cases, compare, run, widened
from ultra_kernels._version import __version__
from ultra_kernels.bitlinear.cases import tokens_at_ties
from ultra_kernels.bitlinear.reference import quantize_tokens
from ultra_kernels.selective_scan import cuda as scan_cuda
from ultra_kernels.selective_scan.cases import scan_inputs
from ultra_kernels.selective_scan.op import SEGMENT

CSRC = Path(__file__).resolve().parent.parent.parent / "csrc"
EMULATION = Path(__file__).resolve().parent / "cuda_emulation"
CXX, NVCC = shutil.which("g++"), shutil.which("nvcc")
SOURCES = sorted(CSRC.glob("*/*_cuda.cu"))
NAMES = [name for name, op in OPS.items() if "cuda" in op.names]
needs_emulation = pytest.mark.skipif(CXX is None, reason="g++ is not installed: nothing can emulate the GPU")
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="nvcc is not installed: the kernels cannot be compiled for a GPU")
DEFINES = [f'-DULTRA_VERSION="{__version__}"', '-DULTRA_ARCHS="sm_80 compute_90"']


def key(command: list[str]) -> str:
    """Changes with the compiler, its options, and every source that it may read."""
    version = subprocess.run([command[0], "--version"], capture_output=True, text=True, check=True).stdout
    files = sorted([*CSRC.rglob("*.cu"), *CSRC.rglob("*.cuh"), *EMULATION.iterdir()])
    return hashlib.sha256(repr([version, command, *(f.read_text() for f in files)]).encode()).hexdigest()[:32]


# ---- the emulated GPU ------------------------------------------------------------------------------------------------


def emulated_library(folder: Path) -> Path:
    assert CXX is not None
    command = [CXX, "-std=c++20", "-O1", "-Wall", "-Werror", "-Wno-unknown-pragmas", "-fPIC", "-shared", "-pthread",
               "-fsanitize=alignment", "-fsanitize-undefined-trap-on-error",
               f"-I{EMULATION}", f"-I{CSRC}", *DEFINES, "-x", "c++", *map(str, SOURCES)]  # fmt: skip
    library = folder / key(command) / "libultra_cuda.so"
    if not library.is_file():
        library.parent.mkdir(exist_ok=True)
        fresh = library.with_suffix(f".{os.getpid()}")  # another test process may do the same
        done = subprocess.run([*command, "-o", str(fresh)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        fresh.replace(library)
    return library


@pytest.fixture
def clean_caches():
    """The library is looked for anew, before the test and after it."""

    cached = (_cuda.load, _cuda.missing, _cuda._function)  # now: a test may put others in their places

    def clear() -> None:
        for function in cached:
            function.cache_clear()
        _cuda._proven.clear()

    clear()
    yield
    clear()


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, pytestconfig: pytest.Config, clean_caches: None) -> ctypes.CDLL:
    """A CPU that passes as a GPU: CPU tensors run on backend "cuda", on the emulated library."""
    folder = emulated_library(pytestconfig.cache.mkdir("cuda_emulation")).parent
    monkeypatch.setattr(_native, "folders", lambda: [folder])
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 0, raising=False)
    for name in NAMES:
        monkeypatch.setitem(OPS[name]._why_not, "cuda", lambda tensor, *args: None)
    return _cuda.load()


@pytest.fixture
def poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs that a kernel forgets to write are NaN, or -7 among integers."""
    for holder, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        real = getattr(holder, name)

        def poisoned(*args, _real=real, **options):
            t = _real(*args, **options)
            return t.fill_(float("nan") if t.is_floating_point() else -7)

        monkeypatch.setattr(holder, name, poisoned)


@needs_emulation
@pytest.mark.parametrize(
    ("name", "case", "dtype"),
    [
        pytest.param(name, case, dtype, id=f"{name}-{case.name}-{str(dtype)[6:]}")
        for name in NAMES
        for case in cases(name)
        if "cuda" not in case.refused_by
        for dtype in case.dtypes
        if case.elements < (10**6 if dtype == torch.float32 else 10**5)
    ],
)
def test_against_float64(name: str, case: Case, dtype: torch.dtype, gpu: ctypes.CDLL, poisoned_empty: None) -> None:
    function, inputs = getattr(ultra_kernels, name), case.inputs(dtype)
    expected = run(function, widened(inputs), "reference", dtype)
    got = run(function, inputs, "cuda", dtype)
    wrong = compare(got, expected, case.reduction, case.scales, dict.fromkeys(case.through_half, dtype), case.roundings)
    assert not wrong, "\n".join(wrong)


def norm_inputs(rows: int, D: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """x, alpha, shift, weight, bias."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(rows, D, generator=g).to(dtype)
    leaves = [x, torch.tensor([0.6]), torch.tensor([0.3]), *torch.randn(2, D, generator=g)]
    return [t.requires_grad_() for t in leaves]


def norm_gradients(function, leaves: list[torch.Tensor], backend: str) -> list[torch.Tensor | None]:
    x, alpha, shift, weight, bias = leaves
    y = function(x, alpha, *((shift,) if function is derf else ()), weight, bias, backend=backend)
    cotangent = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(x.dtype)
    return [y, *torch.autograd.grad(y, leaves, cotangent.to(x), allow_unused=True)]


@needs_emulation
@pytest.mark.parametrize("function", [dyt, derf])
@pytest.mark.parametrize(
    ("rows", "D", "offset"), [(300, 8, 0), (33, 1000, 0), (40, 256, 1)], ids=["blocks", "tiles", "unaligned"]
)
def test_many_blocks_and_addresses_between_vectors(function, rows, D, offset, gpu, poisoned_empty):
    """Several row blocks; more column tiles than the grid has rows; a weight that starts between two vectors."""
    ctypes.c_uint.in_dll(gpu, "emulation_max_grid_y").value = 3
    try:
        leaves = norm_inputs(rows, D)
        leaves[3] = torch.randn(D + offset, generator=torch.Generator().manual_seed(2))[offset:].requires_grad_()
        assert leaves[3].data_ptr() % 16 == 4 * offset
        got, again = (norm_gradients(function, leaves, "cuda") for _ in range(2))
    finally:
        ctypes.c_uint.in_dll(gpu, "emulation_max_grid_y").value = 65535
    want = norm_gradients(function, [t.detach().double().requires_grad_() for t in leaves], "reference")
    for i, (a, b, c) in enumerate(zip(got, again, want, strict=True)):
        assert (a is None) == (c is None)
        if a is not None and b is not None and c is not None:
            assert torch.equal(a, b), "the same bits on every run"
            terms = rows * D / c.numel()  # of size up to 1 each
            limit = 4 * torch.finfo(torch.float32).eps * max(terms**0.5, float(c.detach().abs().max()))
            assert float((a.double() - c).detach().abs().max()) <= limit, i


@needs_emulation
@pytest.mark.parametrize(("function", "truth"), [(dyt, torch.tanh), (derf, torch.special.erf)])
def test_relative_accuracy_from_tiny_to_large(function, truth, gpu):
    x = torch.cat([torch.logspace(-30, 2, 4096), torch.linspace(0.5, 4.5, 4094)])
    x = torch.cat([x, -x, torch.tensor([0.0, float("inf"), -float("inf"), float("nan")])]).view(128, 128)
    scalars = (torch.ones(1), torch.zeros(1)) if function is derf else (torch.ones(1),)
    got = function(x, *scalars, torch.ones(128), torch.zeros(128), backend="cuda").double()
    want = truth(x.double())
    assert torch.equal(got.isnan(), want.isnan())
    fine = ~want.isnan() & (want != 0)
    assert ((got - want).abs() / want.abs())[fine].max() <= 3 * torch.finfo(torch.float32).eps
    assert not got[want == 0].any()


SEQUENCE_OPS = ["selective_scan", "bidirectional_scan", "causal_conv1d"]


def sequence_inputs(name: str, batch: int, channels: int, length: int, states: int = 4, **options) -> dict:
    g = torch.Generator().manual_seed(3)
    if name == "causal_conv1d":
        x, weight = torch.randn(batch, channels, length, generator=g), torch.randn(channels, 4, generator=g)
        return {"x": x, "weight": weight, "activation": "silu"}
    directions = (2,) if name == "bidirectional_scan" else ()
    made = scan_inputs(g, batch, channels, length, states, directions=directions, **options)
    return {k: v.float() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in made.items()}


def agrees(name: str, args: dict, terms: int) -> dict[str, torch.Tensor]:
    """What backend "cuda" makes of the arguments; outputs and gradients are those of the float64 reference."""
    function, args = getattr(ultra_kernels, name), dict(args)
    for k, v in args.items():
        if torch.is_tensor(v) and v.is_floating_point():
            args[k] = v.detach().requires_grad_()
    got = run(function, args, "cuda", torch.float32)
    wrong = compare(got, run(function, widened(args), "reference", torch.float32), terms)
    assert not wrong, "\n".join(wrong)
    return got


@needs_emulation
@pytest.mark.parametrize("busy", [1, 3, 1000])
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("cu", [None, (0, 3, 3, 70, 130, 197, 197)])
def test_one_run_of_segments_or_many(busy, direction, cu, gpu, poisoned_empty, monkeypatch):
    """Time in one run, in three, in as many as there are segments."""
    monkeypatch.setattr(scan_cuda, "BUSY_ELSEWHERE", (busy, busy))
    args = sequence_inputs("selective_scan", 1, 5, 197, states=18, cu=cu)
    args |= {"direction": direction, "return_last_state": True}
    got, again = (agrees("selective_scan", args, 197 * 197 * 18) for _ in range(2))
    assert all(torch.equal(got[k], again[k]) for k in got), "the same bits on every run"


@needs_emulation
@pytest.mark.parametrize("name", SEQUENCE_OPS[:2])
@pytest.mark.parametrize(("D", "L", "N"), [(2, 1, 33), (65, 64, 16), (33, 65, 1), (2, 128, 256)])
def test_edges_of_the_scans(name, D, L, N, gpu, poisoned_empty):
    agrees(name, sequence_inputs(name, 1, D, L, N), max(L, D) * L * N)


@needs_emulation
@pytest.mark.parametrize("name", SEQUENCE_OPS)
def test_every_tensor_may_lie_in_an_order_of_its_own(name, gpu, poisoned_empty):
    """Rows and columns mixed, gaps between rows, addresses between two vectors; the same numbers as from plain ones."""
    args = sequence_inputs(name, 2, 40, 70)
    plain = agrees(name, args, 70 * 70 * 8)
    wide = torch.randn(2, 70, 82)
    for i, k in enumerate(k for k in ("x", "u", "z") if k in args):
        wide[..., 41 * i + 1 : 41 * i + 41] = args[k].transpose(1, 2)
        args[k] = wide[..., 41 * i + 1 : 41 * i + 41].transpose(1, 2)
    got = agrees(name, args, 70 * 70 * 8)
    assert all(torch.equal(got[k], plain[k]) for k in got)
    assert got["out0"].transpose(1, 2).is_contiguous()


@needs_emulation
@pytest.mark.parametrize("name", SEQUENCE_OPS)
def test_dtypes_mix(name, gpu):
    args = sequence_inputs(name, 1, 20, 70)
    first = next(iter(args))
    mixed = args | {first: args[first].bfloat16()} | ({"z": args["z"].half()} if "z" in args else {})
    got = getattr(ultra_kernels, name)(**mixed, backend="cuda")
    want = getattr(ultra_kernels, name)(**widened(mixed), backend="reference")
    assert got.dtype == torch.bfloat16
    assert ((got.double() - want).abs() <= torch.finfo(torch.bfloat16).eps * want.abs() + 1e-5).all()


@needs_emulation
@pytest.mark.parametrize("name", SEQUENCE_OPS)
@pytest.mark.parametrize("border", [5, 64, 66])
def test_nothing_leaks_across_a_border(name, border, gpu):
    """NaN on one side of it stays there, values and gradients."""
    args = sequence_inputs(name, 1, 3, 140)
    cu = torch.tensor([0, border, border, 140], dtype=torch.int32)
    first = next(iter(args))
    for side, other in ((slice(0, border), slice(border, 140)), (slice(border, 140), slice(0, border))):
        x = args[first].clone()
        x[..., side] = float("nan")
        x.requires_grad_()
        out = getattr(ultra_kernels, name)(**(args | {first: x}), cu_seqlens=cu, backend="cuda")
        assert out[..., other].isfinite().all()
        (dx,) = torch.autograd.grad(out[..., other].sum(), x)
        assert dx[..., other].isfinite().all()


@needs_emulation
@pytest.mark.parametrize("name", SEQUENCE_OPS)
def test_no_tokens_and_no_channels(name, gpu):
    for shape in ((2, 5, 0), (0, 5, 3)):
        args = sequence_inputs(name, *shape)
        args = {k: v.requires_grad_() if torch.is_tensor(v) else v for k, v in args.items()}
        out = getattr(ultra_kernels, name)(**args, backend="cuda")
        assert out.shape == shape
        for grad in torch.autograd.grad(out.sum(), [v for v in args.values() if torch.is_tensor(v)]):
            assert not grad.any()


@needs_emulation
@pytest.mark.parametrize("name", ["selective_scan", "causal_conv1d"])
def test_many_batch_rows_and_far_apart(name, gpu):
    """More blocks than 65535, which two of the grid's axes cannot have, and offsets beyond 2^31 elements."""
    many = sequence_inputs(name, 65537, 1, 1, states=1)
    want = getattr(ultra_kernels, name)(**many, backend="reference")
    torch.testing.assert_close(getattr(ultra_kernels, name)(**many, backend="cuda"), want)
    args = sequence_inputs(name, 2, 3, 5)
    first, far = next(iter(args)), torch.empty(2**31 + 64, dtype=torch.bfloat16)  # pages nobody touches are not there
    spread = far.as_strided((2, 3, 5), (2**31 + 16, 5, 1))
    args[first] = spread.copy_(args[first])
    torch.testing.assert_close(
        getattr(ultra_kernels, name)(**args, backend="cuda"), getattr(ultra_kernels, name)(**args, backend="reference")
    )


def ternary(M: int, N: int, K: int) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(4)
    return (
        torch.randint(-128, 128, (M, K), generator=g, dtype=torch.int8),
        torch.randint(-1, 2, (N, K), generator=g, dtype=torch.int8),
    )


@needs_emulation
@pytest.mark.parametrize("M", [0, 1, 2, 3, 7, 8])
@pytest.mark.parametrize(("N", "K"), [(1, 1), (1, 130), (33, 4), (17, 63), (5, 1000), (0, 5), (5, 0)])
def test_ternary_products_are_exact(M, N, K, gpu, poisoned_empty):
    """Every number of rows; columns within a block, within a warp's load, and of several loads."""
    x, weights = ternary(M, N, K)
    y = ternary_matmul(x, pack_ternary(weights, torch.tensor(1.0)), backend="cuda")
    assert y.dtype == torch.int32 and torch.equal(y.long(), x.long() @ weights.long().t())


@needs_emulation
@pytest.mark.parametrize("value", [127, -127, -128])
def test_extreme_ternary_sums_do_not_saturate(value, gpu):
    K = 4100
    x, w = torch.full((2, K), value, dtype=torch.int8), torch.ones(3, K, dtype=torch.int8)
    w[1], w[2, ::2] = -1, 0
    y = ternary_matmul(x, pack_ternary(w, torch.tensor(1.0)), backend="cuda")
    assert y.tolist() == [[value * K, -value * K, value * (K // 2)]] * 2


@needs_emulation
@pytest.mark.parametrize(("N", "K", "splits"), [(3, 80_001, 2), (4097, 20, 1)])
def test_few_panels_are_cut_and_many_have_small_blocks(N, K, splits, gpu, poisoned_empty):
    assert _cuda.count("ternary_splits", -(-N // 16), -(-K // 16)) == splits
    x, weights = ternary(2, N, K)
    packed = pack_ternary(weights, torch.tensor(0.5))
    y = ternary_matmul(x, packed, backend="cuda")
    assert torch.equal(y.long(), x.long() @ weights.long().t())
    tokens, bias = torch.randn(1, K), torch.randn(N)
    got, want = (ternary_linear(tokens, packed, bias, backend=b) for b in ("cuda", "reference"))
    torch.testing.assert_close(got, want, rtol=2e-6, atol=2e-6 * float(want.abs().max()))


def quantised(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    (M, K), width = x.shape, x.shape[1] + -x.shape[1] % 16
    codes, step = torch.full((M, width), 77, dtype=torch.int8), torch.empty(M)
    _cuda.launch("ternary_quantize", x, codes, step, M, K, width, _native.DTYPES[x.dtype])
    assert not codes[:, K:].any()
    return codes[:, :K].float(), step


@needs_emulation
def test_tokens_at_ties_are_quantised_to_the_last_bit(gpu):
    x = tokens_at_ties(torch.Generator().manual_seed(0), 30)
    assert torch.equal(quantised(x)[0], quantize_tokens(x)[0])


@needs_emulation
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("K", "offset"), [(1, 0), (61, 0), (2064, 0), (2064, 1)])
def test_tokens_are_quantised_to_the_last_bit(K, offset, dtype, gpu):
    """Codes and steps of the definition, ties among them, with whole vectors and element by element."""
    x = torch.randn(6, K, generator=torch.Generator().manual_seed(0)).to(dtype)
    x[1, : K // 2] = ((torch.arange(K // 2) % 127 + 0.5) * (-1.0) ** torch.arange(K // 2)).to(dtype)
    x[1, -1], x[2], x[3] = 127.0, 0.0, 0.0
    x[3, 0] = 3e-6
    held = torch.empty(6 * K + offset, dtype=dtype)[offset:].view(6, K).copy_(x)
    codes, step = quantised(held)
    want, want_step = quantize_tokens(x)
    assert torch.equal(codes, want) and torch.equal(step, want_step[:, 0])


@needs_emulation
def test_ternary_rows_of_nan_and_inf_are_not_hidden(gpu):
    x, packed = torch.randn(4, 40), pack_ternary(ternary(1, 5, 40)[1], torch.tensor(0.5))
    x[0, 2], x[1, 3], x[2] = float("nan"), -float("inf"), 0.0
    y = ternary_linear(x, packed, torch.arange(5.0), backend="cuda")
    assert not y[:2].isfinite().any() and torch.equal(y[2], torch.arange(5.0)) and y[3].isfinite().all()


@needs_emulation
def test_a_row_between_two_vectors_and_another_dtype_of_the_bias(gpu):
    x, weights = ternary(3, 20, 48)
    held = torch.empty(3 * 48 + 1, dtype=torch.int8)[1:].view(3, 48).copy_(x)
    packed = pack_ternary(weights, torch.tensor(0.5))
    assert torch.equal(ternary_matmul(held, packed, backend="cuda").long(), x.long() @ weights.long().t())
    for dtype in (torch.float16, torch.bfloat16):
        bias, tokens = torch.linspace(-1, 1, 40).to(dtype)[::2], torch.randn(3, 48)
        got, want = (ternary_linear(tokens, packed, bias, backend=b) for b in ("cuda", "reference"))
        torch.testing.assert_close(got, want)


def test_more_rows_than_the_kernels_take_are_refused(monkeypatch):
    monkeypatch.setattr(_cuda, "why_not", lambda *args, **options: None)
    packed = pack_ternary(ternary(1, 5, 40)[1], torch.tensor(0.5))
    with pytest.raises(BackendUnavailable, match="up to 8 rows, x has 9"):
        ternary_matmul(torch.zeros(9, 40, dtype=torch.int8), packed, backend="cuda")
    with pytest.raises(BackendUnavailable, match="up to 8 rows, x has 9"):
        ternary_linear(torch.zeros(3, 3, 40), packed, backend="cuda")


@needs_emulation
def test_segments_are_those_of_the_op(gpu):
    assert _cuda.count("selective_scan_segment") == SEGMENT


@needs_emulation
@pytest.mark.parametrize("name", NAMES)
def test_opcheck_and_compile(name, gpu, monkeypatch):
    """torch's audit of the registration, and a trace without a graph break, with backend "cuda"."""
    case = min(cases(name), key=lambda c: c.elements)
    inputs, function = case.inputs(torch.float32), functools.partial(getattr(ultra_kernels, name), backend="cuda")
    calls: list[tuple] = []

    class Spy(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            if op.namespace == "ultra_kernels":
                calls.append((op, args))
            return op(*args, **(kwargs or {}))

    with Spy():
        function(**inputs)
    for op, args in calls:
        fresh = (a.detach().clone().requires_grad_(a.is_floating_point()) if torch.is_tensor(a) else a for a in args)
        torch.library.opcheck(op, tuple(fresh))
    leaves = [v for v in inputs.values() if torch.is_tensor(v) and v.requires_grad]

    if not leaves:  # an op without a gradient
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        return torch.testing.assert_close(compiled(**inputs), function(**inputs))

    def loss(kw: dict) -> torch.Tensor:
        out = function(**kw)
        return out[0].square().sum() + out[1].square().sum() if isinstance(out, tuple) else out.square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    eager = torch.autograd.grad(loss(inputs), leaves)
    for a, b in zip(eager, torch.autograd.grad(compiled(inputs), leaves), strict=True):
        torch.testing.assert_close(a, b)


@needs_emulation
def test_the_emulation_runs_the_probe_and_reports_errors(gpu):
    assert gpu.ultra_cuda_probe() == 0
    x = torch.zeros(4)
    with pytest.raises(RuntimeError, match="dyt_forward: CUDA error 9: invalid configuration argument"):
        _cuda.launch("dyt_forward", x, x, x, x, x, 0, 4, 0)  # no rows make an empty grid


def test_tensors_on_two_devices_are_refused():
    class OnGpu(torch.Tensor):
        def get_device(self) -> int:
            return 0

    with pytest.raises(ValueError, match=r"dyt: the first tensor is on .*, another on cpu; all must be on one GPU"):
        _cuda.launch("dyt", torch.zeros(4).as_subclass(OnGpu), torch.zeros(4))


# ---- loading, and what stands against a GPU --------------------------------------------------------------------------


@needs_emulation
def test_another_version_or_abi_is_refused(gpu, monkeypatch):
    monkeypatch.setattr(_cuda, "ABI", 0)
    _cuda.load.cache_clear()
    assert "ABI 4; need" in str(_cuda.missing())
    with pytest.raises(_cuda.CudaUnavailable, match=r"need .*, ABI 0"):
        _cuda.load()


def test_no_library_and_a_broken_one(monkeypatch, tmp_path, clean_caches):
    monkeypatch.setattr(_native, "folders", lambda: [tmp_path])
    assert _cuda.missing() == "the CUDA library was not built"
    (tmp_path / "_build_info.json").write_text(json.dumps({"cuda": {"state": "absent", "reason": "no nvcc found"}}))
    _cuda.missing.cache_clear()
    assert _cuda.missing() == "no nvcc found"
    (tmp_path / "libultra_cuda.so").write_bytes(b"not a library")
    _cuda.missing.cache_clear()
    assert str(tmp_path / "libultra_cuda.so") in str(_cuda.missing())


@pytest.mark.skipif(_cuda.missing() is not None, reason=str(_cuda.missing()))
def test_the_library_that_was_built():
    """It keeps CUDA's runtime to itself: torch's own, perhaps of another version, has the same names."""
    library = _cuda.load()
    assert set(_cuda.archs()) and all(re.fullmatch(r"(sm|compute)_\d+[af]?", arch) for arch in _cuda.archs())
    assert not hasattr(library, "cudaLaunchKernelExC") and not hasattr(library, "cudaGetDevice")
    if library.ultra_cuda_driver() == 0:  # no driver: an error to report, not a crash
        assert "driver" in _cuda._text(library.ultra_cuda_error, library.ultra_cuda_probe())


def test_cpu_tensors_and_other_dtypes_are_refused():
    x = torch.ones(2, 3)
    with pytest.raises(BackendUnavailable, match="the CUDA kernels run on an NVIDIA GPU, this tensor is on cpu"):
        dyt(x, torch.ones(1), torch.ones(3), torch.zeros(3), backend="cuda")

    class OnGpu:
        device, dtype = torch.device("cuda", 0), torch.float64

    assert "not float64" in str(_cuda.why_not(OnGpu()))


@pytest.fixture
def pretend(gpu, monkeypatch):
    """A driver, a library and a GPU with these properties; the capability is that of an H100 unless changed."""
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "device", lambda index: torch._dynamo.config.patch())

    class Library:
        ultra_cuda_error, ultra_cuda_archs = gpu.ultra_cuda_error, gpu.ultra_cuda_archs
        ultra_cuda_runtime = staticmethod(lambda: 13000)

    def set_up(driver: int = 13000, capability: tuple[int, int] = (9, 0), probe: int = 0) -> None:
        Library.ultra_cuda_driver, Library.ultra_cuda_probe = staticmethod(lambda: driver), staticmethod(lambda: probe)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
        monkeypatch.setattr(_cuda, "load", lambda: Library)
        monkeypatch.setattr(_cuda, "missing", lambda: None)

    return set_up


@needs_emulation
@pytest.mark.parametrize(
    ("state", "reason"),
    [
        ({}, None),
        ({"driver": 13010}, None),
        ({"driver": 12080}, "driver is for CUDA 12.8, the library was built with CUDA 13.0; .* CUDA_HOME=<a CUDA 12 "),
        ({"driver": 0}, "driver is for CUDA 0.0"),
        ({"capability": (8, 6)}, None),
        ({"capability": (12, 0)}, None),
        ({"capability": (7, 5)}, "this GPU is sm_75, the library holds sm_80, compute_90; ULTRA_CUDA_ARCHS=sm_75 pip "),
        ({"probe": 9}, "a test kernel failed with CUDA error 9: invalid configuration argument"),
    ],
)
def test_what_stands_against_a_gpu(state, reason, pretend):
    pretend(**state)
    found = _cuda.unusable(0)
    assert found is None if reason is None else re.search(reason, str(found))


@needs_emulation
def test_the_answer_is_kept_but_not_one_given_during_a_capture(pretend, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    pretend()
    assert "before a CUDA graph" in str(_cuda.unusable(0))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert _cuda.unusable(0) is None
    pretend(probe=9)
    assert _cuda.unusable(0) is None and _cuda.unusable(1) is not None


def test_the_reason_is_a_constant_of_a_trace(monkeypatch):
    monkeypatch.setitem(_cuda._proven, 7, ("a reason", "a remedy"))

    def f(x):
        return x + 1 if _cuda.unusable_constant(7) == "a reason; a remedy" else x

    assert torch.compile(f, fullgraph=True, backend="eager")(torch.zeros(1)) == 1


@pytest.mark.parametrize(
    ("arch", "served"),
    [
        ("sm_80", {(8, 0), (8, 6), (8, 9)}),
        ("sm_90a", {(9, 0)}),
        ("compute_80", {(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)}),
        ("compute_90", {(9, 0), (10, 0), (12, 0)}),
        ("compute_90a", {(9, 0)}),
        ("sm_100f", {(10, 0)}),
        ("sm_120", {(12, 0)}),
    ],
)
def test_which_gpus_an_architecture_serves(arch, served):
    gpus = [(7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)]
    assert {gpu for gpu in gpus if _cuda.serves(arch, gpu)} == served


# ---- what the compilers make of the sources --------------------------------------------------------------------------

SHIPPED = ["sm_80", "sm_90a"]
PTX = "compute_90"  # and what the driver makes of it for GPUs newer than the shipped code
NEWER = ["sm_100", "sm_120"]
# 65536 registers a multiprocessor: two blocks of 256 threads at least; three of 128 for the scans, whose shared memory
# leaves no room for more
REGISTERS, REGISTERS_OF_SCANS = 128, 168


def figures(ptxas_log: str) -> dict[str, tuple[int, int, int]]:
    """kernel -> registers, bytes of spill stores, bytes of spill loads."""
    pattern = (
        r"Function properties for (\S+)\n\s*\d+ bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads\n"
        r".*?Used (\d+) registers"
    )
    found = re.findall(pattern, ptxas_log)
    return {name: (int(registers), int(stores), int(loads)) for name, stores, loads, registers in found}


def compiled(source: Path, arch: str, folder: Path) -> dict[str, tuple[int, int, int]]:
    assert NVCC is not None
    virtual = PTX if arch in NEWER else arch.replace("sm_", "compute_")
    command = [NVCC, "-O3", "-std=c++17", "-cubin", "-Xptxas", "-v", f"-I{CSRC}", *DEFINES,
               "-gencode", f"arch={virtual},code={arch}", str(source)]  # fmt: skip
    result = folder / f"{key(command)}.json"
    if not result.is_file():
        done = subprocess.run([*command, "-o", "/dev/null"], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        result.write_text(json.dumps(figures(done.stdout + done.stderr)))
    found: dict[str, tuple[int, int, int]] = json.loads(result.read_text())
    return found


@needs_nvcc
@pytest.mark.parametrize("arch", [*SHIPPED, *NEWER])
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_shipped_code_does_not_spill(source: Path, arch: str, pytestconfig: pytest.Config) -> None:
    found = compiled(source, arch, pytestconfig.cache.mkdir("cuda_compile"))
    assert found, "a source without a kernel"
    for name, (registers, stores, loads) in found.items():
        assert stores == loads == 0, f"{name} spills {stores} bytes ({registers} registers)"
        most = REGISTERS_OF_SCANS if "scan_" in name else REGISTERS
        assert registers <= most, f"{name} uses {registers} registers"


def test_the_figures_of_ptxas_are_read():
    log = (
        "ptxas info    : Compiling entry function 'k' for 'sm_80'\n"
        "ptxas info    : Function properties for k\n"
        "    16 bytes stack frame, 12 bytes spill stores, 8 bytes spill loads\n"
        "ptxas info    : Used 255 registers, used 1 barriers, 16 bytes cumulative stack size\n"
    )
    assert figures(log) == {"k": (255, 12, 8)}


@needs_nvcc
def test_a_spilling_kernel_is_caught(tmp_path):
    source = tmp_path / "hungry_cuda.cu"
    values = "".join(f"float v{i} = x[{i} * n + threadIdx.x];" for i in range(128))
    sums = "".join(f"y[{i} * n + threadIdx.x] = v{i} / v{(i + 1) % 128};" for i in range(128))
    source.write_text(
        "__global__ void __launch_bounds__(1024, 2) hungry(const float* x, float* y, int n)"
        f"{{ {values} __syncthreads(); {sums} }}"
    )
    ((_, stores, _),) = compiled(source, "sm_80", tmp_path).values()
    assert stores > 0


def test_the_key_follows_the_command():
    commands = [["true", "a"], ["true", "b"]]
    assert key(commands[0]) == key(commands[0]) and len({key(c) for c in commands}) == 2
    assert all(a != b for a, b in itertools.combinations(map(key, commands), 2))
