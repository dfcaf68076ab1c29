"""The router of a mixture in the kernels of every backend, against the reference in float64."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch

from ultra_kernels import _native, moe_ffn
from ultra_kernels._testing import compare, run, widened
from ultra_kernels.moe_ffn import reference
from ultra_kernels.moe_ffn.cases import case, distinct_logits


@pytest.fixture(params=["native-baseline", "native-avx2", "native-avx512", "triton"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    name, _, isa = request.param.partition("-")
    if name == "triton":
        pytest.importorskip("triton")
        if os.environ.get("TRITON_INTERPRET") != "1":
            pytest.skip("needs TRITON_INTERPRET=1")
        yield name
        return
    C = _native.load()
    if isa not in C.isas():
        pytest.skip(f"this CPU has {C.isas()}")
    best = C.isa()
    C.set_isa(isa)
    yield name
    C.set_isa(best)


@pytest.fixture
def kernels(backend: str) -> ModuleType:
    op: ModuleType = importlib.import_module("ultra_kernels.moe_ffn.op")  # the package's name for it is the function
    return op.OP.module(backend)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def check_routes(kernels: ModuleType, T: int, E: int, top_k: int, normalize: bool) -> None:
    """Order and places as the reference has them, gates, statistics and the gradient up to rounding."""
    logits = distinct_logits(torch.Generator().manual_seed(0), T, E).float()
    for select_bias in (None, draw(E) / 100):
        wide = logits.double().requires_grad_()
        want, stats = reference.route(wide, top_k, normalize, None if select_bias is None else select_bias.double())
        gates, chosen, *rest, mean_prob, z = kernels.route(logits, select_bias, top_k, normalize)
        for a, b in zip(rest, (want.order, want.inverse, want.ends, stats.counts), strict=True):
            assert a.dtype == torch.int64 and torch.equal(a, b)
        for a, b in ((gates, want.gates), (mean_prob, stats.mean_prob), (z, stats.z)):
            torch.testing.assert_close(a.double(), b.detach(), rtol=1e-5, atol=1e-7)
        grads = draw(T, top_k, seed=1), draw(E, seed=2), draw(seed=3)
        found = kernels.route_backward(*grads, logits, chosen, normalize)
        expected = (want.gates, stats.mean_prob, stats.z), wide, [g.double() for g in grads]
        torch.testing.assert_close(found.double(), torch.autograd.grad(*expected)[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("T", "E", "top_k", "blocks"),
    [(150, 1, 1, 256), (150, 7, 3, 256), (150, 32, 8, 1), (450, 33, 8, 5), (40, 128, 8, 2), (9, 5, 5, 1)],
)
@pytest.mark.parametrize("normalize", [False, True])
def test_routing(
    kernels: ModuleType, backend: str, T: int, E: int, top_k: int, blocks: int, normalize: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Blocks of tokens of one part and of several, of which the last is short."""
    if backend == "triton":
        monkeypatch.setattr(importlib.import_module("ultra_kernels._routes_triton"), "MAX_BLOCKS", blocks)
    check_routes(kernels, T, E, top_k, normalize)


@pytest.mark.parametrize(("T", "E", "top_k"), [(3000, 5, 2), (2100, 300, 9)])
def test_many_tokens_and_experts_in_cpp(isa: str, T: int, E: int, top_k: int) -> None:
    """The most blocks of tokens, and more experts than the Triton kernels take."""
    check_routes(importlib.import_module("ultra_kernels.moe_ffn.native"), T, E, top_k, True)


def test_without_tokens(kernels: ModuleType) -> None:
    gates, _, order, inverse, ends, counts, mean_prob, z = kernels.route(torch.empty(0, 5), None, 2, True)
    assert not gates.numel() and not order.numel() and not inverse.numel()
    assert not any(t.any() for t in (ends, counts, mean_prob, z))


