"""The bidirectional scan against two selective scans and against its matrix form."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from ultra_kernels import _native, bidirectional_scan, selective_scan
from ultra_kernels._testing import compare, run, widened
from ultra_kernels.selective_scan.cases import scan_inputs
from ultra_kernels.selective_scan.op import SEGMENT

BACKENDS = [
    "reference",
    pytest.param("native", marks=pytest.mark.skipif(_native.missing() is not None, reason=str(_native.missing()))),
]
native = pytest.mark.skipif(_native.missing() is not None, reason=str(_native.missing()))


def inputs(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0, **options) -> dict:
    made = scan_inputs(torch.Generator().manual_seed(seed), *shape, directions=(2,), **options)
    return {k: v.to(dtype) if torch.is_tensor(v) and v.is_floating_point() else v for k, v in made.items()}


def kind(backend: str) -> torch.dtype:
    return torch.float64 if backend == "reference" else torch.float32


def same(got: torch.Tensor, want: torch.Tensor) -> None:
    """The C++ gives the same bits; torch's exp differs in the last one between its vector and scalar loops."""
    if got.dtype == torch.float32:
        assert torch.equal(got, want)
    else:
        torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-14)


def close(got: torch.Tensor, want: torch.Tensor, terms: int) -> None:
    limit = 4 * torch.finfo(got.dtype).eps * terms**0.5 * float(want.abs().max())
    torch.testing.assert_close(got, want.to(got.dtype), rtol=0, atol=limit)


def matrix(args: dict, shift: bool) -> torch.Tensor:
    """M `[B,D,L,L]` with out = M u before D and the gate, entry by entry from products of decays."""
    dt = F.softplus(args["delta"] + args["delta_bias"][:, None, :, None])
    _, batch, D, L = dt.shape
    M = dt.new_zeros(batch, D, L, L)
    for i in range(2):
        for t in range(L):  # where the result is read off
            for s in range(L):  # where the input went in
                if (s > t) if i == 0 else (s < t):
                    continue
                between = dt[i, :, :, s + 1 : t + 1] if i == 0 else dt[i, :, :, t:s]
                decay = torch.exp(between.sum(-1)[..., None] * args["A"][i])
                weight = dt[i, :, :, s, None] * args["B"][i, :, None, :, s] * args["C"][i, :, None, :, t]
                to = t + ((1 if i == 0 else -1) if shift else 0)
                if 0 <= to < L:
                    M[:, :, to, s] += (decay * weight).sum(-1)
    return M


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shift", [True, False])
def test_matrix_form(backend: str, shift: bool) -> None:
    args = inputs(2, 3, 11, 2)
    want = (matrix(args, shift) @ args["u"][..., None])[..., 0] + args["D"][:, None] * args["u"]
    cast = {k: v.to(kind(backend)) if torch.is_tensor(v) else v for k, v in args.items()}
    close(bidirectional_scan(**cast, shift=shift, backend=backend), want * F.silu(args["z"]), 2 * 11 * 2)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shift", [True, False])
