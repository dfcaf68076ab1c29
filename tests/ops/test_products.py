"""Linear maps by oneDNN against float64, and when they are not its."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional

from ultra_kernels import _products
from ultra_kernels._products import linear
from ultra_kernels.nn import Linear

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"),
    reason="this torch has no oneDNN",
)


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """oneDNN for every size on every processor."""
    monkeypatch.setattr(_products, "WORTH_A_CALL", 0)
    monkeypatch.setattr(_products, "_onednn_is_faster", lambda: True)


@pytest.fixture
def calls(always: None, monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """The shapes of oneDNN's products."""
    seen: list[torch.Size] = []
    original = _products.multiply

    def multiply(x, weight, bias=None):
        seen.append(x.shape)
        return original(x, weight, bias)

    monkeypatch.setattr(_products, "multiply", multiply)
    return seen


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gradients(function, x, weight, bias, cotangent):
    leaves = [t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in (x, weight, bias)]
    y = function(*leaves)
    return [y, *torch.autograd.grad(y, leaves, cotangent)]


@pytest.mark.parametrize(("rows", "K", "N"), [((1,), 1, 1), ((63,), 17, 130), ((2, 31), 130, 17), ((7,), 64, 64)])
@pytest.mark.parametrize("strided", [False, True])
def test_values_and_gradients(calls, rows: tuple[int, ...], K: int, N: int, strided: bool) -> None:
    x, weight, bias, dy = draw(*rows, K), draw(N, K, seed=1), draw(N, seed=2), draw(*rows, N, seed=3)
    if strided:
        x, weight = x.transpose(0, -1).contiguous().transpose(0, -1), weight.t().contiguous().t()
    got = gradients(linear, x.float(), weight.float(), bias.float(), dy.float())
    want = gradients(functional.linear, x, weight, bias, dy)
    assert len(calls) == 3
    for found, right, length in zip(got, want, (K, N, dy[..., 0].numel(), dy[..., 0].numel()), strict=True):
        # products of normal numbers: an error of 2^-24 of each, and as much for the sum
        torch.testing.assert_close(found.double(), right, rtol=1e-6, atol=2.0**-22 * length**0.5 * 4)


def test_no_gradient_that_nobody_wants(calls) -> None:
    x, weight = draw(8, 4).float(), draw(6, 4).float().requires_grad_()
    linear(x, weight).sum().backward()
    assert calls == [(8, 4), (4, 8)] and weight.grad is not None and weight.grad.is_contiguous()
    with torch.no_grad():
        assert not linear(x, weight).requires_grad


def test_empty_rows_and_other_kinds_are_left_to_torch(calls) -> None:
    x, weight = draw(8, 4), draw(6, 4)
    for dtype in (torch.float64, torch.bfloat16):
        assert linear(x.to(dtype), weight.to(dtype)).dtype == dtype
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x.float(), weight.float()).dtype == torch.bfloat16
    assert calls == []
    with pytest.raises(RuntimeError, match="shapes"):
        linear(x.float(), draw(6, 5).float())


def test_small_products_and_other_processors_stay_with_torch(calls, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = draw(8, 4).float(), draw(6, 4).float()
    monkeypatch.setattr(_products, "WORTH_A_CALL", 8 * 4 * 6 + 1)
    linear(x, weight)
    monkeypatch.setattr(_products, "WORTH_A_CALL", 8 * 4 * 6)
    monkeypatch.setattr(_products, "_onednn_is_faster", lambda: False)
    linear(x, weight)
    assert calls == []
    monkeypatch.setattr(_products, "_onednn_is_faster", lambda: True)
    linear(x, weight)
    assert calls == [(8, 4)]


def test_layer_is_torchs_but_for_the_product(calls) -> None:
    torch.manual_seed(0)
    layer = Linear(16, 8)
    torch.manual_seed(0)
    other = torch.nn.Linear(16, 8)
    x = draw(5, 3, 16).float()
    torch.testing.assert_close(layer(x), other(x))
    assert calls and layer.state_dict().keys() == other.state_dict().keys()


def test_second_derivatives_are_refused(calls) -> None:
    x, weight = (draw(8, 4).float().requires_grad_() for _ in range(2))
    (dx,) = torch.autograd.grad(linear(x, weight).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        dx.sum().backward()


@pytest.mark.slow
def test_in_one_graph_for_all_lengths(always: None) -> None:
    weight, bias = draw(6, 4, seed=1).float(), draw(6, seed=2).float()
    graphs = CompileCounterWithBackend("inductor")
    compiled = torch.compile(lambda *a: linear(*a), fullgraph=True, dynamic=True, backend=graphs)
    for length in (8, 13, 200):
        x, dy = draw(length, 4).float(), draw(length, 6).float()
        got, want = (gradients(f, x, weight, bias, dy) for f in (compiled, functional.linear))
        torch.testing.assert_close(got, want)
    assert graphs.frame_count == 1
    assert any(
        "onednn_linear" in str(node.target) for g in graphs.graphs for m in g.modules() for node in m.graph.nodes
    )
