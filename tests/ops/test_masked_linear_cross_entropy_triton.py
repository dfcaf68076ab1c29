"""The Triton kernels of the masked cross-entropy under the interpreter: steps along a row, blocks of rows."""

from __future__ import annotations

import os

import pytest
import torch

from ultra_kernels import masked_linear_cross_entropy
from ultra_kernels._testing import Inputs, compare, run, widened

pytest.importorskip("triton")
interpreted = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1")


def kernels():
    from ultra_kernels.masked_linear_cross_entropy import triton_kernels

    return triton_kernels


@pytest.fixture(autouse=True)
def poisoned_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    """What stands beyond the last class is NaN."""
    real = torch.Tensor.new_empty

    def filled(self: torch.Tensor, *args: object, **options: object) -> torch.Tensor:
        t = real(self, *args, **options)
        return t.fill_(float("nan")) if t.is_floating_point() else t

    monkeypatch.setattr(torch.Tensor, "new_empty", filled)


def draw(
    T: int = 40, D: int = 17, V: int = 130, *, labelled: float = 0.5, bias: bool = True,
    dtype: torch.dtype = torch.float32, **options: object,
) -> Inputs:  # fmt: skip
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(0, V, (T,), generator=g)
    inputs: Inputs = {
        "hidden": torch.randn(T, D, generator=g).to(dtype).requires_grad_(),
        "weight": (torch.randn(V, D, generator=g) * D**-0.5).to(dtype).requires_grad_(),
        "labels": labels.masked_fill(torch.rand(T, generator=g) >= labelled, -100),
    }
    return inputs | ({"bias": torch.randn(V, generator=g).requires_grad_()} if bias else {}) | options


def check(inputs: Inputs) -> None:
    dtype, V = inputs["hidden"].dtype, len(inputs["weight"])
    want = run(masked_linear_cross_entropy, widened(inputs), "reference", dtype)
    got = run(masked_linear_cross_entropy, inputs, "triton", dtype)
    scales = {"dbias": 1.0} if V == 1 else {}  # of a single class it is 1 - 1
    rounded = dict.fromkeys(("out0", "dbias"), dtype)
    wrong = compare(got, want, max(*inputs["hidden"].shape, V), scales, rounded)
    assert not wrong, "\n".join(wrong)


@interpreted
@pytest.mark.parametrize("V", [1, 7, 130, 1003, 2048, 2049])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_shapes(V: int, dtype: torch.dtype) -> None:
    """2048 columns are one step."""
    check(draw(12, V=V, dtype=dtype))
    check(draw(7, D=1, V=V, dtype=dtype, labelled=1.0, bias=False, z_loss=0.02, reduction="sum"))


@interpreted
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_several_steps_and_blocks(monkeypatch: pytest.MonkeyPatch, bias: bool, dtype: torch.dtype) -> None:
    """Steps of 32 columns, blocks of 16 rows, the last of which is not full."""
    monkeypatch.setattr(kernels(), "BLOCK", 32)
    monkeypatch.setattr(kernels(), "BLOCK_BYTES", 0)
    monkeypatch.setattr(kernels(), "TOTAL_BLOCK", 16)
    check(draw(70, V=100, labelled=0.8, bias=bias, dtype=dtype, z_loss=0.01))


@interpreted
@pytest.mark.parametrize("size", [1e4, -1e4])
def test_extreme_logits(size: float) -> None:
    inputs = draw(10, 8, 300, labelled=1.0, bias=False)
    with torch.no_grad():
        inputs["weight"].zero_()
        inputs["weight"][[3, 250], 0] = size
        inputs["hidden"][:, 0] = 1.0
    check(inputs)


@interpreted
def test_a_class_may_be_ruled_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bias of -inf, from the first step on."""
    monkeypatch.setattr(kernels(), "BLOCK", 32)
    inputs = draw(10, V=300, labelled=1.0)
    with torch.no_grad():
        inputs["bias"][:100] = -torch.inf
    inputs["labels"] = 100 + inputs["labels"] % 200
    got = run(masked_linear_cross_entropy, inputs, "triton", torch.float32)
    want = run(masked_linear_cross_entropy, inputs, "reference", torch.float32)
    for name, value in got.items():
        torch.testing.assert_close(value, want[name], rtol=1e-5, atol=1e-6)


@interpreted
def test_without_gradients_and_without_rows() -> None:
    inputs = draw()
    with torch.no_grad():
        quiet = masked_linear_cross_entropy(**inputs, backend="triton")
    assert torch.equal(quiet, masked_linear_cross_entropy(**inputs, backend="triton").detach())
    for T in (0, 5):
        check(draw(T, labelled=0.0))


@interpreted
def test_nan_shows() -> None:
    inputs = draw(labelled=1.0)
    with torch.no_grad():
        inputs["hidden"][3, 2] = float("nan")
    assert masked_linear_cross_entropy(**inputs, backend="triton").isnan()
