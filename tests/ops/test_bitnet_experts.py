"""Ternary experts of a mixture, in training and packed: groups of rows against one expert at a time, on every backend,
and on a GPU's backend without a look of the host at where the groups end."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ultra_kernels import bitlinear, moe_ffn
from ultra_kernels import nn as layers
from ultra_kernels._dispatch import OPS, use_backend
from ultra_kernels._triton import Launch, recorded_launches
from ultra_kernels.bitlinear.cases import grid_tokens, ternary_weights
from ultra_kernels.bitlinear.op import grouped_bitlinear, segments
from ultra_kernels.ternary.op import grouped_ternary_linear

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# How many rows each expert has.
GROUPS = {
    "E1": [9],
    "none-first-and-last": [0, 5, 0, 1, 2, 0],
    "all-on-one": [0, 0, 40, 0],
    "E7": [1, 2, 3, 0, 33, 6, 7],
    "S1": [0, 1, 0],
    "S0": [0, 0],
}
KERNELS = ("native", "triton")


def require(backend: str) -> None:
    if (reason := OPS["bitlinear"].why_not(backend, torch.zeros(1))) is not None:
        pytest.skip(reason)


def problem(
    counts: list[int], N: int, K: int, dtype: torch.dtype, norm: bool = True, biased: bool = True
) -> dict[str, torch.Tensor]:
    """Leaves of numbers that every precision rounds alike."""
    g = torch.Generator().manual_seed(len(counts) * N + K)
    E, S = len(counts), sum(counts)
    weight = torch.stack([ternary_weights(g, N, K) * (1 + e) for e in range(E)])
    gain = 2.0 ** torch.randint(-1, 2, (K,), generator=g).double()
    x, bias = grid_tokens(g, S, K), torch.randn(E, N, generator=g, dtype=torch.float64)
    tensors = {"x": x / gain if norm else x, "weight": weight}
    tensors |= ({"bias": bias} if biased else {}) | ({"norm_weight": gain} if norm else {})
    return {name: t.to(dtype).requires_grad_() for name, t in tensors.items()}


def one_by_one(leaves: dict[str, torch.Tensor], ends: torch.Tensor, scale: str, backend: str) -> torch.Tensor:
    """`bitlinear` of each expert that has rows."""
    x, weight, bias, gain = leaves["x"], leaves["weight"], leaves.get("bias"), leaves.get("norm_weight")
    parts = [
        bitlinear(
            x[own], weight[e], None if bias is None else bias[e], norm_weight=gain, scale=scale, backend=backend
        )
        for e, own in segments(ends)
    ]  # fmt: skip
    return torch.cat(parts) if parts else (x @ weight[0].t()) * 0


def together(leaves: dict[str, torch.Tensor], ends: torch.Tensor, scale: str, backend: str) -> torch.Tensor:
    x, weight, bias, gain = leaves["x"], leaves["weight"], leaves.get("bias"), leaves.get("norm_weight")
    return grouped_bitlinear(x, weight, bias, gain, ends, scale, x.dtype, backend)


def gradients(leaves: dict[str, torch.Tensor], y: torch.Tensor) -> dict[str, torch.Tensor]:
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(y)
    found = torch.autograd.grad(y, list(leaves.values()), dy, allow_unused=True, materialize_grads=True)
    return dict(zip(leaves, found, strict=True))


@pytest.mark.parametrize("counts", GROUPS.values(), ids=GROUPS)
@pytest.mark.parametrize("given", ["norm and bias", "norm", "bias", "neither"])
@pytest.mark.parametrize("backend", KERNELS)
def test_groups_are_bitlinears_of_their_own(backend: str, given: str, counts: list[int]) -> None:
    """The forward to the last bit, gradients to float32 sums of up to 40 terms; sizes odd and divisible by 16."""
    require(backend)
    ends = torch.tensor(counts).cumsum(0)
    for (N, K), scale in (((5, 9), "mean"), ((16, 48), "median"), ((33, 17), "median")):
        leaves = problem(counts, N, K, torch.float32, "norm" in given, "bias" in given)
        y, want = (function(leaves, ends, scale, backend) for function in (together, one_by_one))
        assert torch.equal(y, want) and y.dtype == torch.float32
        exact = {name: t.detach().double().requires_grad_() for name, t in leaves.items()}
        exact_y = one_by_one(exact, ends, scale, "reference")
        torch.testing.assert_close(y.double(), exact_y, rtol=1e-5, atol=1e-5)
        expected = gradients(exact, exact_y)
        for name, got in gradients(leaves, y).items():
            largest = float(expected[name].abs().max()) if expected[name].numel() else 0.0
            limit = 8 * 2**-23 * max(N, K, sum(counts)) ** 0.5 * largest
            assert got.shape == leaves[name].shape and got.dtype == leaves[name].dtype
            assert not got.numel() or float((got.double() - expected[name]).abs().max()) <= limit, (name, N, K)


@pytest.mark.parametrize("backend", KERNELS)
def test_half_precision(backend: str) -> None:
    """float16 alone: Triton's interpreter computes bfloat16 wrongly."""
    require(backend)
    ends = torch.tensor([3, 3, 20, 21])
    for N, K in ((16, 48), (7, 13)):
        leaves = problem([3, 0, 17, 1], N, K, torch.float16)
        y = together(leaves, ends, "mean", backend)
        assert y.dtype == torch.float16 and torch.equal(y, one_by_one(leaves, ends, "mean", backend))
        exact = {name: t.detach().double().requires_grad_() for name, t in leaves.items()}
        expected = gradients(exact, one_by_one(exact, ends, "mean", "reference"))
        for name, got in gradients(leaves, y).items():  # operands, products and results have 11 bits
            limit = 4 * 2**-10 * float(expected[name].abs().max())
            assert float((got.double() - expected[name]).abs().max()) <= limit, (name, N, K)


