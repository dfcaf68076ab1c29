"""The Triton kernels of retention: what the cases of the op suite do not show. Most of it needs TRITON_INTERPRET=1."""

from __future__ import annotations

import os

import pytest
import torch

from ultra_kernels import BackendUnavailable, retention, retention_step
from ultra_kernels._testing import tolerance
from ultra_kernels._triton import recorded_launches

pytest.importorskip("triton")
interpreted = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1")
DIRECTIONS = ("forward", "backward", "bidirectional")


def inputs(T: int, K: int = 4, V: int = 5, B: int = 1, gammas: tuple[float, ...] = (0.9, 1.0), dtype=torch.float32):
    g = torch.Generator().manual_seed(T)
    q, k, v = (torch.randn(B, T, len(gammas), n, generator=g, dtype=torch.float64).to(dtype) for n in (K, K, V))
    return q, k, v, torch.tensor(gammas, dtype=torch.float64).log()


def results(q, k, v, log_decay, *, backend, wide=False, **options):
    """o and the gradients of q, k, v under one cotangent."""
    leaves = [(x.double() if wide else x).detach().requires_grad_() for x in (q, k, v)]
    o = retention(*leaves, log_decay.double() if wide else log_decay.float(), backend=backend, **options)
    cotangent = torch.randn(o.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64).to(q.dtype).to(o)
    return [o.detach(), *torch.autograd.grad(o, leaves, cotangent)]


def assert_right(args, **options) -> list[torch.Tensor]:
    got = results(*args, backend="triton", **options)
    want = results(*args, backend="reference", wide=True, **{**options, "chunk_size": None})
    reduction = args[0].shape[1] * max(args[0].shape[3], args[2].shape[3])
    for name, a, b in zip(("o", "dq", "dk", "dv"), got, want, strict=True):
        error, limit = float((a.double() - b).abs().max()), tolerance(b, args[0].dtype, reduction)
        assert error <= limit, f"{name}: {error:.3g} > {limit:.3g}"
    return got


@interpreted
@pytest.mark.parametrize(
    ("T", "gamma", "direction"),
    [(63, 0.9, "forward"), (64, 1.0, "backward"), (65, 0.9, "bidirectional"), *((129, 1.0, d) for d in DIRECTIONS)],
)
def test_chunkwise_is_parallel(T: int, gamma: float, direction: str) -> None:
    """Chunks of 64: one row short of a chunk, one whole, one row over, two and a row."""
    args = inputs(T, gammas=(gamma,))
    chunkwise = assert_right(args, direction=direction, chunk_size=33)  # rounded up
    parallel = assert_right(args, direction=direction, chunk_size=T)
    for a, b in zip(chunkwise, parallel, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2 * tolerance(b, torch.float32, 5 * T))


@interpreted
@pytest.mark.parametrize("chunk", [64, None])
def test_packed_borders(chunk: int | None) -> None:
    """Sequences that are empty, of one row, of a tile, over a tile, and start within one; more than one search step."""
    cu = [0, 0, 15, 79, 79, 80, 209, 209]
    args = inputs(209, gammas=(0.95,))
    assert_right(args, cu_seqlens=torch.tensor(cu, dtype=torch.int32), chunk_size=chunk)


@interpreted
def test_many_sequences() -> None:
    """The search for a tile's sequence looks at 128 borders at a time."""
    lengths = torch.arange(140) % 3
    cu = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    q, k, v, decay = inputs(int(cu[-1]), gammas=(0.8,))
    got = retention(q, k, v, decay.float(), cu_seqlens=cu, direction="forward", backend="triton")
    want = retention(q.double(), k.double(), v.double(), decay, cu_seqlens=cu, direction="forward", backend="reference")
    assert float((got - want).abs().max()) <= tolerance(want, torch.float32, 2 * 5)


