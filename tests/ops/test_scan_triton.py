"""The Triton kernels of the scans and the convolution: what the cases of the op suite do not show."""

from __future__ import annotations

import os

import pytest
import torch

from ultra_kernels import BackendUnavailable, bidirectional_scan, causal_conv1d, selective_scan
from ultra_kernels._testing import compare, run, widened
from ultra_kernels.selective_scan.cases import scan_inputs
from ultra_kernels.selective_scan.op import SEGMENT

pytest.importorskip("triton")
interpreted = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1")


def leaves(made: dict) -> dict:
    return {
        k: v.float().requires_grad_() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in made.items()
    }


def assert_right(function, args: dict, reduction: int) -> dict[str, torch.Tensor]:
    got = run(function, args, "triton", torch.float32)
    assert not compare(got, run(function, widened(args), "reference", torch.float32), reduction)
    return got


def scan_args(*shape: int, seed: int = 0, **options) -> dict:
    return leaves(scan_inputs(torch.Generator().manual_seed(seed), *shape, **options))


@interpreted
def test_a_program_walks_several_short_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    """6 sequences in 2 programs of 3: sums over sequences inside a program and over programs."""
    from ultra_kernels.selective_scan import triton_kernels

    monkeypatch.setattr(triton_kernels, "FILLED", 2)
    args = scan_args(1, 3, 70, 2, directions=(2,), cu=(0, 2, 2, 9, 30, 31, 70))
    assert_right(bidirectional_scan, args, 70 * 2 * 70)


@interpreted
@pytest.mark.parametrize("shift", [True, False])
def test_borders_between_segments_and_pieces(shift: bool) -> None:
    args = scan_args(1, 2, 130, 1, directions=(2,), cu=(0, 66, 67, 130))
    assert_right(bidirectional_scan, args | {"shift": shift}, 130 * 130)


@interpreted
def test_the_last_state_alone_has_a_gradient() -> None:
    args = scan_args(2, 3, 5, 2)

    def last_state(**kwargs):
        return selective_scan(**kwargs, return_last_state=True)[1]

    got = run(last_state, args, "triton", torch.float32)
    expected = run(last_state, widened(args), "reference", torch.float32)
    for name in ("out0", "du", "ddelta", "dA", "dB"):
        torch.testing.assert_close(got[name].double(), expected[name], rtol=1e-5, atol=1e-6)


@interpreted
def test_same_bits_alone_and_packed() -> None:
    cu = (0, 5, 12)
    args = scan_args(1, 3, 12, 2, rows=True)
    packed = selective_scan(**args, cu_seqlens=torch.tensor(cu, dtype=torch.int32), backend="triton")
    for a, b in ((0, 5), (5, 12)):
        alone = {k: v[..., a:b] if k in ("u", "delta", "z", "B", "C") else v for k, v in args.items()}
        assert torch.equal(packed[..., a:b], selective_scan(**alone, backend="triton"))


@interpreted
def test_nan_stays_in_its_sequence() -> None:
    cu = torch.tensor([0, 5, 12], dtype=torch.int32)
    args = {k: v.detach() if torch.is_tensor(v) else v for k, v in scan_args(1, 3, 12, 2).items()}
    args["u"][..., :5] = float("nan")
    assert selective_scan(**args, cu_seqlens=cu, backend="triton")[..., 5:].isfinite().all()
    x = args["u"].clone()
    y = causal_conv1d(x, torch.randn(3, 4), cu_seqlens=cu, direction="centred", backend="triton")
    assert y[..., 5:].isfinite().all()


@interpreted
def test_no_tokens_and_no_channels() -> None:
    for shape in ((2, 0, 5, 3), (0, 3, 5, 2), (1, 3, 0, 2)):
        args = scan_args(*shape)
        out = selective_scan(**args, backend="triton")
        assert out.shape == args["u"].shape
        for g in torch.autograd.grad(out.sum(), [v for v in args.values() if torch.is_tensor(v)]):
            assert not g.any()


@interpreted
@pytest.mark.parametrize("rows", [True, False])
def test_layouts_of_output_and_gradient_may_differ(rows: bool) -> None:
    g = torch.Generator().manual_seed(3)
    x = torch.randn(2, 9, 6, generator=g).transpose(1, 2)
    x = (x if rows else x.contiguous()).requires_grad_()
    weight = torch.randn(6, 3, generator=g).requires_grad_()
    cotangent = torch.randn(2, 9, 6, generator=g).transpose(1, 2)
    cotangent = cotangent.contiguous() if rows else cotangent
    found = []
    for backend in ("triton", "reference"):
        y = causal_conv1d(x, weight, activation="silu", direction="backward", backend=backend)
        found.append([y.detach(), *torch.autograd.grad(y, (x, weight), cotangent)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


@interpreted
def test_a_view_with_gaps_on_both_axes() -> None:
    x, weight = torch.randn(2, 12, 10)[:, ::2, ::2], torch.randn(6, 4)
    torch.testing.assert_close(
        causal_conv1d(x, weight, backend="triton"), causal_conv1d(x, weight, backend="reference")
    )


@pytest.mark.parametrize("length", [1, 64, 512, 8192])
def test_scratch_of_backward_is_of_the_order_of_the_inputs(length: int) -> None:
    """16 states a channel before every second step of a segment, beside the elements of u; a constant for small u."""
    from ultra_kernels.selective_scan.triton_kernels import BACKWARD, FILLED, backward_programs

    block = BACKWARD[16]
    per_block = SEGMENT // block.piece * 16 * block.channels
    for sequences in (1, 7, 1000):
        for D in (32, 1536):
            blocks = D // block.channels
            programs = backward_programs(sequences, sequences * length, blocks)
            assert 1 <= programs <= sequences
            assert programs * blocks * per_block <= max(sequences * length * D, max(FILLED, blocks) * per_block)


def test_what_the_kernels_do_not_take(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(BackendUnavailable, match="N is 65, above 64"):
        selective_scan(**scan_args(1, 2, 3, 65), backend="triton")
    wide = {k: v.double() if torch.is_tensor(v) else v for k, v in scan_args(1, 2, 3, 2).items()}
    with pytest.raises(BackendUnavailable, match="float64"):
        selective_scan(**wide, backend="triton")
    with pytest.raises(BackendUnavailable, match="float64"):
        causal_conv1d(wide["u"], torch.randn(2, 4), backend="triton")