@pytest.mark.parametrize("backend", KERNELS)
def test_what_else_is_in_a_batch_changes_nothing(backend: str) -> None:
    """A token's result is the same bits alone, in another place, and beside other tokens."""
    require(backend)
    torch.manual_seed(0)
    layer = layers.MoE(24, 40, 4, gated=True, bias=True, sub_norm=True, bitnet=True)
    packed, x = layer.pack(), torch.randn(19, 24)
    with use_backend(backend), torch.no_grad():
        for run in (layer, packed):
            whole = run(x)[0]
            for rows in ([5], [7, 3, 11], list(range(18, -1, -1))):
                assert torch.equal(run(x[rows])[0], whole[rows])


@pytest.mark.parametrize("backend", KERNELS)
def test_packed_experts_are_the_trained_ones(backend: str) -> None:
    require(backend)
    torch.manual_seed(0)
    layer = layers.MoE(24, 40, 5, bias=True, sub_norm=True, bitnet=True, bitnet_scale="median")
    x = torch.randn(2, 15, 24)
    with use_backend(backend), torch.no_grad():
        (y, stats), (packed_y, packed_stats) = layer(x), layer.pack()(x)
        assert layer.pack()(x[:, :0])[0].shape == (2, 0, 24)
    torch.testing.assert_close(packed_y, y, rtol=1e-5, atol=1e-5 * float(y.abs().max()))
    assert torch.equal(stats.counts, packed_stats.counts)


# ---- without waiting for a GPU