@interpreted
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_tiles_that_are_skipped_would_add_nothing(direction: str) -> None:
    """gamma^distance falls below 2^-24 after 24 of 260 rows, at gamma = 0 after none: most tiles are skipped."""
    args = inputs(260, gammas=(0.5, 0.0))
    got = assert_right(args, direction=direction, chunk_size=260)
    assert all(x.isfinite().all() for x in got)


@interpreted
def test_a_large_key_is_heard_from_afar() -> None:
    """A key 2^20 times as large as the others is heard by the rows that gamma^distance lets hear it, 120 of them."""
    q, k, v, decay = inputs(300, gammas=(2.0**-0.2,))
    k[:, 0] *= 2.0**20
    assert_right((q, k, v, decay), chunk_size=300)


@interpreted
def test_float16_holds_states_of_any_length() -> None:
    """The sum of 300 equal products of 400 would be 120000, above float16's 65504; an average is not."""
    q, k, v, decay = inputs(300, gammas=(1.0,), dtype=torch.float16)
    k, v = torch.full_like(k, 20.0), torch.full_like(v, 20.0)
    assert_right((q, k, v, decay), direction="forward", scale=1e-3, chunk_size=128)


@interpreted
def test_unaligned_views_are_read() -> None:
    """Rows at odd addresses, and head dimensions with gaps between their elements."""
    x = torch.randn(1, 20, 2, 40, generator=torch.Generator().manual_seed(0))
    q, k, v = x[..., 1:17], x[..., 2:34:2], x[..., 3:35]
    assert_right((q, k, v, torch.tensor([0.9, 0.8], dtype=torch.float64).log()))


