"""What is special to the mixture of experts in C++: instruction sets, block borders, full and empty experts."""

from __future__ import annotations

import itertools

import pytest
import torch

from ultra_kernels import _native, moe_ffn
from ultra_kernels._testing import Inputs, compare, run, widened
from ultra_kernels.moe_ffn.cases import distinct_logits

pytestmark = pytest.mark.skipif(_native.missing() is not None, reason=str(_native.missing()))


def draw(
    T: int = 23, D: int = 20, F: int = 12, E: int = 4, top_k: int = 2, *, gated: bool = False, biases: bool = False,
    sub_norm: bool = False, dtype: torch.dtype = torch.float32, **options: object,
) -> Inputs:  # fmt: skip
    g = torch.Generator().manual_seed(0)
    rows = 2 * F if gated else F

    def normal(*shape: int, scale: float = 1.0, dtype: torch.dtype = dtype) -> torch.Tensor:
        return (torch.randn(*shape, generator=g) * scale).to(dtype).requires_grad_()

    inputs: Inputs = {
        "x": normal(T, D),
        "router_logits": distinct_logits(g, T, E).float().requires_grad_(),
        "w_in": normal(E, rows, D, scale=D**-0.5),
        "w_out": normal(E, D, F, scale=F**-0.5),
        "top_k": top_k,
        "gated": gated,
    }
    if biases:
        inputs |= {"b_in": normal(E, rows, dtype=torch.float32), "b_out": normal(E, D, dtype=torch.float32)}
    if sub_norm:
        inputs["sub_norm"] = (1 + normal(F, scale=0.2, dtype=torch.float32)).detach().requires_grad_()
    return inputs | options


def check(inputs: Inputs) -> None:
    """Output, statistics and every gradient against the reference in float64."""
    dtype, (T, D) = inputs["x"].dtype, inputs["x"].shape
    reduction = max(T * inputs["top_k"], D * inputs["w_in"].shape[1])
    rounded = dict.fromkeys(("drouter_logits", "db_in", "db_out", "dsub_norm"), dtype)
    want = run(moe_ffn, widened(inputs), "reference", dtype)
    wrong = compare(run(moe_ffn, inputs, "native", dtype), want, reduction, rounded=rounded, roundings=2)
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("activation", ["silu", "gelu", "relu", "relu2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_form_of_expert(isa: str, activation: str, dtype: torch.dtype) -> None:
    for gated, biases, sub_norm in itertools.product((False, True), repeat=3):
        check(draw(gated=gated, biases=biases, sub_norm=sub_norm, dtype=dtype, activation=activation))


# Blocks of tokens are 512 rows, of columns 64, of a weight's gradient 192 × 256, higher with few slots; sums take 512
# words at a time, a word being two numbers in bfloat16.
@pytest.mark.parametrize(
    ("T", "D", "F"),
    [
        (1, 1, 1),
        (7, 97, 47),
        (65, 63, 65),
        (127, 193, 129),
        (129, 257, 31),
        (257, 64, 255),
        (511, 3, 5),
        (513, 48, 191),
        (3, 2051, 1030),
        (300, 500, 800),
        (1100, 5, 49),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_block_borders(isa: str, T: int, D: int, F: int, dtype: torch.dtype) -> None:
    check(draw(T, D, F, 1, 1, biases=True, dtype=dtype))
    check(draw(T, D, F, 2, 1, gated=True, biases=True, sub_norm=F > 1, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("T", [0, 1, 7])
def test_few_tokens(T: int, dtype: torch.dtype) -> None:
    """Most experts get none: their gradients are zero."""
    check(draw(T, 97, 47, 4, 1, gated=True, biases=True, sub_norm=True, dtype=dtype))
    check(draw(T, 97, 47, 4, 2, biases=True, dtype=dtype))


@pytest.mark.parametrize(("E", "top_k"), [(1, 1), (7, 3), (5, 5)])
@pytest.mark.parametrize("normalize_gates", [None, False, True])
def test_choices(E: int, top_k: int, normalize_gates: bool | None) -> None:
    bias = torch.linspace(0.3, -0.3, E)
    check(draw(50, E=E, top_k=top_k, biases=True, normalize_gates=normalize_gates, select_bias=bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_tokens_to_one_expert(dtype: torch.dtype) -> None:
    inputs = draw(700, top_k=1, biases=True, dtype=dtype)
    with torch.no_grad():
        inputs["router_logits"][:, 2] += 20
    check(inputs)
    y, _ = moe_ffn(**inputs, backend="native")
    for name in ("w_in", "w_out", "b_in", "b_out"):
        (grad,) = torch.autograd.grad(y.sum(), inputs[name], retain_graph=True)
        assert not grad[[0, 1, 3]].any() and grad[2].any()


@pytest.mark.parametrize("name", ["x", "w_in", "w_out", "b_in", "sub_norm"])
def test_any_stride(name: str) -> None:
    inputs = draw(31, 24, 16, biases=True, sub_norm=True)
    wide = torch.stack([inputs[name].detach()] * 2, -1)
    want = run(moe_ffn, inputs, "native", torch.float32)
    got = run(moe_ffn, inputs | {name: wide[..., 0].requires_grad_()}, "native", torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(got.values(), want.values(), strict=True))


def test_rows_with_gaps() -> None:
    inputs = draw(31, 24, 16)
    inputs["x"] = torch.randn(31, 40, generator=torch.Generator().manual_seed(1))[:, 3:27].requires_grad_()
    check(inputs)


def test_threads_do_not_change_the_bits() -> None:
    inputs = draw(300, 97, 80, biases=True, sub_norm=True, gated=True)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        want = run(moe_ffn, inputs, "native", torch.float32)
        torch.set_num_threads(3)
        got = run(moe_ffn, inputs, "native", torch.float32)
        assert all(torch.equal(a, b) for a, b in zip(got.values(), want.values(), strict=True))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("frozen", ["x", "router_logits", "w_in", "w_out", "b_in", "b_out", "sub_norm"])
def test_frozen_tensors_get_no_gradient(frozen: str) -> None:
    inputs = draw(biases=True, sub_norm=True)
    want = run(moe_ffn, inputs, "native", torch.float32)
    inputs[frozen] = inputs[frozen].detach()
    got = run(moe_ffn, inputs, "native", torch.float32)
    assert want.keys() - got.keys() == {f"d{frozen}"} and all(torch.equal(got[n], want[n]) for n in got)


def test_nan_and_infinity_reach_their_token_alone() -> None:
    inputs = draw(9, activation="relu")
    with torch.no_grad():
        inputs["x"][1, 3], inputs["x"][4, 0] = float("nan"), float("inf")
    y, _ = moe_ffn(**inputs, backend="native")
    assert [t for t in range(9) if not y[t].isfinite().all()] == [1, 4]


def test_compiled_with_dynamic_tokens() -> None:
    compiled = torch.compile(lambda **a: moe_ffn(**a)[0], fullgraph=True, backend="aot_eager", dynamic=True)
    for T in (5, 23, 40):
        inputs = draw(T, biases=True, sub_norm=True)
        leaves = [v for v in inputs.values() if isinstance(v, torch.Tensor)]
        y, want = compiled(**inputs), moe_ffn(**inputs)[0]
        torch.testing.assert_close(y, want)
        for a, b in zip(*(torch.autograd.grad(o.square().sum(), leaves) for o in (y, want)), strict=True):
            torch.testing.assert_close(a, b)
