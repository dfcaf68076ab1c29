"""What is special to the masked cross-entropy in C++: instruction sets, borders of blocks, extreme logits."""

from __future__ import annotations

import ctypes
import importlib

import pytest
import torch

from ultra_kernels import _native, masked_linear_cross_entropy
from ultra_kernels._testing import Inputs, compare, run, widened

pytestmark = pytest.mark.skipif(_native.missing() is not None, reason=str(_native.missing()))
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def draw(
    T: int = 40, D: int = 17, V: int = 130, *, labelled: float = 0.5, bias: bool = True, ignore_index: int = -100,
    dtype: torch.dtype = torch.float32, **options: object,
) -> Inputs:  # fmt: skip
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(0, V, (T,), generator=g)
    labels[:2] = torch.tensor([0, V - 1])[:T]  # the first and the last class
    dropped = torch.rand(T, generator=g) >= labelled
    dropped[:2] = labelled == 0
    inputs: Inputs = {
        "hidden": torch.randn(T, D, generator=g).to(dtype).requires_grad_(),
        "weight": (torch.randn(V, D, generator=g) * D**-0.5).to(dtype).requires_grad_(),
        "labels": labels.masked_fill(dropped, ignore_index),
        "ignore_index": ignore_index,
    }
    return inputs | ({"bias": torch.randn(V, generator=g).requires_grad_()} if bias else {}) | options


def check(inputs: Inputs) -> None:
    """Loss and every gradient against the reference in float64."""
    dtype, reduction = inputs["hidden"].dtype, max(*inputs["hidden"].shape, len(inputs["weight"]))
    want = run(masked_linear_cross_entropy, widened(inputs), "reference", dtype)
    got = run(masked_linear_cross_entropy, inputs, "native", dtype)
    # of a single class it is 1 - 1
    scales = {"dbias": 1.0} if len(inputs["weight"]) == 1 else {}
    wrong = compare(got, want, reduction, scales, dict.fromkeys(("out0", "dbias"), dtype))
    assert not wrong, "\n".join(wrong)


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.values(), b.values(), strict=True))


@pytest.mark.parametrize("V", [1, 7, 130, 1003])
@pytest.mark.parametrize("D", [1, 17, 96])
@pytest.mark.parametrize("dtype", DTYPES)
def test_shapes(isa: str, V: int, D: int, dtype: torch.dtype) -> None:
    check(draw(D=D, V=V, dtype=dtype))
    check(draw(T=7, D=D, V=V, dtype=dtype, labelled=1.0, bias=False, z_loss=0.02, reduction="sum"))


