"""The Triton kernels of the mixture of experts, interpreted: every tile, and a host that looks away."""

from __future__ import annotations

import importlib
import itertools
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from ultra_kernels import BackendUnavailable, moe_ffn
from ultra_kernels._testing import Case, compare, run, widened
from ultra_kernels._triton import recorded_launches
from ultra_kernels.moe_ffn import reference
from ultra_kernels.moe_ffn.cases import case, distinct_logits

pytest.importorskip("triton")
interpreted = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1")


op = importlib.import_module("ultra_kernels.moe_ffn.op")  # the package's name for it is the function


def kernels():
    return importlib.import_module("ultra_kernels.moe_ffn.triton_kernels")


def groups():
    return importlib.import_module("ultra_kernels._groups_triton")


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def check(c: Case, dtype: torch.dtype = torch.float32, device: str = "cpu") -> None:
    """Output, statistics and every gradient against the reference in float64."""
    inputs = c.inputs(dtype, device)
    got, want = run(moe_ffn, inputs, "triton", dtype), run(moe_ffn, widened(inputs), "reference", dtype)
    wrong = compare(got, want, c.reduction, c.scales, dict.fromkeys(c.through_half, dtype), c.roundings)
    assert not wrong, "\n".join(wrong)


def use_tile(monkeypatch: pytest.MonkeyPatch, table: str, rows: int) -> None:
    """The tile of float32 products is the one that `table` has for half precision and so many rows per expert."""
    module = kernels() if table == "INNER_GRAD" else groups()
    single = "GRAD_SINGLE" if table == "GRAD_HALF" else "SINGLE"
    monkeypatch.setattr(groups(), single, {rows: getattr(module, table)[rows]})