@interpreted
def test_gradient_of_the_final_state_alone() -> None:
    q, k, v, decay = inputs(70)

    def gradients(backend: str, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        leaves = [x.to(dtype).detach().requires_grad_() for x in (k, v)]
        _, state = retention(
            q.to(dtype), *leaves, decay.to(dtype), direction="forward", output_final_state=True, backend=backend
        )
        return torch.autograd.grad(state.square().sum(), leaves)

    for a, b in zip(gradients("triton", torch.float32), gradients("reference", torch.float64), strict=True):
        assert float((a.double() - b).abs().max()) <= tolerance(b, torch.float32, 70 * 5)


@interpreted
def test_a_scale_of_zero_has_a_gradient() -> None:
    q, k, v, decay = inputs(20)
    scale = torch.zeros(2, requires_grad=True)
    (got,) = torch.autograd.grad(retention(q, k, v, decay.float(), scale=scale, backend="triton").sum(), scale)
    (want,) = torch.autograd.grad(retention(q, k, v, decay.float(), scale=scale, backend="reference").sum(), scale)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@interpreted
def test_same_bits_on_every_run() -> None:
    args = inputs(130, gammas=(0.9,))
    for a, b in zip(results(*args, backend="triton"), results(*args, backend="triton"), strict=True):
        assert torch.equal(a, b)


# ---- on a GPU -------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize(("K", "V"), [(32, 32), (64, 64), (60, 100), (100, 60), (128, 128), (96, 192), (256, 256)])
@pytest.mark.parametrize(("T", "chunk"), [(1, None), (63, None), (500, None), (127, 1), (500, 128), (1000, 256)])
def test_every_tile_gpu(T: int, chunk: int | None, K: int, V: int, dtype: torch.dtype) -> None:
    """Each tile in both forms, at lengths around those of tiles and chunks."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    q, k, v, decay = inputs(T, K, V, B=2, gammas=(0.9, 511 / 512, 1.0), dtype=dtype)
    args = (q.cuda(), k.cuda(), v.cuda(), decay.cuda())
    for direction in DIRECTIONS:
        assert_right(args, direction=direction, chunk_size=chunk)
    args = (*(x[:1] for x in args[:3]), decay.cuda())
    borders = torch.tensor([b for b in (0, 0, 15, 100, 300) if b < T] + [T, T], dtype=torch.int32, device="cuda")
    assert_right(args, cu_seqlens=borders, chunk_size=chunk)


# ---- without running ------------------------------------------------------------------------------------------


def grids(monkeypatch: pytest.MonkeyPatch, call) -> list[tuple[str, tuple[int, ...], dict[str, int]]]:
    """Kernel, grid and numbers of every launch; nothing runs, so that tensors may be as large as addresses allow."""
    from triton.runtime import JITFunction

    from ultra_kernels.retention import triton_kernels

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    if not isinstance(triton_kernels.tile_kernel, JITFunction):
        pytest.skip("TRITON_INTERPRET=1: kernels are Python functions")
    found = []
    with recorded_launches(run=False):
        inner = JITFunction.run

        def record(self, *args, grid, **kwargs):
            found.append((self.fn.__name__, grid, dict(zip(self.arg_names, args, strict=False)) | kwargs))
            return inner(self, *args, grid=grid, **kwargs)

        monkeypatch.setattr(JITFunction, "run", record)
        call()
        monkeypatch.undo()
    return found


@pytest.mark.parametrize("chunk", [None, 128])
def test_more_heads_than_a_grid_axis_holds(monkeypatch: pytest.MonkeyPatch, chunk: int | None) -> None:
    """B·H = 70000 lies on the first axis, which holds 2^31 - 1."""
    x = torch.empty(1, 1, 1, 1, dtype=torch.bfloat16).expand(7, 200, 10_000, 64)
    q = torch.empty_strided(x.shape, (0, 0, 64, 1), dtype=x.dtype)
    with torch.no_grad():
        seen = grids(monkeypatch, lambda: retention(q, q, q, torch.zeros(10_000), chunk_size=chunk, backend="triton"))
    assert [name for name, _, _ in seen] == ["state_kernel", "tile_kernel"][chunk is None :]
    for _, grid, _ in seen:
        assert len(grid) == 1 and 70_000 <= grid[0] < 2**31


def test_strides_beyond_two_gigabytes() -> None:
    """They are passed in units of 8 elements, so that they stay int32, and multiplied in 64 bits; nothing is copied."""
    from ultra_kernels.retention import triton_kernels

    stride = 2**31 + 64
    x = torch.empty_strided((2, 2, 2, 64), (2 * stride, stride, 64, 1), dtype=torch.bfloat16, device="meta")
    assert triton_kernels._readable(x) is x
    assert triton_kernels._strides(x) == [stride // 4, stride // 8, 8] and stride // 4 < 2**31


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
    decay = torch.tensor([-0.1])
    got, want = (retention(x, x, x, decay, backend="triton") for x in (far, near))
    assert torch.equal(got, want)


@pytest.mark.parametrize(
    ("q", "v", "reason"),
    [
        (torch.zeros(1, 2, 1, 8, dtype=torch.float64), torch.zeros(1, 2, 1, 8, dtype=torch.float64), "float64"),
        (torch.zeros(1, 2, 1, 8), torch.zeros(1, 2, 1, 8, dtype=torch.float16), "cast them to one"),
        (torch.zeros(1, 2, 1, 8), torch.zeros(1, 2, 1, 300), "above 256"),
    ],
)
def test_refusals_say_why(q, v, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    decay = torch.zeros(1)
    with pytest.raises(BackendUnavailable, match=reason):
        retention(q, q, v, decay, backend="triton")
    with pytest.raises(BackendUnavailable, match=reason):
        step = q[:, 0], q[:, 0], v[:, 0]
        retention_step(*step, decay, torch.zeros(1, 1, 8, v.shape[3]), backend="triton")


def test_the_parallel_form_is_taken_for_short_sequences() -> None:
    from ultra_kernels.retention.triton_kernels import chunk_length

    assert [chunk_length(T, 64, 64) for T in (128, 512, 513)] == [None, None, 128]
    assert [chunk_length(T, 128, 256) for T in (1024, 2048)] == [None, 256]