def test_equal_logits_go_to_the_first_experts(kernels: ModuleType, backend: str) -> None:
    logits = torch.zeros(20, 9)
    logits[3, 5], logits[4, :2], logits[5, ::2] = 1.0, -1.0, -0.0
    chosen = kernels.route(logits, None, 3, True)[1]
    assert chosen[3].tolist() == [5, 0, 1] and chosen[4].tolist() == [2, 3, 4]
    assert chosen[0].tolist() == chosen[5].tolist() == [0, 1, 2]
    assert kernels.route(logits, torch.zeros(9), 3, True)[1][0].tolist() == [0, 1, 2]
    inputs = case("equal", 20, 5, 3, 9, 3).inputs(torch.float32)
    inputs["router_logits"] = torch.zeros(20, 9, requires_grad=True)
    same = [moe_ffn(**inputs, backend=b) for b in (backend, "reference")]
    assert same[0][1].counts.tolist() == same[1][1].counts.tolist() == [20] * 3 + [0] * 6
    torch.testing.assert_close(same[0][0], same[1][0])
    torch.testing.assert_close(same[0][1].mean_prob, same[1][1].mean_prob)


@pytest.mark.parametrize("normalize_gates", [False, True])
@pytest.mark.parametrize("top_k", [3, 5])
def test_logits_of_minus_infinity(backend: str, top_k: int, normalize_gates: bool) -> None:
    """Masked experts are chosen last, have no weight and no gradient; nor have the columns beyond E."""
    c = case("masked", 20, 5, 3, 5, top_k, normalize_gates=normalize_gates)
    inputs = c.inputs(torch.float32)
    with torch.no_grad():
        inputs["router_logits"][:, 2:4] = -torch.inf
    got, want = (run(moe_ffn, i, b, torch.float32) for i, b in ((inputs, backend), (widened(inputs), "reference")))
    wrong = compare(got, want, c.reduction, c.scales, dict.fromkeys(c.through_half, torch.float32), c.roundings)
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("select_bias", [False, True])
def test_nan_stays_in_its_row_and_in_bounds(kernels: ModuleType, select_bias: bool) -> None:
    logits, bias = draw(50, 5), torch.zeros(5) if select_bias else None
    clean = kernels.route(logits, bias, 3, True)
    logits[7], logits[9, 2], logits[11, 0], logits[13] = torch.nan, -torch.nan, torch.inf, -torch.inf
    logits[15, 4] = torch.nan  # a selection bias chooses 0, 1 and 2 then
    gates, chosen, order, inverse, ends, *_ = kernels.route(logits, bias, 3, True)
    assert chosen.min() >= 0 and chosen.max() < 5 and ends[-1] == 150
    assert all(len(set(row)) == 3 for row in chosen.tolist())
    assert torch.equal(order.sort().values, torch.arange(150)) and torch.equal(inverse[order], torch.arange(150))
    rows = [t for t in range(50) if t not in (7, 9, 11, 13, 15)]
    assert torch.equal(gates[rows], clean[0][rows]) and torch.equal(chosen[rows], clean[1][rows])
    assert gates[[7, 9, 13, 15]].isnan().all() and (select_bias or chosen[9, 0] == 2)
    assert reference.route(logits, 3, True, bias)[0].gates[[7, 9, 13, 15]].isnan().all()


def test_opcheck(backend: str) -> None:
    """torch's audit: schema, fakes, autograd, AOT dispatch."""
    op = importlib.import_module("ultra_kernels.moe_ffn.op")
    torch.library.opcheck(op._route, (draw(5, 4).requires_grad_(), draw(4, seed=1), 2, True, backend))


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_do_not_change_the_routes(threads: int) -> None:
    native, logits = importlib.import_module("ultra_kernels.moe_ffn.native"), draw(3000, 7)
    before = torch.get_num_threads()
    want = native.route(logits, None, 2, True)
    try:
        torch.set_num_threads(threads)
        assert all(map(torch.equal, native.route(logits, None, 2, True), want))
    finally:
        torch.set_num_threads(before)
