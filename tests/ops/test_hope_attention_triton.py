"""HoPE attention in Triton under the interpreter: every tile of the tables, packing, far distances, strides."""

from __future__ import annotations

import itertools
import os

import pytest
import torch

from ultra_kernels import BackendUnavailable, hope_attention
from ultra_kernels._testing import tolerance

pytest.importorskip("triton")
interpreted = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1")


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inputs(T: int, H: int, K: int, V: int, B: int = 1) -> list[torch.Tensor]:
    return [rand(B, T, H, K), rand(B, T, H, K, seed=1), rand(B, T, H, V, seed=2), torch.tensor(0.05).double()]


def results(tensors, dtype, backend: str, **options) -> list[torch.Tensor]:
    """o and the gradients of q, k, v and damping for one cotangent."""
    leaves = [x.to(dtype).detach().requires_grad_() for x in tensors[:3]]
    damping = tensors[3].to(torch.promote_types(dtype, torch.float32)).detach().requires_grad_()
    o = hope_attention(*leaves, damping=damping, backend=backend, **options)
    cotangent = rand(*o.shape, seed=3).half().to(dtype)
    return [o.detach(), *torch.autograd.grad(o, [*leaves, damping], cotangent)]


def assert_right(tensors, dtype, **options) -> None:
    rounded = [*(x.to(dtype).double() for x in tensors[:3]), tensors[3]]
    got, want = results(rounded, dtype, "triton", **options), results(rounded, torch.float64, "reference", **options)
    T, width = tensors[0].shape[1], max(tensors[0].shape[3], tensors[2].shape[3])
    for name, a, b in zip(("o", "dq", "dk", "dv", "ddamping"), got, want, strict=True):
        rows = T * tensors[0].shape[2] if name == "ddamping" else 1
        error = float((a.double() - b).abs().max())
        limit = tolerance(b, dtype, T * width * rows, roundings=3)
        assert error <= limit, f"{name}: {error:.3g} > {limit:.3g}"


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("arch", "K", "V"), itertools.product((80, 90, 100), (10, 60, 96), (7, 40)))
def test_every_tile_of_the_tables(arch: int, K: int, V: int, dtype: torch.dtype, monkeypatch) -> None:
    if dtype == torch.float32 and arch != 90:
        pytest.skip("float32 has one table")
    monkeypatch.setattr("ultra_kernels._triton.arch_of", lambda tensor: arch)
    assert_right(inputs(69, 2, K, V), dtype, rotary_heads=1)


@interpreted
@pytest.mark.parametrize("causal", [False, True])
def test_packed_sequences_are_alone(causal: bool) -> None:
    lengths = [15, 0, 33, 16, 1, 20]
    cu = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    tensors = inputs(sum(lengths), 2, 6, 5)
    packed = results(tensors, torch.float32, "triton", cu_seqlens=cu, causal=causal, rotary_heads=1)[0]
    parts = zip(*(x.float().split(lengths, 1) for x in tensors[:3]), strict=True)
    alone = [
        hope_attention(*part, damping=tensors[3].float(), causal=causal, rotary_heads=1, backend="triton")
        for part in parts
    ]
    torch.testing.assert_close(packed, torch.cat(alone, 1), rtol=1e-5, atol=1e-6)


@interpreted
@pytest.mark.parametrize("damping", [0.0, 30.0])
def test_any_damping(damping: float) -> None:
    tensors = inputs(50, 1, 8, 8)
    tensors[3] = torch.tensor(damping).double()
    assert_right(tensors, torch.float32)


@interpreted
def test_strides() -> None:
    """Rows of one projection, and a batch far apart whose offsets exceed 2^31 elements."""
    q, k, v = rand(2, 20, 3, 2, 8).float().unbind(2)
    expected = hope_attention(*(x.contiguous() for x in (q, k, v)), backend="triton")
    assert torch.equal(hope_attention(q, k, v, backend="triton"), expected)
    far = 2**31 + 8
    try:
        memory = torch.empty(far + 64, dtype=torch.float16)  # only the pages that are written take memory
    except RuntimeError as error:
        pytest.skip(f"4.3 GB of address space: {error}")
    x = memory.as_strided((2, 3, 1, 4), (far, 4, 4, 1)).copy_(rand(2, 3, 1, 4))
    near = x.clone()
    assert torch.equal(hope_attention(x, x, x, backend="triton"), hope_attention(near, near, near, backend="triton"))


@interpreted
def test_limits_are_named() -> None:
    wide = torch.zeros(1, 2, 1, 130)
    with pytest.raises(BackendUnavailable, match="above 128; use more heads"):
        hope_attention(wide, wide, wide, backend="triton")
    q = torch.zeros(1, 2, 1, 4)
    with pytest.raises(BackendUnavailable, match="cast them to one"):
        hope_attention(q, q, q.half(), backend="triton")
