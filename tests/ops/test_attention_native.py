"""What is special to sigmoid and HoPE attention in C++: tile borders, layouts, threads, memory, tails."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import pytest
import torch

from ultra_kernels import _native, hope_attention, sigmoid_attention
from ultra_kernels.hope_attention import native as hope_native
from ultra_kernels.sigmoid_attention import native as sigmoid_native

pytestmark = pytest.mark.skipif(_native.missing() is not None, reason=str(_native.missing()))

OPS = {"sigmoid": sigmoid_attention, "hope": hope_attention}
OPTIONS = {
    "sigmoid": [{}, {"causal": True}, {"normalize": True}, {"normalize": True, "causal": True}],
    "hope": [{}, {"causal": True}, {"mode": "global", "rotary_heads": 1}, {"rotary_heads": 1, "causal": True}],
}
BOTH = [pytest.param(op, options, id=f"{op}-{'-'.join(options)}") for op in OPS for options in OPTIONS[op]]
# Root mean square of the error over that of the result. HoPE rounds the factors of q and k as well.
LIMITS = {
    "sigmoid": {torch.float32: 2e-5, torch.bfloat16: 5e-3, torch.float16: 5e-3},
    "hope": {torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float16: 5e-3},
}


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inputs(B: int, T: int, H: int, K: int, V: int) -> list[torch.Tensor]:
    return [rand(B, T, H, K), rand(B, T, H, K, seed=1), rand(B, T, H, V, seed=2)]


def results(op: str, tensors: list[torch.Tensor], dtype: torch.dtype, backend: str, **options) -> list[torch.Tensor]:
    """o and the gradients of q, k, v for one cotangent."""
    leaves = [x.to(dtype).detach().requires_grad_() for x in tensors]
    o = OPS[op](*leaves, backend=backend, **options)
    cotangent = rand(*o.shape, seed=3).to(torch.bfloat16).to(dtype)
    return [o.detach(), *torch.autograd.grad(o, leaves, cotangent)]


def ratios(got: list[torch.Tensor], want: list[torch.Tensor]) -> list[float]:
    return [float((a.double() - b).norm() / b.norm()) for a, b in zip(got, want, strict=True)]


@pytest.mark.parametrize(("op", "options"), BOTH)
@pytest.mark.parametrize(
    ("T", "K", "V"),
    [(33, 6, 3), (63, 40, 24), (64, 16, 59), (65, 80, 111), (113, 40, 40), (128, 8, 16), (203, 64, 64), (217, 24, 24),
     (256, 16, 16), (257, 8, 8), (600, 128, 64)],
)  # fmt: skip
@pytest.mark.parametrize("dtype", list(LIMITS["hope"]))
def test_error_ratio(op: str, options: dict, T: int, K: int, V: int, dtype: torch.dtype) -> None:
    rounded = [x.to(dtype).double() for x in inputs(2, T, 2, K, V)]
    want = results(op, rounded, torch.float64, "reference", **options)
    assert max(ratios(results(op, rounded, dtype, "native", **options), want)) < LIMITS[op][dtype]


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("T", [1023, 1024, 2048])
def test_error_ratio_of_long_sequences(op: str, T: int) -> None:
    tensors = inputs(1, T, 2, 16, 16)
    want = results(op, tensors, torch.float64, "reference")
    assert max(ratios(results(op, tensors, torch.float32, "native"), want)) < LIMITS[op][torch.float32]


@pytest.mark.parametrize(("op", "options"), BOTH)
def test_packed_sequences_are_alone(op: str, options: dict) -> None:
    lengths = [15, 85, 0, 200, 128, 1, 64, 300]
    tensors = inputs(1, sum(lengths), 2, 12, 20)
    cu = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    packed = results(op, tensors, torch.float32, "native", cu_seqlens=cu, **options)
    leaves = [x.float().requires_grad_() for x in tensors]
    parts = zip(*(x.split(lengths, 1) for x in leaves), strict=True)
    o = torch.cat([OPS[op](*part, backend="native", **options) for part in parts], 1)
    cotangent = rand(*o.shape, seed=3).to(torch.bfloat16).float()
    alone = [o.detach(), *torch.autograd.grad(o, leaves, cotangent)]
    assert all(torch.equal(a, b) for a, b in zip(packed, alone, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", [113, 1024, 8192])
def test_weights_near_one_over_n(n: int, dtype: torch.dtype) -> None:
    """The output is the sum of n weights of about 1/n: their *relative* error, which absolute tolerances hide."""
    q, k = (0.3 * rand(1, n, 1, 8, seed=s) for s in range(2))
    q, k, v = (x.to(dtype) for x in (q[:, :64], k, torch.ones(1, n, 1, 1)))
    q = q.repeat(1, -(-n // 64), 1, 1)[:, :n]
    o = sigmoid_attention(q, k, v, backend="native")[0, :64, 0, 0].double()
    logits = q[0, :64, 0].double() @ k[0, :, 0].double().T / math.sqrt(8) - math.log(n)
    assert ((o / logits.sigmoid().sum(-1) - 1).abs() < (1e-2 if dtype == torch.bfloat16 else 1e-5)).all()


def test_gradient_of_the_bias_of_many_tiles() -> None:
    q, k, v = inputs(2, 300, 3, 8, 8)
    found = []
    for dtype, backend in ((torch.float32, "native"), (torch.float64, "reference")):
        bias = torch.tensor([-3.0, 0.0, 1.0], dtype=dtype, requires_grad=True)
        o = sigmoid_attention(*(x.to(dtype) for x in (q, k, v)), bias=bias, backend=backend)
        found += torch.autograd.grad(o, bias, rand(*o.shape, seed=3).to(dtype))
    assert max(ratios(found[:1], found[1:])) < 2e-5


@pytest.mark.parametrize("scale", [1e-3, 1.0, 300.0])
def test_sigmoid_tails(scale: float) -> None:
    """Weights from e^-87 to 1 keep their relative precision, and larger logits neither overflow nor become NaN."""
    q, k = torch.tensor([[[[scale]]]]), torch.linspace(-1, 1, 41).view(1, 41, 1, 1)
    q, v = q.expand(1, 41, 1, 1).contiguous(), torch.eye(41).view(1, 41, 1, 41)
    got = sigmoid_attention(q, k, v, scale=1.0, bias=0.0, backend="native")[0, 0, 0].double()
    want = torch.sigmoid(scale * k[0, :, 0, 0].double())
    assert got.isfinite().all() and ((got / want - 1).abs()[want > 1e-37] < 2e-5).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_hope_is_finite_far_away(dtype: torch.dtype) -> None:
    q, k, v = (x.to(dtype) for x in inputs(1, 20_000, 1, 2, 1))
    assert hope_attention(q, k, v, backend="native").isfinite().all()


@pytest.mark.slow
def test_hope_is_finite_at_100_000_tokens() -> None:
    leaves = [x.half().requires_grad_() for x in inputs(1, 100_000, 1, 2, 1)]
    o = hope_attention(*leaves, backend="native")
    assert o.isfinite().all()
    assert all(g.isfinite().all() for g in torch.autograd.grad(o.sum(), leaves))


@pytest.mark.parametrize("mode", ["per_pair", "global"])
def test_hope_depends_on_the_distance_alone(mode: str) -> None:
    """With one q and one k everywhere, a weight over that of the row's own key is a function of m - n."""
    T, K = 200, 8
    q, k = (x.expand(1, T, 1, K).float() for x in (rand(K), rand(K, seed=1)))
    weights = hope_attention(q, k, torch.eye(T).view(1, T, 1, T), mode=mode, backend="native")[0, :, 0]
    relative = weights / weights.diagonal()[:, None]
    for distance in (-150, -64, -3, 1, 40, 120):
        along = relative.diagonal(distance)
        torch.testing.assert_close(along, along[:1].expand_as(along), rtol=1e-4, atol=0)