def test_only_D_ties_an_output_to_its_own_input(backend: str, shift: bool) -> None:
    """The quasi-separable form: with the shift the scans give nothing to the diagonal, and something to the rest."""
    L = 6
    args = inputs(1, 3, L, 2, dtype=kind(backend))
    del args["D"], args["z"]
    u = args.pop("u").requires_grad_()
    out = bidirectional_scan(u, **args, shift=shift, backend=backend)
    for t in range(L):
        (du,) = torch.autograd.grad(out[..., t].sum(), u, retain_graph=True)
        assert bool((du[..., t] == 0).all()) is shift
        assert (du[..., [i for i in range(L) if i != t]] != 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_sum_is_two_selective_scans(backend: str) -> None:
    args = inputs(2, 7, SEGMENT + 5, 4, dtype=kind(backend))
    parts = [
        selective_scan(
            args["u"], *(args[k][i] for k in ("delta", "A", "B", "C")), delta_bias=args["delta_bias"][i],
            delta_softplus=True, direction=direction, backend=backend,
        )
        for i, direction in enumerate(("forward", "backward"))
    ]  # fmt: skip
    want = (parts[0] + parts[1] + args["D"][:, None] * args["u"]) * F.silu(args["z"])
    close(bidirectional_scan(**args, shift=False, backend=backend), want, 4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shift", [True, False])
def test_flip_swaps_the_directions(backend: str, shift: bool) -> None:
    args = inputs(1, 5, SEGMENT + 3, 3, dtype=kind(backend))
    flipped = dict(args)
    for k in ("u", "z", "delta", "B", "C"):
        flipped[k] = flipped[k].flip(-1)
    for k in ("delta", "A", "B", "C", "delta_bias"):
        flipped[k] = flipped[k].flip(0)
    got = bidirectional_scan(**flipped, shift=shift, backend=backend).flip(-1)
    close(
        got, bidirectional_scan(**args, shift=shift, backend=backend), 4
    )  # the two results are added in another order


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shift", [True, False])
def test_packed_equals_sequences_alone(backend: str, shift: bool) -> None:
    cu = (0, 0, 3, 4, 4, SEGMENT + 6, SEGMENT + 20, SEGMENT + 20)
    args = inputs(1, 9, cu[-1], 4, dtype=kind(backend), rows=True)
    borders = torch.tensor(cu, dtype=torch.int32)
    packed = bidirectional_scan(**args, shift=shift, cu_seqlens=borders, backend=backend)
    for a, b in itertools.pairwise(cu):
        alone = {k: v[..., a:b] if k in ("u", "delta", "z", "B", "C") else v for k, v in args.items()}
        same(packed[..., a:b], bidirectional_scan(**alone, shift=shift, backend=backend))


@pytest.mark.parametrize("L", [1, 2, SEGMENT, 2 * SEGMENT + 1])
@pytest.mark.parametrize("shift", [True, False])
@native
def test_native_edges(L: int, shift: bool) -> None:
    for D, N in ((2, 17), (21, 16), (65, 1)):
        args = inputs(1, D, L, N, dtype=torch.float32, rows=D == 21)
        args = {k: v.requires_grad_() if torch.is_tensor(v) else v for k, v in args.items()} | {"shift": shift}
        expected = run(bidirectional_scan, widened(args), "reference", torch.float32)
        assert not compare(run(bidirectional_scan, args, "native", torch.float32), expected, max(L, D) * L * N)


@native
def test_bits_do_not_depend_on_the_number_of_threads() -> None:
    args = inputs(2, 200, 90, 8, dtype=torch.float32)
    args = {k: v.requires_grad_() if torch.is_tensor(v) else v for k, v in args.items()}
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append(run(bidirectional_scan, args, "native", torch.float32))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0][k], results[1][k]) for k in results[0])


def test_gradcheck() -> None:
    args = inputs(1, 2, 5, 2)
    args = {k: v.requires_grad_() if torch.is_tensor(v) else v for k, v in args.items()}
    names = [k for k, v in args.items() if torch.is_tensor(v)]
    for shift in (True, False):

        def call(*tensors, shift=shift):
            given = args | dict(zip(names, tensors, strict=True))
            return bidirectional_scan(**given, shift=shift, cu_seqlens=torch.tensor([0, 2, 5], dtype=torch.int32))

        assert torch.autograd.gradcheck(call, tuple(args[n] for n in names))


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_tokens(backend: str) -> None:
    args = inputs(2, 5, 0, 4, dtype=kind(backend))
    args["D"].requires_grad_()
    out = bidirectional_scan(**args, backend=backend)
    assert out.shape == (2, 5, 0)
    (dD,) = torch.autograd.grad(out.sum(), args["D"])
    assert torch.equal(dD, torch.zeros_like(dD))


@native
def test_compiles_without_a_break() -> None:
    args = inputs(1, 6, 20, 3, dtype=torch.float32, rows=True)
    compiled = torch.compile(lambda u: bidirectional_scan(**(args | {"u": u})), backend="aot_eager", fullgraph=True)
    grads = []
    for fn in (compiled, lambda u: bidirectional_scan(**(args | {"u": u}))):
        u = args["u"].clone().requires_grad_()
        grads.append(torch.autograd.grad(fn(u).square().sum(), u)[0])
    assert torch.equal(*grads)


def test_errors() -> None:
    args = inputs(1, 4, 10, 3, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"delta has shape \(1, 4, 10\).*\(2, 1, 4, 10\)"):
        bidirectional_scan(**(args | {"delta": args["delta"][0]}))
    with pytest.raises(ValueError, match=r"A is torch.float32 of shape \(4, 3\)"):
        bidirectional_scan(**(args | {"A": args["A"][0]}))
    with pytest.raises(ValueError, match="delta_bias has shape"):
        bidirectional_scan(**(args | {"delta_bias": args["delta_bias"][0]}))
