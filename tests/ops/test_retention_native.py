"""What is special to retention in C++: chunk borders, states, layouts, threads, memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import pytest
import torch

from ultra_kernels import _native, retention, retention_step
from ultra_kernels.retention import native

pytestmark = pytest.mark.skipif(_native.missing() is not None, reason=str(_native.missing()))

DIRECTIONS = ("forward", "backward", "bidirectional")
# of 4 and 512 tokens, none at all, and one that ends within a chunk
DECAY = torch.tensor([1 - 1 / 4, 1 - 1 / 512, 1.0, 1e-3], dtype=torch.float64).log()
# Root mean square of the error over that of the result: the anchors of the published kernels' own tests are 0.005 in
# half precision; float32 here sums at most a thousand terms.
LIMITS = {torch.float32: 2e-5, torch.bfloat16: 5e-3, torch.float16: 5e-3}


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inputs(B: int, T: int, H: int, K: int, V: int) -> list[torch.Tensor]:
    return [rand(B, T, H, K), rand(B, T, H, K, seed=1), rand(B, T, H, V, seed=2)]


def results(tensors: list[torch.Tensor], dtype: torch.dtype, backend: str, **options: object) -> list[torch.Tensor]:
    """o and the gradients of q, k, v for one cotangent."""
    leaves = [x.to(dtype).detach().requires_grad_() for x in tensors]
    decay = DECAY[: leaves[0].shape[2]].to(torch.promote_types(dtype, torch.float32))
    o = retention(*leaves, decay, backend=backend, **options)
    cotangent = rand(*o.shape, seed=3).to(torch.bfloat16).to(dtype)
    return [o.detach(), *torch.autograd.grad(o, leaves, cotangent)]


def ratios(got: list[torch.Tensor], want: list[torch.Tensor]) -> list[float]:
    return [float((a.double() - b).norm() / b.norm()) for a, b in zip(got, want, strict=True)]


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(
    ("T", "K", "V"),
    [(1, 16, 16), (1, 3, 1), (33, 7, 5), (67, 33, 17), (63, 16, 24), (64, 60, 60), (65, 24, 16), (127, 16, 8),
     (128, 8, 16), (129, 100, 60), (500, 32, 64), (1000, 60, 100)],
)  # fmt: skip
@pytest.mark.parametrize("dtype", list(LIMITS))
def test_error_ratio(T: int, K: int, V: int, dtype: torch.dtype, direction: str) -> None:
    rounded = [x.to(dtype).double() for x in inputs(2, T, 4, K, V)]
    want = results(rounded, torch.float64, "reference", direction=direction, chunk_size=T)
    got = results(rounded, dtype, "native", direction=direction)
    assert max(ratios(got, want)) < LIMITS[dtype]


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_packed_borders(direction: str) -> None:
    borders = [0, 15, 100, 100, 300, 1200, 2000]
    tensors = inputs(1, borders[-1], 3, 16, 16)
    options = {"direction": direction, "cu_seqlens": torch.tensor(borders, dtype=torch.int32)}
    want = results(tensors, torch.float64, "reference", **options)
    assert max(ratios(results(tensors, torch.float32, "native", **options), want)) < LIMITS[torch.float32]


@pytest.mark.parametrize("chunk", [1, 7, 63, 64, 128, 1000])
def test_every_chunk_length_gives_the_same(chunk: int) -> None:
    tensors = inputs(1, 150, 4, 12, 20)
    want = results(tensors, torch.float64, "reference", chunk_size=150)
    assert max(ratios(results(tensors, torch.float32, "native", chunk_size=chunk), want)) < LIMITS[torch.float32]


def test_recurrent_is_chunkwise() -> None:
    q, k, v = (x.float() for x in inputs(2, 150, 4, 12, 20))
    decay, state = DECAY.float(), rand(2, 4, 12, 20, seed=4).float()
    o, last = retention(
        q, k, v, decay, direction="forward", initial_state=state, output_final_state=True, backend="native"
    )
    steps = []
    for t in range(150):
        step, state = retention_step(q[:, t], k[:, t], v[:, t], decay, state, backend="native")
        steps.append(step)
    assert max(ratios([torch.stack(steps, 1), state], [o.double(), last.double()])) < LIMITS[torch.float32]


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_threads_change_no_bit(threads: Callable[[int], None]) -> None:
    tensors = inputs(3, 200, 3, 16, 16)
    found = []
    for n in (1, 2, 5):
        threads(n)
        found.append(results(tensors, torch.float32, "native"))
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("dtype", list(LIMITS))
def test_a_sequence_keeps_its_nan(dtype: torch.dtype) -> None:
    tensors = inputs(1, 300, 2, 8, 8)
    for x in tensors:
        x[:, 100:170] = math.nan
    borders = torch.tensor([0, 100, 170, 300], dtype=torch.int32)
    for x in results(tensors, dtype, "native", cu_seqlens=borders):
        assert x[:, :100].isfinite().all() and x[:, 170:].isfinite().all() and x[:, 100:170].isnan().all()


def test_views_of_a_projection_are_read_in_place() -> None:
    projected = rand(2, 70, 3 * (8 + 8 + 16)).float()
    q, k, v = (x.unflatten(-1, (3, -1)) for x in projected.split([24, 24, 48], -1))
    assert all(_native.contiguous_rows(x) is x for x in (q, k, v))
    decay = DECAY[:3].float()
    got = retention(q, k, v, decay, backend="native")
    assert torch.equal(got, retention(q.contiguous(), k.contiguous(), v.contiguous(), decay, backend="native"))


def test_offsets_beyond_31_bits() -> None:
    far = 2**31 + 8
    try:
        memory = torch.empty(far + 64, dtype=torch.bfloat16)  # only the pages that are written take memory
    except RuntimeError as error:
        pytest.skip(f"4.3 GB of address space: {error}")
    q = memory.as_strided((2, 3, 1, 4), (far, 4, 4, 1)).copy_(rand(2, 3, 1, 4))
    near, decay = q.clone(), DECAY[:1].float()
    assert torch.equal(
        retention(q, q, q, decay, backend="native"), retention(near, near, near, decay, backend="native")
    )


def test_more_heads_than_a_16_bit_grid() -> None:
    q, k, v = (x.float() for x in inputs(35_000, 1, 2, 1, 1))
    torch.testing.assert_close(retention(q, k, v, DECAY[:2].float(), backend="native"), q * k * v)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_scratch_memory_is_linear_in_the_length(direction: str) -> None:
    """Per thread, at most two states a chunk of 64 tokens: 2·T·K·V/64 floats and tiles."""
    C, K, V = _native.load(), 64, 64

    def floats(T: int) -> int:
        q = torch.empty(1, T, 1, K)
        problem, _keep = native._problem(q, q, q, DECAY[:1], 1.0, None, direction, None, None, None)
        return max(C.retention_forward_scratch(problem), C.retention_backward_scratch(problem))

    tiles = floats(64)
    assert tiles < 64 * 64 * 24
    for T in (640, 6400, 64000):
        assert floats(T) - tiles <= 2 * T * K * V // 64


def test_dtypes_may_differ() -> None:
    q, k, v = (x.float() for x in inputs(1, 4, 1, 4, 4))
    o = retention(q, k, v.bfloat16(), DECAY[:1].float(), backend="native")
    torch.testing.assert_close(o, retention(q, k, v.bfloat16().float(), DECAY[:1].float(), backend="native"))