class NoSynchronisation(TorchDispatchMode):
    """Refuses operators of which the host reads a result, or whose result's shape depends on values."""

    NAMES = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2", "repeat_interleave")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        masks = name == "index" and any(t is not None and t.dtype in (torch.bool, torch.uint8) for t in args[1])
        if name in self.NAMES or masks:
            raise AssertionError(f"{func} makes the host wait for the device")
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Launch]]:
    """Triton's launches, none of which is made; whatever would wait for a GPU is an error."""
    # decorated before the environment says that an interpreter is there
    for folder in ("moe_ffn", "bitlinear", "ternary_linear"):
        OPS[folder].module("triton")

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("the host reads a tensor")

    with monkeypatch.context() as patch, recorded_launches(run=False) as seen, NoSynchronisation():
        patch.setenv("TRITON_INTERPRET", "1")
        # what the kernels would have written is used as an index
        patch.setattr(torch.Tensor, "new_empty", lambda self, *args, **kwargs: self.new_zeros(*args, **kwargs))
        for name in ("tolist", "item", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__"):
            patch.setattr(torch.Tensor, name, refuse)
        yield seen


def train(layer: layers.MoE, x: torch.Tensor, backend: str) -> None:
    y, stats = moe_ffn(
        x, x @ layer.router.weight.t(), layer.w_in, layer.w_out, top_k=2, b_in=layer.b_in, b_out=layer.b_out,
        sub_norm=layer.sub_norm.weight, bitnet=True, bitnet_scale=layer.bitnet_scale, backend=backend,
    )  # fmt: skip
    (y.sum() + stats.z + stats.mean_prob.square().sum()).backward()


@pytest.mark.skipif(INTERPRETED, reason="TRITON_INTERPRET=1: kernels are Python functions")
@pytest.mark.parametrize("scale", ["mean", "median"])
def test_the_host_never_waits(scale: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    layer = layers.MoE(24, 40, 4, bias=True, sub_norm=True, bitnet=True, bitnet_scale=scale)
    packed, x = layer.pack(), torch.randn(9, 24, requires_grad=True)
    with watched(monkeypatch) as seen:
        train(layer, x, "triton")
        training = len(seen)
        with use_backend("triton"):
            packed(x)
    assert {"product_kernel", "weight_grad_kernel"} <= {launch.kernel.fn.__name__ for launch in seen[:training]}
    assert [launch.kernel.fn.__name__ for launch in seen[training:]].count("panels_kernel") == 2


@pytest.mark.skipif(INTERPRETED, reason="TRITON_INTERPRET=1: kernels are Python functions")
def test_waiting_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    layer, x = layers.MoE(24, 40, 4, bias=True, sub_norm=True, bitnet=True), torch.randn(9, 24)
    for wait in (
        lambda: train(layer, x, "reference"),
        lambda: torch.arange(3)[torch.tensor([True, False, True])],
        lambda: bool(torch.ones(())),
    ):
        with pytest.raises(AssertionError), watched(monkeypatch):
            wait()


@pytest.mark.skipif(INTERPRETED, reason="TRITON_INTERPRET=1: kernels are Python functions")
def test_launches_of_groups_are_shipped_configurations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every dtype and tile: few and many rows, sizes that are multiples of 16 or not."""
    pytest.importorskip("triton")
    from ultra_kernels import _groups_triton
    from ultra_kernels.bitlinear import triton_kernels as training
    from ultra_kernels.ternary import triton_kernels as inference

    shipped = [c for part in (_groups_triton, training, inference) for c in part.configurations()]
    heights = set()
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for S, E, N, K in ((9, 4, 33, 17), (40, 4, 48, 32), (64, 3, 512, 64), (600, 2, 1024, 2048)):
            x, ends = torch.zeros(S, K, dtype=dtype), torch.full((E,), S)
            leaves = {"x": x, "weight": torch.ones(E, N, K, dtype=dtype), "norm_weight": torch.ones(K)}
            leaves = {name: t.requires_grad_() for name, t in leaves.items()}
            codes, scale = torch.zeros(E, -(-N // 16), -(-K // 16), 64, dtype=torch.uint8), torch.ones(E)
            with watched(monkeypatch) as seen:
                together(leaves, ends, "mean", "triton").sum().backward()
                grouped_ternary_linear(x.detach(), codes, scale, (N, K), None, ends, "triton")
            for launch in seen:
                assert any(c.covers(launch) for c in shipped), (launch.kernel.fn.__name__, launch.arguments)
                heights.add((launch.kernel.fn.__name__, launch.arguments.get("BLOCK_M")))
    assert {("product_kernel", t.block_m) for t in training.PRODUCT.values()} <= heights
    assert {("panels_kernel", t.block_m) for t in inference.PANELS.values()} <= heights
