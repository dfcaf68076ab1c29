"""Packed products of grouped rows: those of `ternary_linear` on each group, to the last bit of the integer product."""

from __future__ import annotations

import pytest
import torch

from ultra_kernels import _cuda, _native, pack_ternary, ternary_linear
from ultra_kernels.ternary.op import LINEAR, grouped_ternary_linear

# How many rows each group has. Two rows at a time, six of them unpacked first without AVX-512, 64 summed at a time.
GROUPS = {
    "one": [9],
    "none-first-and-last": [0, 5, 0, 1, 2, 0],
    "all-on-one": [0, 0, 23, 0],
    "E7": [1, 2, 3, 0, 65, 6, 7],
    "S1": [0, 1, 0],
    "S0": [0, 0],
}
SHAPES = [(1, 1), (17, 63), (48, 32), (70, 130)]


def problem(counts: list[int], N: int, K: int, dtype: torch.dtype = torch.float32, bias: bool = True) -> tuple:
    """The arguments of grouped_ternary_linear, and the packed matrices."""
    g = torch.Generator().manual_seed(len(counts) + N)
    E, S = len(counts), sum(counts)
    packed = [
        pack_ternary(torch.randint(-1, 2, (N, K), generator=g, dtype=torch.int8), torch.rand((), generator=g) + 0.5)
        for _ in range(E)
    ]
    x, b = torch.randn(S, K, generator=g).to(dtype), torch.randn(E, N, generator=g).to(dtype) if bias else None
    codes, scale = torch.stack([p.codes for p in packed]), torch.stack([p.scale for p in packed])
    return (x, codes, scale, (N, K), b, torch.tensor(counts).cumsum(0)), packed


def one_by_one(arguments: tuple, packed: list, backend: str) -> torch.Tensor:
    x, _, _, _, bias, ends = arguments
    counts = torch.diff(ends, prepend=ends.new_zeros(1)).tolist()
    parts = [
        ternary_linear(rows, p, None if bias is None else bias[e], backend=backend)
        for e, (rows, p) in enumerate(zip(x.split(counts), packed, strict=True))
    ]
    return torch.cat(parts)


def require(backend: str) -> None:
    if (reason := LINEAR.why_not(backend, torch.zeros(1, 1))) is not None:
        pytest.skip(reason)


@pytest.mark.parametrize("counts", GROUPS.values(), ids=GROUPS)
@pytest.mark.parametrize("backend", ["native", "triton", "reference"])
def test_groups_are_products_of_their_own(backend: str, counts: list[int]) -> None:
    require(backend)
    for N, K in SHAPES[:3] if backend == "triton" else SHAPES:
        for dtype, bias in ((torch.float32, True), (torch.float16, False)):
            arguments, packed = problem(counts, N, K, dtype, bias)
            got = grouped_ternary_linear(*arguments, backend)
            assert got.dtype == dtype and torch.equal(got, one_by_one(arguments, packed, backend)), (N, K, dtype)
            torch.testing.assert_close(got, one_by_one(arguments, packed, "reference"))


@pytest.mark.skipif(_native.missing() is not None, reason=str(_native.missing()))
def test_groups_with_every_instruction_set_native(isa: str) -> None:
    for counts in GROUPS.values():
        for N, K in SHAPES:
            arguments, packed = problem(counts, N, K)
            got = grouped_ternary_linear(*arguments, "native")
            assert torch.equal(got, one_by_one(arguments, packed, "native")), (counts, N, K)


@pytest.mark.skipif(_native.missing() is not None, reason=str(_native.missing()))
def test_threads_do_not_change_the_bits_native() -> None:
    arguments, packed = problem([70, 1, 0, 200], 200, 300)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(grouped_ternary_linear(*arguments, "native"), one_by_one(arguments, packed, "native"))
    finally:
        torch.set_num_threads(before)


def test_rows_of_any_stride() -> None:
    (_, codes, scale, shape, bias, ends), _ = problem([3, 0, 4], 17, 40)
    wide = torch.randn(14, 90, generator=torch.Generator().manual_seed(3))
    for x in (wide[::2, :40], wide[:7, 45:85], wide.t()[:40, :7].t()):
        backend = LINEAR.choose(None, x, codes)
        want = grouped_ternary_linear(x.contiguous(), codes, scale, shape, bias, ends, backend)
        assert torch.equal(grouped_ternary_linear(x, codes, scale, shape, bias, ends, backend), want)


def test_the_op_is_registered_as_torch_wants_it() -> None:
    arguments, _ = problem([2, 0, 3], 5, 20)
    backend = "native" if LINEAR.why_not("native", torch.zeros(1, 1)) is None else "reference"
    torch.library.opcheck(torch.ops.ultra_kernels.grouped_ternary_linear.default, (*arguments, backend))
    x, *rest = *arguments, backend
    compiled = torch.compile(lambda x: grouped_ternary_linear(x, *rest), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), grouped_ternary_linear(x, *rest))


def test_the_cuda_kernels_leave_groups_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_cuda, "why_not", lambda *args, **kwargs: None)
    x, codes = torch.zeros(2, 16), torch.zeros(2, 1, 1, 64, dtype=torch.uint8)
    assert LINEAR.why_not("cuda", x, codes[0]) is None
    assert "one matrix" in str(LINEAR.why_not("cuda", x, codes))
