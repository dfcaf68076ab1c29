"""The short convolution against torch's own, and its borders."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from ultra_kernels import _native, causal_conv1d

BACKENDS = [
    "reference",
    pytest.param("native", marks=pytest.mark.skipif(_native.missing() is not None, reason=str(_native.missing()))),
]
native = pytest.mark.skipif(_native.missing() is not None, reason=str(_native.missing()))
DIRECTIONS = ["forward", "backward", "centred"]


def inputs(batch: int, channels: int, length: int, width: int, dtype: torch.dtype) -> dict:
    g = torch.Generator().manual_seed(width)
    shapes = {"x": (batch, channels, length), "weight": (channels, width), "bias": (channels,)}
    return {k: torch.randn(*s, generator=g, dtype=torch.float64).to(dtype) for k, s in shapes.items()}


def kind(backend: str) -> torch.dtype:
    return torch.float64 if backend == "reference" else torch.float32


def same(got: torch.Tensor, want: torch.Tensor) -> None:
    """The C++ gives the same bits; torch's exp differs in the last one between its vector and scalar loops."""
    if got.dtype == torch.float32:
        assert torch.equal(got, want)
    else:
        torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-14)


def torch_conv(x, weight, bias, direction: str) -> torch.Tensor:
    D, W = weight.shape
    if direction == "backward":
        return torch_conv(x.flip(-1), weight, bias, "forward").flip(-1)
    left = W - 1 if direction == "forward" else (W - 1) // 2
    return F.conv1d(F.pad(x, (left, W - 1 - left)), weight[:, None], bias, groups=D)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("width", range(2, 9))
def test_is_torchs_convolution(backend: str, direction: str, width: int) -> None:
    args = inputs(2, 5, 70, width, torch.float64)
    want = torch_conv(**args, direction=direction)
    cast = {k: v.to(kind(backend)) for k, v in args.items()}
    limit = 4 * torch.finfo(kind(backend)).eps * width**0.5 * float(want.abs().max())
    for activation, expected in ((None, want), ("silu", F.silu(want))):
        got = causal_conv1d(**cast, direction=direction, activation=activation, backend=backend)
        torch.testing.assert_close(got.double(), expected, rtol=0, atol=limit)


@pytest.mark.parametrize("backend", BACKENDS)
def test_forward_reads_the_past_alone_and_backward_the_future(backend: str) -> None:
    args = inputs(1, 3, 12, 4, kind(backend))
    changed = args | {"x": args["x"].clone()}
    changed["x"][..., 6] += 1
    for direction, reached in (("forward", range(6, 10)), ("backward", range(3, 7)), ("centred", range(4, 8))):
        a, b = (causal_conv1d(**i, direction=direction, backend=backend) for i in (args, changed))
        assert (a != b).any(1)[0].nonzero().flatten().tolist() == list(reached)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_packed_equals_sequences_alone(backend: str, direction: str) -> None:
    cu = (0, 0, 1, 3, 3, 70, 90)
    args = inputs(1, 20, cu[-1], 5, kind(backend))
    borders = torch.tensor(cu, dtype=torch.int32)
    packed = causal_conv1d(**args, direction=direction, activation="silu", cu_seqlens=borders, backend=backend)
    for a, b in itertools.pairwise(cu):
        alone = causal_conv1d(
            **(args | {"x": args["x"][..., a:b]}), direction=direction, activation="silu", backend=backend
        )
        same(packed[..., a:b], alone)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_nothing_leaks_across_a_border(backend: str, direction: str) -> None:
    args = inputs(1, 3, 12, 4, kind(backend))
    args["x"][..., :5] = float("nan")
    args["x"].requires_grad_()
    cu = torch.tensor([0, 5, 12], dtype=torch.int32)
    out = causal_conv1d(**args, direction=direction, activation="silu", cu_seqlens=cu, backend=backend)
    assert out[..., 5:].isfinite().all()
    (dx,) = torch.autograd.grad(out[..., 5:].sum(), args["x"])
    assert dx[..., 5:].isfinite().all()


@native
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_layouts_agree_and_are_kept(direction: str) -> None:
    args = inputs(2, 37, 70, 4, torch.float32)
    rows = args["x"].transpose(1, 2).contiguous()
    wide = torch.cat([rows, rows], -1)[..., :37]  # gaps between the rows
    want = causal_conv1d(**args, direction=direction, backend="native")
    assert want.is_contiguous()
    for x in (rows, wide):
        got = causal_conv1d(**(args | {"x": x.transpose(1, 2)}), direction=direction, backend="native")
        assert torch.equal(got, want) and got.transpose(1, 2).is_contiguous()


@native
def test_bits_do_not_depend_on_the_number_of_threads() -> None:
    args = {k: v.requires_grad_() for k, v in inputs(3, 200, 90, 4, torch.float32).items()}
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            out = causal_conv1d(**args, activation="silu", backend="native")
            results.append(torch.autograd.grad(out.square().sum(), list(args.values())))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_gradcheck(direction: str) -> None:
    args = {k: v.requires_grad_() for k, v in inputs(1, 2, 6, 3, torch.float64).items()}
    cu = torch.tensor([0, 2, 6], dtype=torch.int32)
    assert torch.autograd.gradcheck(
        lambda x, w, b: causal_conv1d(x, w, b, activation="silu", direction=direction, cu_seqlens=cu),
        tuple(args.values()),
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_tokens(backend: str) -> None:
    args = inputs(2, 5, 0, 4, kind(backend))
    args["weight"].requires_grad_()
    out = causal_conv1d(**args, backend=backend)
    assert out.shape == (2, 5, 0)
    (dweight,) = torch.autograd.grad(out.sum(), args["weight"])
    assert torch.equal(dweight, torch.zeros_like(dweight))


@native
def test_compiles_without_a_break() -> None:
    args = inputs(1, 6, 20, 4, torch.float32)
    compiled = torch.compile(lambda x: causal_conv1d(**(args | {"x": x})), backend="aot_eager", fullgraph=True)
    grads = []
    for fn in (compiled, lambda x: causal_conv1d(**(args | {"x": x}))):
        x = args["x"].clone().requires_grad_()
        grads.append(torch.autograd.grad(fn(x).square().sum(), x)[0])
    assert torch.equal(*grads)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(4, 10)}, r"it must be \[B,D,L\]"),
        ({"weight": torch.zeros(4, 9)}, "W from 2 to 8"),
        ({"weight": torch.zeros(3, 4)}, r"\(4, W\)"),
        ({"bias": torch.zeros(3)}, r"bias has shape \(3,\)"),
        ({"activation": "gelu"}, "None or 'silu'"),
        ({"direction": "both"}, "'centred'"),
        ({"cu_seqlens": torch.tensor([0, 9], dtype=torch.int32)}, "must rise from 0 to the length 10"),
    ],
)
def test_errors(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        causal_conv1d(**(inputs(1, 4, 10, 4, torch.float32) | change), backend=None)