@interpreted
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(
    ("table", "rows", "T"),
    [
        ("HALF", 16, 40),
        ("HALF", 128, 110),
        ("HALF", 256, 210),
        ("INNER_GRAD", 128, 110),
        ("INNER_GRAD", 256, 210),
        ("GRAD_HALF", 64, 110),
        ("GRAD_HALF", 128, 60),
    ],
)
def test_every_tile(table: str, rows: int, T: int, gated: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole tiles and parts of them along rows and both widths, with an expert's rows in several."""
    use_tile(monkeypatch, table, rows)
    check(case("tiles", T, 144, 80, 3, 2, gated=gated, biases=True))


def test_every_height_is_chosen() -> None:
    g = groups()
    heights = [g.tile_of(torch.bfloat16, S, 4, 16, g.HALF, g.SINGLE).block_m for S in (0, 64, 65, 512, 513, 1 << 20)]
    assert heights == [16, 16, 64, 64, 128, 128]
    assert g.tile_of(torch.bfloat16, 64, 4, 1, g.HALF, g.SINGLE) is g.ODD


@interpreted
@pytest.mark.parametrize("activation", ["silu", "gelu", "relu", "relu2"])
@pytest.mark.parametrize("gated", [False, True])
def test_every_form_of_expert(activation: str, gated: bool) -> None:
    for biases, sub_norm in itertools.product((False, True), repeat=2):
        check(case("form", 11, 20, 12, 4, 2, activation=activation, gated=gated, biases=biases, sub_norm=sub_norm))


@interpreted
@pytest.mark.parametrize(
    ("T", "D", "F", "E", "top_k"),
    [(0, 16, 16, 4, 2), (1, 1, 1, 1, 1), (1, 97, 47, 4, 2), (7, 97, 47, 4, 1), (40, 33, 130, 7, 3), (21, 16, 48, 5, 5)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=lambda d: str(d)[6:])
def test_odd_shapes(T: int, D: int, F: int, E: int, top_k: int, dtype: torch.dtype) -> None:
    """Few tokens leave experts without any: their gradients are zero."""
    check(case("plain", T, D, F, E, top_k, biases=True), dtype)
    check(case("gated", T, D, F, E, top_k, gated=True, biases=True, sub_norm=F > 1), dtype)


@interpreted
def test_all_tokens_to_one_expert() -> None:
    c = case("one", 300, 16, 16, 4, 1, one_expert=True, biases=True)
    check(c)
    inputs = c.inputs(torch.float32)
    y, stats = moe_ffn(**inputs, backend="triton")
    assert stats.counts.tolist() == [300, 0, 0, 0]
    for name in ("w_in", "w_out", "b_in", "b_out"):
        (grad,) = torch.autograd.grad(y.sum(), inputs[name], retain_graph=True)
        assert not grad[1:].any() and grad[0].any()


@interpreted
@pytest.mark.parametrize("normalize_gates", [None, False, True])
@pytest.mark.parametrize("select_bias", [False, True])
@pytest.mark.parametrize("top_k", [1, 3, 7])
def test_gates(normalize_gates: bool | None, select_bias: bool, top_k: int) -> None:
    check(case("gates", 20, 5, 3, 7, top_k, normalize_gates=normalize_gates, select_bias=select_bias))


@interpreted
def test_nan_and_infinity_reach_their_token_alone() -> None:
    inputs = case("nan", 9, 20, 12, 4, 2, activation="relu").inputs(torch.float32)
    with torch.no_grad():
        inputs["x"][1, 3], inputs["x"][4, 0] = float("nan"), float("inf")
    y, _ = moe_ffn(**inputs, backend="triton")
    assert [t for t in range(9) if not y[t].isfinite().all()] == [1, 4]


@interpreted
def test_permuting_the_experts_changes_nothing() -> None:
    inputs, order = case("permuted", 31, 20, 12, 4, 2, biases=True).inputs(torch.float32), torch.tensor([2, 0, 3, 1])
    permuted = inputs | {n: inputs[n][order] for n in ("w_in", "w_out", "b_in", "b_out")}
    permuted["router_logits"] = inputs["router_logits"][:, order]
    (y, stats), (y2, stats2) = (moe_ffn(**i, backend="triton") for i in (inputs, permuted))
    torch.testing.assert_close(y, y2)
    assert torch.equal(stats.counts[order], stats2.counts)


def rows_in_batches(device: str) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Some rows of y, and y of these rows alone; tiles have one height, that for up to 16 rows per expert."""
    inputs = case("alone", 32, 48, 32, 4, 2, gated=True, biases=True).inputs(torch.bfloat16, device)
    inputs = {n: v.float() if device == "cpu" and isinstance(v, torch.Tensor) else v for n, v in inputs.items()}
    y, _ = moe_ffn(**inputs, backend="triton")
    for rows in ([5], [7, 3, 11], list(range(1, 32, 2))):
        some, _ = moe_ffn(**inputs | {n: inputs[n][rows] for n in ("x", "router_logits")}, backend="triton")
        yield y[rows], some


@interpreted
def test_a_token_depends_on_itself_alone() -> None:
    """The interpreter's products do not have the same bits at every row of a tile; those of a GPU do."""
    for y, some in rows_in_batches("cpu"):
        torch.testing.assert_close(some, y, rtol=0, atol=1e-6)


@interpreted
def test_same_bits_on_every_run() -> None:
    inputs = case("again", 70, 20, 12, 4, 2, gated=True, biases=True, sub_norm=True).inputs(torch.float32)
    first, again = (run(moe_ffn, inputs, "triton", torch.float32) for _ in range(2))
    assert [n for n in first if not torch.equal(first[n], again[n])] == []


@interpreted
@pytest.mark.parametrize("frozen", ["x", "router_logits", "w_in", "w_out", "b_in", "b_out", "sub_norm"])
def test_frozen_tensors_get_no_gradient(frozen: str) -> None:
    for sub_norm in (False, True):
        inputs = case("frozen", 23, 20, 12, 4, 2, biases=True, sub_norm=sub_norm).inputs(torch.float32)
        if frozen in inputs:
            want = run(moe_ffn, inputs, "triton", torch.float32)
            inputs[frozen] = inputs[frozen].detach()
            got = run(moe_ffn, inputs, "triton", torch.float32)
            assert want.keys() - got.keys() == {f"d{frozen}"} and all(torch.equal(got[n], want[n]) for n in got)


@interpreted
@pytest.mark.parametrize("name", ["x", "router_logits", "w_in", "w_out", "b_in", "b_out", "sub_norm"])
def test_any_stride(name: str) -> None:
    inputs = case("strides", 31, 24, 16, 4, 2, biases=True, sub_norm=True).inputs(torch.float32)
    wide = torch.stack([inputs[name].detach()] * 2, -1)
    want = run(moe_ffn, inputs, "triton", torch.float32)
    got = run(moe_ffn, inputs | {name: wide[..., 0].requires_grad_()}, "triton", torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(got.values(), want.values(), strict=True))


@interpreted
def test_compiled_with_dynamic_tokens() -> None:
    def loss(**inputs: Any) -> torch.Tensor:
        y, stats = moe_ffn(**inputs, backend="triton")
        return y.square().sum() + stats.z + stats.mean_prob.square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for T in (5, 23):
        inputs = case("compiled", T, 20, 12, 4, 2, biases=True, sub_norm=True).inputs(torch.float32)
        leaves = [v for v in inputs.values() if isinstance(v, torch.Tensor)]
        for a, b in zip(*(torch.autograd.grad(f(**inputs), leaves) for f in (compiled, loss)), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter reads what tensors hold")
@pytest.mark.parametrize("sub_norm", [False, True])
def test_the_host_looks_at_no_routing(sub_norm: bool) -> None:
    """Tensors without data suffice for every launch: none is read, and no grid depends on a routing."""
    c = case("meta", 33, 12, 16, 4, 2, biases=True, sub_norm=sub_norm, select_bias=True, gated=True)
    inputs = {k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in c.inputs(torch.float32).items()}
    x, logits, w_in, w_out = (inputs[n] for n in ("x", "router_logits", "w_in", "w_out"))
    small = inputs["b_in"], inputs["b_out"], inputs.get("sub_norm")
    with torch.no_grad(), recorded_launches(run=False) as seen:
        gates, chosen, order, inverse, ends, *_, mean_prob, z = kernels().route(logits, inputs["select_bias"], 2, True)
        rest = reference.Routes(gates, order, inverse, ends), reference.Experts(w_in, w_out, *small, "silu", True)
        hidden = op._hidden_like(x, order, w_out, True)
        y = kernels().forward(x, *rest, hidden)
        grads = [None if t is None else torch.empty_like(t) for t in (x, gates, w_in, w_out, *small)]
        kernels().backward(y, x, *rest, hidden, grads)
        kernels().route_backward(gates, mean_prob, z, logits, chosen, True)
    assert len(seen) == 16 + 2 * sub_norm
    with pytest.raises((NotImplementedError, RuntimeError), match="meta"):  # which reads the ends
        reference._grouped_forward(x, w_in, None, ends)


@interpreted
@pytest.mark.parametrize(("N", "K"), [(48, 32), (37, 29)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=lambda d: str(d)[6:])
def test_plain_grouped_products(N: int, K: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows in their order, without gates; 600 rows are more than one part of a sum. Groups may be empty at any end.
    Three programs share the tiles of dw."""
    g = groups()
    monkeypatch.setattr(g, "resident_programs", lambda device: 3)
    for sizes in ([3, 0, 60, 7], [0, 0, 40, 0], [0, 600], [0], [1] * 140):
        ends = torch.tensor(sizes).cumsum(0)
        E, S = len(sizes), sum(sizes)
        x, dy = draw(S, K).to(dtype), draw(S, N, seed=1).to(dtype)
        weight, bias = draw(E, N, K, seed=2).to(dtype), draw(E, N, seed=3)
        found = {
            "y": g.grouped_linear(x, weight, bias, ends),
            "dx": g.grouped_linear(dy, weight, None, ends, transposed=True),
            "dw": g.grouped_weight_grad(dy, x, ends),
            "db": g.grouped_sums(dy, ends),
        }
        parts = [range(end - size, end) for end, size in zip(ends.tolist(), sizes, strict=True)]
        wide = [(x[list(p)].double(), dy[list(p)].double(), w.double()) for p, w in zip(parts, weight, strict=True)]
        want = {
            "y": torch.cat([a @ w.t() + b.double() for (a, _, w), b in zip(wide, bias, strict=True)]),
            "dx": torch.cat([d @ w for _, d, w in wide]),
            "dw": torch.stack([d.t() @ a for a, d, _ in wide]),
            "db": torch.stack([d.sum(0) for _, d, _ in wide]),
        }
        wrong = compare(found, want, max(S, N, K))
        assert not wrong, f"{sizes}: {wrong}"


@interpreted
@pytest.mark.parametrize("sub_norm", [False, True])
def test_opcheck(sub_norm: bool) -> None:
    """torch's audit of both ops: schema, fakes, autograd, AOT dispatch."""
    inputs = case("opcheck", 5, 4, 3, 3, 2, gated=True, biases=True, sub_norm=sub_norm).inputs(torch.float32)
    logits, x, w_in, w_out = (inputs[n].detach().requires_grad_() for n in ("router_logits", "x", "w_in", "w_out"))
    gates, _, order, inverse, ends, *_ = (t.detach() for t in op._route(logits, None, 2, True, "triton"))
    small = inputs["b_in"], inputs["b_out"], inputs.get("sub_norm")
    arguments = x, gates.requires_grad_(), order, inverse, ends, w_in, w_out, *small, "silu", True, "triton"
    torch.library.opcheck(op._experts, arguments)


@interpreted
def test_what_the_kernels_do_not_take() -> None:
    inputs = case("refused", 3, 4, 4, 2, 1).inputs(torch.float64)
    with pytest.raises(BackendUnavailable, match="take float32, bfloat16 and float16"):
        moe_ffn(**inputs, backend="triton")
    E = 257
    many = {"x": draw(3, 4), "router_logits": draw(3, E), "w_in": draw(E, 4, 4), "w_out": draw(E, 4, 4), "top_k": 1}
    with pytest.raises(BackendUnavailable, match="257 experts, above 256"):
        moe_ffn(**many, backend="triton")


DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("T", [1, 20, 200, 900])
def test_every_tile_gpu(T: int, dtype: torch.dtype) -> None:
    """Rows per expert in the range of every tile, with sizes that are multiples of 16 and others."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    for gated, (D, F) in itertools.product((False, True), ((144, 80), (97, 47))):
        check(case("tiles", T, D, F, 3, 2, gated=gated, biases=True), dtype, "cuda")
        check(case("norm", T, D, F, 3, 2, gated=gated, biases=True, sub_norm=True), dtype, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize(("E", "top_k"), [(7, 3), (33, 8), (256, 8)])
def test_routing_gpu(E: int, top_k: int) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    logits = distinct_logits(torch.Generator().manual_seed(0), 30_000, E).float()
    want, stats = reference.route(logits, top_k, True, None)
    gates, _, *rest, mean_prob, z = (t.cpu() for t in kernels().route(logits.cuda(), None, top_k, True))
    for a, b in zip(rest, (want.order, want.inverse, want.ends, stats.counts), strict=True):
        assert torch.equal(a, b)
    for a, b in ((gates, want.gates), (mean_prob, stats.mean_prob), (z, stats.z)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.gpu
def test_a_token_depends_on_itself_alone_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    for y, some in rows_in_batches("cuda"):
        assert torch.equal(some, y)


@pytest.mark.gpu
def test_one_graph_serves_every_routing_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    inputs = case("graph", 500, 64, 96, 8, 2, gated=True, biases=True).inputs(torch.bfloat16, "cuda")
    leaves = [v for v in inputs.values() if isinstance(v, torch.Tensor)]

    def call() -> tuple[torch.Tensor, ...]:
        y, stats = moe_ffn(**inputs, backend="triton")
        return y, stats.counts, *torch.autograd.grad(y.float().square().sum() + stats.z, leaves)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call()  # compiles
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    for seed in (1, 2):
        logits = distinct_logits(torch.Generator().manual_seed(seed), 500, 8)
        logits[:, 0] += 9 * (seed == 2)  # one expert gets all tokens
        with torch.no_grad():
            inputs["router_logits"].copy_(logits)
        graph.replay()
        for a, b in zip(captured, call(), strict=True):
            assert torch.equal(a, b)