def test_hope_reads_both_ways_alike() -> None:
    """Backwards, sinh changes its sign: reversed rows with the second channel of each pair negated answer reversed."""
    q, k, v = (x.float() for x in inputs(1, 150, 2, 8, 8))
    sign = torch.tensor([1.0, -1.0]).repeat(4)
    forwards = hope_attention(q, k, v, backend="native")
    backwards = hope_attention(*((x * s).flip(1) for x, s in ((q, sign), (k, sign), (v, 1.0))), backend="native")
    torch.testing.assert_close(backwards.flip(1), forwards, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("damping", [0.0, 0.5, 30.0])
def test_any_damping(damping: float) -> None:
    """At 30 a key weighs nothing one token away: its logits are 0, and rows nearly average the values."""
    tensors = inputs(1, 150, 1, 8, 8)
    want = results("hope", tensors, torch.float64, "reference", damping=damping)
    assert max(ratios(results("hope", tensors, torch.float32, "native", damping=damping), want)) < 2e-5


@pytest.mark.parametrize(("op", "options"), BOTH)
def test_a_sequence_keeps_its_nan(op: str, options: dict) -> None:
    tensors = inputs(1, 300, 2, 8, 8)
    for x in tensors:
        x[:, 100:170] = math.nan
    borders = torch.tensor([0, 100, 170, 300], dtype=torch.int32)
    for x in results(op, tensors, torch.float32, "native", cu_seqlens=borders, **options):
        assert x[:, :100].isfinite().all() and x[:, 170:].isfinite().all()
        assert x[:, 100:170].isnan().flatten(2).any(-1).all()


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("op", OPS)
def test_threads_change_no_bit(op: str, threads: Callable[[int], None]) -> None:
    tensors = inputs(3, 400, 3, 16, 16)
    found = []
    for n in (1, 2, 5):
        threads(n)
        found.append(results(op, tensors, torch.float32, "native"))
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("op", OPS)
def test_views_of_a_projection_are_read_in_place(op: str) -> None:
    projected = rand(2, 70, 3 * 3 * 8).float().view(2, 70, 3, 3, 8)
    q, k, v = projected.unbind(2)
    assert all(_native.contiguous_rows(x) is x for x in (q, k, v))
    got = OPS[op](q, k, v, backend="native")
    assert torch.equal(got, OPS[op](*(x.contiguous() for x in (q, k, v)), backend="native"))


@pytest.mark.parametrize("op", OPS)
def test_offsets_beyond_31_bits(op: str) -> None:
    far = 2**31 + 8
    try:
        memory = torch.empty(far + 64, dtype=torch.bfloat16)  # only the pages that are written take memory
    except RuntimeError as error:
        pytest.skip(f"4.3 GB of address space: {error}")
    q = memory.as_strided((2, 3, 1, 4), (far, 4, 4, 1)).copy_(rand(2, 3, 1, 4))
    near = q.clone()
    assert torch.equal(OPS[op](q, q, q, backend="native"), OPS[op](near, near, near, backend="native"))


def test_scratch_memory_is_linear_in_the_length() -> None:
    """Per thread: the forward's tiles alone, and backward one float32 dq and a number or two a row."""
    C, K = _native.load(), 64

    def floats(op: str, T: int) -> tuple[int, int]:
        q = torch.empty(1, T, 1, K)
        if op == "sigmoid":
            problem, _keep = sigmoid_native._problem(q, q, q, 1.0, None, None, True, False, None, torch.empty(1, 1, T))
            return C.sigmoid_forward_scratch(problem), C.sigmoid_backward_scratch(problem)
        options = (torch.tensor(0.01), 1e4, "per_pair", 1.0, False, 0, 1e4, None, None, None)
        problem, _keep = hope_native._problem(q, q, q, *options, torch.empty(1, 1, T))
        return C.hope_forward_scratch(problem), C.hope_backward_scratch(problem)

    for op in OPS:
        forward, backward = floats(op, 64)
        assert max(forward, backward) < 64 * 64 * 40
        for T in (640, 6400, 64000):
            assert floats(op, T)[0] == forward
            assert floats(op, T)[1] - backward <= T * (K + 2)
