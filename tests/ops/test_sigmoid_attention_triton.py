"""The Triton kernels of sigmoid attention: what the cases of the op suite do not show; most needs the interpreter."""

from __future__ import annotations

import math
import os

import pytest
import torch

from ultra_kernels import BackendUnavailable, sigmoid_attention
from ultra_kernels._testing import tolerance
from ultra_kernels._triton import recorded_launches

pytest.importorskip("triton")
interpreted = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1")
KERNELS = ("forward", "dq", "dkdv")
KINDS = ({}, {"normalize": True}, {"bias": "heads"})  # every kernel with EXTRA and without


def inputs(T: int, K: int = 4, V: int = 5, B: int = 1, H: int = 2, dtype: torch.dtype = torch.float32):
    g = torch.Generator().manual_seed(T)
    return tuple(torch.randn(B, T, H, n, generator=g, dtype=torch.float64).to(dtype) for n in (K, K, V))


def results(q, k, v, *, backend: str, wide: bool = False, bias=None, **options) -> list[torch.Tensor]:
    """o and the gradients of q, k, v, and of the bias where each head has one, under one cotangent."""
    leaves = [(x.double() if wide else x).detach().requires_grad_() for x in (q, k, v)]
    if bias == "heads":
        bias = torch.linspace(-3.0, 0.5, q.shape[2], dtype=torch.float64 if wide else torch.float32, device=q.device)
        leaves.append(bias.requires_grad_())
    o = sigmoid_attention(*leaves[:3], bias=bias, backend=backend, **options)
    cotangent = torch.randn(o.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64).to(q.dtype).to(o)
    return [o.detach(), *torch.autograd.grad(o, leaves, cotangent)]


def assert_right(args, **options) -> list[torch.Tensor]:
    got = results(*args, backend="triton", **options)
    want = results(*args, backend="reference", wide=True, **options)
    dtype, (B, T, _, K) = args[0].dtype, args[0].shape
    for name, a, b in zip(("o", "dq", "dk", "dv", "dbias"), got, want, strict=False):
        reduction = T * max(K, args[2].shape[3]) * (B * T if name == "dbias" else 1)
        error, limit = float((a.double() - b).abs().max()), tolerance(b, dtype, reduction)
        assert error <= limit, f"{name}: {error:.3g} > {limit:.3g}"
    assert len(got) == len(want)
    return got


def every_tile() -> list[tuple[str, str, int]]:
    """(dtype, architecture, width) of each row of the tables."""
    from ultra_kernels.sigmoid_attention.triton_kernels import HALF, SINGLE

    rows = [("float16", f"sm{arch}", width) for arch, table in HALF.items() for width in table["forward"]]
    return rows + [("float32", "sm90", width) for width in SINGLE["forward"]]