# Panels are 64 rows or columns wide, tiles 96 classes, in pairs 192; sums take 128 words at a time.
@pytest.mark.parametrize(
    ("T", "D", "V"), [(63, 64, 95), (64, 65, 96), (65, 129, 97), (129, 257, 191), (260, 300, 193), (300, 31, 385)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_borders(isa: str, T: int, D: int, V: int, dtype: torch.dtype) -> None:
    check(draw(T, D, V, labelled=1.0, dtype=dtype, z_loss=0.01))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
def test_several_blocks_of_rows(isa: str, dtype: torch.dtype, bias: bool) -> None:
    """1024 rows are the most of one block; the weight's gradient is added up over three."""
    check(draw(2300, 20, 33, labelled=0.99, dtype=dtype, bias=bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sections_of_several_tiles(isa: str, dtype: torch.dtype) -> None:
    """16 MiB are 13 sections of dx [1000, 320], or 4 of [1000, 1024]."""
    check(draw(1000, 257, 3001, labelled=1.0, dtype=dtype))
    check(draw(1000, 1000, 1003, labelled=1.0, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_vocabulary(dtype: torch.dtype) -> None:
    """50,001 classes: 64 sections of eight tiles or nine, in pairs of four or five."""
    check(draw(90, 24, 50_001, dtype=dtype))


@pytest.mark.parametrize("labelled", [0.0, 1.0])
@pytest.mark.parametrize("T", [0, 1, 2, 50])
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_row_and_every_row(T: int, labelled: float, dtype: torch.dtype) -> None:
    check(draw(T, labelled=labelled, dtype=dtype, z_loss=0.1))


@pytest.mark.parametrize("row", [0, 20, 39])
def test_one_row(row: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Zeros before it and after it, whatever was in memory."""
    inputs, real = draw(labelled=1.0), torch.empty
    inputs["labels"][torch.arange(40) != row] = -100
    monkeypatch.setattr(torch, "empty", lambda *args, **options: real(*args, **options).fill_(torch.nan))
    check(inputs)


@pytest.mark.parametrize("ignore_index", [0, 5, -1, 10**12])
def test_ignored_label(ignore_index: int) -> None:
    check(draw(ignore_index=ignore_index))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1e4, -1e4])
def test_extreme_logits(isa: str, size: float, dtype: torch.dtype) -> None:
    """Some of ±1e4: probabilities are 0 and 1, and shares of classes that tie are exact."""
    inputs = draw(30, 8, 300, labelled=1.0, bias=False, dtype=dtype)
    with torch.no_grad():
        inputs["weight"].zero_()
        inputs["weight"][[3, 250], 0] = size  # of two tiles
        inputs["hidden"][:, 0] = 1.0
    got = run(masked_linear_cross_entropy, inputs, "native", dtype)
    assert all(t.isfinite().all() for t in got.values())
    check(inputs)


def test_a_class_may_be_ruled_out() -> None:
    """A bias of -inf; a tile of 96 such classes too."""
    inputs = draw(V=300, labelled=1.0)
    with torch.no_grad():
        inputs["bias"][100:299] = -torch.inf
    inputs["labels"] %= 100
    got = run(masked_linear_cross_entropy, inputs, "native", torch.float32)
    want = run(masked_linear_cross_entropy, inputs, "reference", torch.float32)
    for name, value in got.items():
        torch.testing.assert_close(value, want[name], rtol=1e-5, atol=1e-6)
    assert not got["dweight"][100:299].any() and got["dweight"][299].any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_shows(bad: float) -> None:
    inputs = draw(labelled=1.0, bias=False)
    with torch.no_grad():
        inputs["hidden"][3, 2] = bad
    assert masked_linear_cross_entropy(**inputs, backend="native").isnan()


def test_any_stride() -> None:
    inputs = draw(50, 24, 97)
    want = run(masked_linear_cross_entropy, inputs, "native", torch.float32)
    for name in ("hidden", "weight", "bias", "labels"):
        wide = torch.stack([inputs[name].detach()] * 2, -1)[..., 0]
        wide = wide.requires_grad_(wide.is_floating_point())
        assert equal(run(masked_linear_cross_entropy, inputs | {name: wide}, "native", torch.float32), want)
    for name in ("hidden", "weight"):  # rows with gaps are read in place
        gaps = torch.nn.functional.pad(inputs[name].detach(), (3, 4))[:, 3:-4].requires_grad_()
        assert equal(run(masked_linear_cross_entropy, inputs | {name: gaps}, "native", torch.float32), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_do_not_change_the_bits(dtype: torch.dtype) -> None:
    inputs = draw(1200, 97, 1003, labelled=0.9, dtype=dtype)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        want = run(masked_linear_cross_entropy, inputs, "native", dtype)
        torch.set_num_threads(3)
        assert equal(run(masked_linear_cross_entropy, inputs, "native", dtype), want)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_autocast_rounds_operands_and_not_gradients(isa: str, half: torch.dtype) -> None:
    inputs = draw(70, 33, 200)
    with torch.autocast("cpu", half):
        got = run(masked_linear_cross_entropy, inputs, "native", torch.float32)
    rounded = {n: v.detach().to(half).requires_grad_() if n in ("hidden", "weight") else v for n, v in inputs.items()}
    want = run(masked_linear_cross_entropy, rounded, "native", torch.float32)
    assert torch.equal(got["out0"], want["out0"]) and torch.equal(got["dbias"], want["dbias"])
    for name in ("dhidden", "dweight"):
        assert got[name].dtype == torch.float32 and want[name].dtype == half
        torch.testing.assert_close(got[name].to(half), want[name])
        assert not torch.equal(got[name], got[name].to(half).float())


def test_mixed_dtypes() -> None:
    """Products have the dtype of hidden."""
    inputs = draw()
    narrow = inputs | {"weight": inputs["weight"].detach().bfloat16().requires_grad_()}
    wide = inputs | {"weight": narrow["weight"].detach().float().requires_grad_()}
    got, want = (run(masked_linear_cross_entropy, i, "native", torch.float32) for i in (narrow, wide))
    assert torch.equal(got["out0"], want["out0"]) and torch.equal(got["dhidden"], want["dhidden"])
    torch.testing.assert_close(got["dweight"], want["dweight"].bfloat16())


@pytest.mark.parametrize("frozen", ["hidden", "weight", "bias"])
def test_frozen_tensors_get_no_gradient(frozen: str) -> None:
    inputs = draw()
    want = run(masked_linear_cross_entropy, inputs, "native", torch.float32)
    got = run(masked_linear_cross_entropy, inputs | {frozen: inputs[frozen].detach()}, "native", torch.float32)
    assert want.keys() - got.keys() == {f"d{frozen}"} and all(torch.equal(got[n], want[n]) for n in got)


def test_loss_without_gradients_is_the_same() -> None:
    inputs = draw()
    with torch.no_grad():
        quiet = masked_linear_cross_entropy(**inputs, backend="native")
    assert torch.equal(quiet, masked_linear_cross_entropy(**inputs, backend="native").detach())


@pytest.mark.parametrize(("D", "half"), [(384, False), (768, False), (384, True), (768, True)])
def test_scratch_memory(D: int, half: bool) -> None:
    """614 rows of 50,000: a quarter of the three [M, V] of float32 that log_softmax and its gradient take."""
    C_, M, V = _native.load(), 614, 50_000
    if half and not C_.cross_entropy_has_pairs():
        pytest.skip("no products of bfloat16")
    there, dtype = 64, 1 if half else 0
    matrix = [there, D, dtype]
    call = C_.CrossEntropy(
        (4096, M, D, V), half, matrix, matrix, there, there, 0, 0.0, 1.0, there, dtype, there, dtype, 0
    )
    assert 4 * C_.cross_entropy_scratch(call, 2) <= 3 * 4 * M * V / 4


def test_compiled_graph() -> None:
    compiled = torch.compile(masked_linear_cross_entropy, fullgraph=True, backend="aot_eager", dynamic=True)
    for T in (5, 23, 40):
        inputs = draw(T, z_loss=0.1)
        leaves = [v for v in inputs.values() if isinstance(v, torch.Tensor) and v.requires_grad]
        got, want = compiled(**inputs), masked_linear_cross_entropy(**inputs, backend="native")
        assert torch.equal(got, want)
        for a, b in zip(*(torch.autograd.grad(3 * o, leaves) for o in (got, want)), strict=True):
            torch.testing.assert_close(a, b)
    inputs["labels"][0] = 130
    with pytest.raises(ValueError, match="label 130 is outside"):
        compiled(**inputs)


@pytest.mark.parametrize("grads", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scratch_memory_is_not_exceeded(grads: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many classes and rows, with and without the parts that only gradients need; what lies behind it is untouched."""
    native = importlib.import_module("ultra_kernels.masked_linear_cross_entropy.native")
    module, behind = _native.load(), 2**20
    seen: list[int] = []

    class Guarded:
        CrossEntropy = module.CrossEntropy
        cross_entropy_has_pairs = staticmethod(module.cross_entropy_has_pairs)

        @staticmethod
        def cross_entropy_scratch(call: object, threads: int) -> int:
            seen.append(module.cross_entropy_scratch(call, threads))
            return seen[-1] + behind

        @staticmethod
        def cross_entropy(call: object, loss: int, scratch: int, threads: int) -> None:
            guard = (ctypes.c_float * behind).from_address(scratch + 4 * seen[-1])
            ctypes.memset(guard, 0x5A, 4 * behind)
            module.cross_entropy(call, loss, scratch, threads)
            assert bytes(guard) == b"\x5a" * (4 * behind)

    monkeypatch.setattr(native, "load", Guarded)
    g = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 70, generator=g).to(dtype).requires_grad_(grads) for n in (600, 3001))
    labels = torch.randint(0, 3001, (600,), generator=g)
    loss = masked_linear_cross_entropy(hidden, weight, labels, backend="native")
    if grads:
        loss.backward()
    assert len(seen) == 1
