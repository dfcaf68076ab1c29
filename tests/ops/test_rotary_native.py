"""The C++ kernel of rotary: layouts, positions of every kind, its tables, threads and compiled graphs."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable

import pytest
import torch

from ultra_kernels import _native, _rotations, hope_attention, rotary

native = importlib.import_module("ultra_kernels.rotary.native")  # the package has a function of its own name
pytestmark = pytest.mark.skipif(_native.missing() is not None, reason=str(_native.missing()))

F64 = torch.float64
EPS = {torch.float32: 2**-24, torch.bfloat16: 2**-8, torch.float16: 2**-11}  # of a rounding to nearest
LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "contiguous": lambda x: x.contiguous(),
    "projection": lambda x: torch.stack((x + 1, x, x - 1), 2)[:, :, 1],
    "heads first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "gaps": lambda x: torch.stack((x, x + 1), -1)[..., 0],
    "one batch row": lambda x: x[:1].expand(x.shape),
    "one head": lambda x: x[:, :, :1].expand(x.shape),
    "one number": lambda x: x[..., :1].expand(x.shape),
}


def literal(x: torch.Tensor, positions: torch.Tensor, theta: float = 1e4) -> torch.Tensor:
    """The rotation written out in float64."""
    frequency = theta ** (torch.arange(0, x.shape[3], 2, dtype=F64) / -x.shape[3])
    angle = positions.expand(x.shape[:2]).double()[..., None, None] * frequency
    a, b = x.double().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()), -1).flatten(-2)


def assert_near(got: torch.Tensor, want: torch.Tensor) -> None:
    """Products of numbers up to 4 with rounded sines and cosines, their sum, and the rounding of the result."""
    assert got.shape == want.shape and got.is_contiguous()
    assert ((got.double() - want).abs() <= 4 * 4 * 2**-24 + want.abs() * EPS[got.dtype]).all()


def rand(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).clamp(-4, 4)


@pytest.mark.parametrize("dtype", EPS)
@pytest.mark.parametrize("K", [2, 6, 14, 16, 30, 60, 64, 128])
def test_widths_and_lengths(isa: str, K: int, dtype: torch.dtype) -> None:
    for T in (0, 1, 2, 37):
        x, at = rand(2, T, 3, K).to(dtype).requires_grad_(), torch.arange(T)
        y = rotary(x, at, theta=50.0, backend="native")
        assert_near(y, literal(x.detach(), at, 50.0))
        cotangent = rand(2, T, 3, K).flip(-1).to(dtype)
        assert_near(torch.autograd.grad(y, x, cotangent)[0], literal(cotangent, -at, 50.0))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("K", [6, 64])
def test_layouts(layout: str, K: int) -> None:
    at = torch.arange(11)
    x = LAYOUTS[layout](rand(2, 11, 3, K)).requires_grad_()
    y = rotary(x, at, backend="native")
    assert_near(y, literal(x.detach(), at))
    cotangent = LAYOUTS[layout](rand(2, 11, 3, K))
    assert_near(torch.autograd.grad(y, x, cotangent)[0], literal(cotangent, -at))
    plain = x.detach().contiguous()
    assert torch.equal(y.detach(), rotary(plain, at, backend="native"))


POSITIONS = {
    "ints": torch.arange(24, dtype=torch.int32),
    "shorts": torch.arange(24, dtype=torch.int16) - 5,
    "bytes": torch.arange(24, dtype=torch.uint8),
    "negative": torch.arange(24) - 12,
    "far": torch.arange(24) + 10**9,
    "far and negative": -torch.arange(24, dtype=torch.int32) - 10**9,
    "spread": torch.arange(24) * 999_983 % 2**27 - 2**26,
    "every other": torch.arange(48)[::2],
    "backwards, repeated": torch.arange(24).flip(0) // 3,
    "rows": torch.stack((torch.arange(24), 3 * torch.arange(24, 0, -1))),
    "one row": torch.arange(24)[None].expand(2, 24),
    "columns": torch.stack((torch.arange(24), 7 * torch.arange(24)), 1).int().T,
}


@pytest.mark.parametrize("positions", POSITIONS.values(), ids=POSITIONS)
def test_positions(positions: torch.Tensor) -> None:
    x = rand(2, 24, 3, 20)
    assert_near(rotary(x, positions, backend="native"), literal(x, positions))


def test_packed_positions_start_over() -> None:
    x = rand(1, 30, 2, 64)
    lengths = (13, 1, 16)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    parts = [rotary(part, torch.arange(part.shape[1]), backend="native") for part in x.split(lengths, 1)]
    assert torch.equal(rotary(x, positions, backend="native"), torch.cat(parts, 1))


def test_float64_angles_at_every_position_up_to_8192() -> None:
    """Of float32 angles sine and cosine were off by 5e-4."""
    x, at = rand(1, 8193, 1, 64), torch.arange(8193)
    assert_near(rotary(x, at, backend="native"), literal(x, at))


def test_inv_freq_replaces_theta_and_gets_no_gradient() -> None:
    x, at = rand(2, 9, 2, 8), torch.arange(9)
    inv_freq = (50.0 ** (-torch.arange(0, 8, 2, dtype=F64) / 8)).requires_grad_()
    y = rotary(x, at, inv_freq=inv_freq, backend="native")
    assert not y.requires_grad
    assert_near(y, literal(x, at, 50.0))
    x.requires_grad_()
    dx, dinv_freq = torch.autograd.grad(
        rotary(x, at, inv_freq=inv_freq, backend="native").sum(), (x, inv_freq), allow_unused=True
    )
    assert dinv_freq is None
    assert_near(dx, literal(torch.ones_like(x), -at, 50.0))


def test_the_gradient_turns_back() -> None:
    x, at = rand(1, 50, 2, 64).requires_grad_(), torch.arange(50) * 37
    y = rotary(x, at, backend="native")
    assert_near(torch.autograd.grad(y, x, y.detach())[0], x.detach().double())


# ---- tables


def test_layers_and_hope_attention_share_a_table() -> None:
    _rotations.rotations.cache_clear()
    q = rand(1, 70, 2, 16)
    for length in (70, 65, 100):  # to the next power of two, here 128
        for _ in range(3):
            rotary(rand(1, length, 2, 16), torch.arange(length), theta=77.0, backend="native")
    hope_attention(q, q, q, rotary_heads=2, rotary_theta=77.0, backend="native")
    info = _rotations.rotations.cache_info()
    assert (info.misses, info.hits) == (1, 9)


def test_tables_follow_what_the_call_says() -> None:
    x, at = rand(1, 9, 2, 8), torch.arange(9)
    for theta in (100.0, 200.0, 100.0):
        assert_near(rotary(x, at, theta=theta, backend="native"), literal(x, at, theta))
    at.mul_(5)  # the same tensor with other numbers, as a compiled graph makes them
    assert_near(rotary(x, at, backend="native"), literal(x, at))
    at.data.mul_(3)  # and its version does not rise
    assert_near(rotary(x, at, backend="native"), literal(x, at))


def test_tables_stay_small() -> None:
    frequency = _rotations.frequencies(8, 1e4)
    for positions, most in (
        (torch.arange(2048), 2048),
        (torch.arange(2048) - 1024, 4096),
        (torch.arange(2048) + 10**9, 4096),
        (torch.tensor([0, 8191]), 8192),
        (torch.tensor([0, 8192]), 2),
        (torch.tensor([-(2**62), 2**62]), 2),
        (torch.arange(8192) * 4, 32768),
        (torch.arange(8192) * 5, 8192),
    ):
        place, first, (cosine, sine) = native._tables(positions, frequency)
        assert cosine.shape == sine.shape and len(cosine) <= most
        assert 0 <= int(place.min()) - first and int(place.max()) - first < len(cosine)


# ---- bits


def test_other_numbers_do_not_matter(isa: str) -> None:
    """A NaN stays in its pair; at position 0 every number of bfloat16 comes back, to the bit."""
    for K in (6, 60, 64):
        x = rand(1, 5, 2, K)
        x[0, 2, 1, 3] = math.nan
        wrong = rotary(x, torch.arange(5), backend="native").isnan()
        assert wrong[0, 2, 1, 2:4].all() and wrong.sum() == 2
    bits = torch.arange(2**16).int().to(torch.int16)
    numbers = bits.view(torch.bfloat16)
    finite, rest = bits[numbers.isfinite()], numbers[~numbers.isfinite()]
    x = finite.view(torch.bfloat16).view(1, -1, 1, 64)
    y = rotary(x, torch.zeros(x.shape[1], dtype=torch.int64), backend="native")
    same = y.view(torch.int16).flatten() == finite
    assert (same | (finite == -(2**15))).all()  # -0 + 0 is 0
    x = rest.view(1, 1, 1, -1)
    assert torch.equal(rotary(x, torch.zeros(1, dtype=torch.int64), backend="native").isnan(), ~x.isfinite())


def test_threads_change_no_bit() -> None:
    x, at, before = rand(3, 2000, 3, 16), torch.arange(2000), torch.get_num_threads()
    found = []
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            found.append(rotary(x, at, backend="native"))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_views_of_a_projection_are_read_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, _ = rand(2, 70, 3 * 3 * 8).view(2, 70, 3, 3, 8).unbind(2)
    want = [rotary(x.contiguous(), torch.arange(70), backend="native") for x in (q, k)]

    def refuse(self: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        raise AssertionError("a copy")

    for name in ("contiguous", "clone", "reshape"):
        monkeypatch.setattr(torch.Tensor, name, refuse)
    for x, y in zip((q, k), want, strict=True):
        assert torch.equal(rotary(x, torch.arange(70), backend="native"), y)


def test_offsets_beyond_31_bits() -> None:
    far = 2**31 + 8
    try:
        memory = torch.empty(far + 64, dtype=torch.bfloat16)  # only the pages that are written take memory
    except RuntimeError as error:
        pytest.skip(f"4.3 GB of address space: {error}")
    x = memory.as_strided((2, 3, 1, 4), (far, 4, 4, 1)).copy_(rand(2, 3, 1, 4))
    at = torch.arange(3)
    assert torch.equal(rotary(x, at, backend="native"), rotary(x.clone(), at, backend="native"))


# ---- dispatch


def test_who_runs() -> None:
    from ultra_kernels._dispatch import OPS

    choose = OPS["rotary"].choose
    assert all(choose(None, torch.empty(1, 2, 1, 4, dtype=dtype)) == "native" for dtype in EPS)
    assert choose(None, torch.empty(1, 2, 1, 4, dtype=F64)) == "reference"


def test_one_graph_for_all_lengths() -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    def turned(qkv: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        q, k, _ = qkv.unbind(2)
        return rotary(q, at, backend="native") + rotary(k, at, backend="native")

    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(turned, fullgraph=True, dynamic=True, backend=counter)
    graphs = []
    for T in (5, 8, 12):
        qkv = rand(2, T, 3, 2, 6).requires_grad_()
        (got, grad), (want, want_grad) = (
            (y, torch.autograd.grad(y.square().sum(), qkv)[0])
            for y in (f(qkv, torch.arange(T)) for f in (compiled, turned))
        )
        assert torch.equal(got, want)
        torch.testing.assert_close(grad, want_grad)
        graphs.append(counter.frame_count)
    assert len(set(graphs)) == 1