@interpreted
@pytest.mark.parametrize(("dtype", "arch", "width"), every_tile())
def test_every_tile(dtype: str, arch: str, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """At a length of whole tiles and a part of one, with head dimensions that fill none of a tile's."""
    from ultra_kernels import _triton
    from ultra_kernels.sigmoid_attention import triton_kernels

    monkeypatch.setattr(_triton, "arch_of", lambda tensor: int(arch[2:]))
    table = triton_kernels.SINGLE if dtype == "float32" else triton_kernels.HALF[int(arch[2:])]
    launched = set()

    class Recorded:
        def __init__(self, name: str) -> None:
            self.name, self.kernel = name, triton_kernels.KERNELS[name]

        def __getitem__(self, grid):
            def launch(BLOCK_M, BLOCK_N, BLOCK_D, num_warps, num_stages, **arguments):
                tile = triton_kernels.Tile(BLOCK_M, BLOCK_N, num_warps, num_stages)
                assert (tile, BLOCK_D) == (table[self.name][width], width)
                launched.add(self.name)
                self.kernel[grid](**arguments, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, BLOCK_D=BLOCK_D)

            return launch

    monkeypatch.setattr(triton_kernels, "KERNELS", {name: Recorded(name) for name in KERNELS})
    T = 149 if dtype == "float16" else 77
    args = inputs(T, K=width - 5, V=width - 1, H=1, dtype=getattr(torch, dtype))
    for causal, options in zip((True, False, True), KINDS, strict=True):
        assert_right(args, causal=causal, **options)
    assert launched == set(KERNELS)


@interpreted
@pytest.mark.parametrize("T", [31, 32, 33, 64, 65])
@pytest.mark.parametrize("causal", [False, True])
def test_lengths_around_those_of_tiles(T: int, causal: bool) -> None:
    for options in KINDS:
        assert_right(inputs(T, H=1), causal=causal, **options)


@interpreted
@pytest.mark.parametrize("shape", [(16, 64), (64, 16), (128, 16)], ids=str)
def test_tiles_of_any_proportion(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles that the tables do not have: the diagonal crosses several tiles of either side."""
    from ultra_kernels.sigmoid_attention import triton_kernels

    table = {kernel: {32: triton_kernels.Tile(*shape, 4, 1)} for kernel in KERNELS}
    monkeypatch.setattr(triton_kernels, "SINGLE", table)
    for T in (15, 100, 130):
        for options in KINDS:
            assert_right(inputs(T, H=1), causal=True, **options)


@interpreted
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("options", [*KINDS, {"bias": -1.5, "scale": 0.3}], ids=str)
def test_packed_sequences_are_alone(options, causal: bool) -> None:
    """Sequences that are empty, of one row, of a tile, over a tile, and start within one."""
    lengths = [0, 15, 32, 0, 1, 65, 0]
    cu = torch.tensor([0, *lengths]).cumsum(0)  # int64
    args = inputs(sum(lengths))
    got = assert_right(args, cu_seqlens=cu.int(), causal=causal, **options)
    o = sigmoid_attention(*args, cu_seqlens=cu, causal=causal, backend="triton") if not options else None
    assert o is None or torch.equal(o, got[0])
    if options.get("bias") != "heads":
        alone = [
            results(*part, backend="triton", causal=causal, **options)[0]
            for part in zip(*(x.split(lengths, 1) for x in args), strict=True)
        ]
        assert torch.equal(got[0], torch.cat(alone, 1))


@interpreted
def test_many_sequences() -> None:
    """The search for a tile's sequence looks at 128 borders at a time."""
    cu = torch.cat([torch.zeros(1, dtype=torch.int64), (torch.arange(140) % 3).cumsum(0)])
    args = inputs(int(cu[-1]), H=1)
    got = sigmoid_attention(*args, cu_seqlens=cu, backend="triton")
    want = sigmoid_attention(*(x.double() for x in args), cu_seqlens=cu, backend="reference")
    assert float((got - want).abs().max()) <= tolerance(want, torch.float32, 10)


@interpreted
@pytest.mark.parametrize("n", [300, 8192])
def test_small_weights_keep_their_relative_accuracy(n: int) -> None:
    """With v = 1 a row is the sum of its weights, each near 1/n."""
    if n == 300:
        q, k, v = inputs(n, K=4, V=1, H=1)
        got = sigmoid_attention(q * 0.1, k * 0.1, torch.ones_like(v), backend="triton")
        want = sigmoid_attention(*(x.double() for x in (q * 0.1, k * 0.1, torch.ones_like(v))), backend="reference")
    else:
        q = torch.zeros(1, 20, 1, 4)
        got = sigmoid_attention(q, q, torch.ones(1, 20, 1, 1), bias=-math.log(n), backend="triton")
        want = torch.full_like(got, 20 / (n + 1)).double()
    assert float((got.double() / want - 1).abs().max()) < 1e-5


@interpreted
def test_large_logits_are_finite() -> None:
    """2^z overflows on one side and underflows on the other; the weights are 0 and 1, their gradients 0."""
    q, k, v = inputs(40, H=1)
    for options in KINDS:
        got = results(q * 1e3, k * 1e3, v, backend="triton", **options)
        assert all(x.isfinite().all() for x in got)
    low = sigmoid_attention(q, k, v, bias=-1e4, backend="triton")
    assert torch.equal(low, torch.zeros_like(low))


@interpreted
def test_nan_is_not_hidden() -> None:
    q, k, v = inputs(40, H=1)
    q[0, 3] = float("nan")
    o = sigmoid_attention(q, k, v, backend="triton")
    assert o[0, 3].isnan().all() and o[0, :3].isfinite().all() and o[0, 4:].isfinite().all()


@interpreted
def test_unaligned_views_are_read() -> None:
    """Rows at odd addresses, head dimensions with gaps between their elements, and an expanded cotangent."""
    x = torch.randn(1, 20, 2, 40, generator=torch.Generator().manual_seed(0))
    q, k, v = x[..., 1:17], x[..., 2:34:2], x[..., 3:35]
    for options in KINDS:
        assert_right((q, k, v), **options)
    leaves = {b: [t.detach().clone().requires_grad_() for t in (q, k, v)] for b in ("triton", "reference")}
    for backend, given in leaves.items():
        sigmoid_attention(*given, backend=backend).sum().backward()
    for a, b in zip(*leaves.values(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)


@interpreted
def test_heads_before_rows_are_not_copied() -> None:
    """[B,H,T,D] seen as [B,T,H,D]."""
    from ultra_kernels.sigmoid_attention import triton_kernels

    args = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs(33, K=16, V=32, B=2)]
    assert all(triton_kernels._readable(x) is x for x in args)
    assert_right(args, causal=True)


@interpreted
def test_no_tokens_and_no_heads() -> None:
    for shape in ((1, 0, 2, 4), (0, 3, 2, 4), (1, 3, 0, 4)):
        q = torch.zeros(shape, requires_grad=True)
        sigmoid_attention(q, q, q, normalize=True, backend="triton").sum().backward()
        assert q.grad.shape == shape
    bias = torch.zeros(2, requires_grad=True)
    q = torch.zeros(1, 0, 2, 4)
    cu = torch.zeros(3, dtype=torch.int32)
    sigmoid_attention(q, q, q, bias=bias, cu_seqlens=cu, backend="triton").sum().backward()
    assert torch.equal(bias.grad, torch.zeros(2))


@interpreted
def test_same_bits_on_every_run() -> None:
    args = inputs(70)
    for options in KINDS:
        for a, b in zip(*(results(*args, backend="triton", **options) for _ in range(2)), strict=True):
            assert torch.equal(a, b)


@interpreted
def test_rows_beyond_two_gigabytes_are_read() -> None:
    stride = 2**31 + 64
    try:
        storage = torch.empty(stride + 64, dtype=torch.float16)  # of which two pages are touched
    except RuntimeError:
        pytest.skip("no 4 GiB of addresses")
    far, near = storage.as_strided((2, 2, 1, 16), (stride, 16, 16, 1)), torch.empty(2, 2, 1, 16, dtype=torch.float16)
    near.copy_(torch.randn(2, 2, 1, 16, generator=torch.Generator().manual_seed(0)))
    far.copy_(near)
    for a, b in zip(*(results(x, x, x, backend="triton") for x in (far, near)), strict=True):
        assert torch.equal(a, b)


# ---- on a GPU -------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize(("K", "V"), [(16, 16), (32, 32), (64, 64), (60, 100), (100, 60), (128, 128)])
@pytest.mark.parametrize("T", [1, 63, 128, 500])
def test_every_tile_gpu(T: int, K: int, V: int, dtype: torch.dtype) -> None:
    """Each tile at lengths around those of tiles, whole and packed."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    args = tuple(x.cuda() for x in inputs(T, K, V, B=2, H=3, dtype=dtype))
    borders = torch.tensor([b for b in (0, 0, 15, 100, 300) if b < T] + [T, T], dtype=torch.int32, device="cuda")
    for causal in (False, True):
        for options in KINDS:
            assert_right(args, causal=causal, **options)
            assert_right([x[:1] for x in args], causal=causal, cu_seqlens=borders, **options)


# ---- without running ------------------------------------------------------------------------------------------


def test_more_heads_than_a_grid_axis_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """B·H = 70000 lies on the first axis, which holds 2^31 - 1."""
    from triton.runtime import JITFunction

    from ultra_kernels.sigmoid_attention import triton_kernels

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    if not isinstance(triton_kernels.forward_kernel, JITFunction):
        pytest.skip("TRITON_INTERPRET=1: kernels are Python functions")
    q = torch.empty_strided((7, 200, 10_000, 64), (0, 0, 64, 1), dtype=torch.bfloat16)
    seen = []
    monkeypatch.setattr(JITFunction, "run", lambda self, *a, grid, **k: seen.append((self.fn.__name__, grid)))
    with torch.no_grad():
        sigmoid_attention(q, q, q, backend="triton")
    ((name, grid),) = seen
    assert name == "forward_kernel" and len(grid) == 1 and 70_000 <= grid[0] < 2**31


def test_one_kernel_serves_all_lengths_and_biases(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes, strides, packing, causality and the kind of bias are run-time values."""
    from triton.runtime import JITFunction

    from ultra_kernels.sigmoid_attention import triton_kernels

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    if not isinstance(triton_kernels.forward_kernel, JITFunction):
        pytest.skip("TRITON_INTERPRET=1: kernels are Python functions")
    cu = torch.tensor([0, 3, 16], dtype=torch.int32)
    calls = ((16, 1, {}), (16, 3, {"bias": -1.0}), (1, 2, {"causal": True}), (16, 1, {"cu_seqlens": cu}))
    with recorded_launches(run=False) as seen, torch.no_grad():
        for T, H, options in calls:
            sigmoid_attention(*inputs(T, H=H), backend="triton", **options)
    (configuration,) = {c.name for c in triton_kernels.configurations() if any(map(c.covers, seen))}
    assert all(c.covers(x) for x in seen for c in triton_kernels.configurations() if c.name == configuration)


@pytest.mark.parametrize(
    ("q", "v", "reason"),
    [
        (torch.zeros(1, 2, 1, 8, dtype=torch.float64), torch.zeros(1, 2, 1, 8, dtype=torch.float64), "float64"),
        (torch.zeros(1, 2, 1, 8), torch.zeros(1, 2, 1, 8, dtype=torch.float16), "cast them to one"),
        (torch.zeros(1, 2, 1, 8), torch.zeros(1, 2, 1, 130), "above 128"),
    ],
)
def test_refusals_say_why(q, v, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(BackendUnavailable, match=reason):
        sigmoid_attention(q, q, v, backend="triton")
