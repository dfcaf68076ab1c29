"""The selective scan against an independent formula, and the properties that its users rely on."""

from __future__ import annotations

import itertools

import pytest
import torch

from ultra_kernels import _native, selective_scan, use_backend
from ultra_kernels._testing import compare, run, widened
from ultra_kernels.selective_scan import native as scan_native
from ultra_kernels.selective_scan.cases import scan_inputs
from ultra_kernels.selective_scan.op import SEGMENT, Scan, saved_states

BACKENDS = [
    "reference",
    pytest.param("native", marks=pytest.mark.skipif(_native.missing() is not None, reason=str(_native.missing()))),
]
native = pytest.mark.skipif(_native.missing() is not None, reason=str(_native.missing()))


def inputs(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0, **options) -> dict:
    made = scan_inputs(torch.Generator().manual_seed(seed), *shape, **options)
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
    """To rounding: eps · sqrt(terms) of the largest value, with the factor of _testing.tolerance."""
    limit = 4 * torch.finfo(got.dtype).eps * terms**0.5 * float(want.abs().max())
    torch.testing.assert_close(got, want.to(got.dtype), rtol=0, atol=limit)


def literal(u, delta, A, B, C, D, z, delta_bias, delta_softplus):
    """mamba-ssm's selective_scan_ref, one number at a time."""
    np = pytest.importorskip("numpy")
    batch, channels, length = u.shape
    groups = B.shape[1] if B.ndim == 4 else 1
    B, C = (M.reshape(batch, groups, A.shape[1], length) for M in (B, C))
    out, last = np.zeros_like(u), np.zeros((batch, *A.shape))
    for b in range(batch):
        for d in range(channels):
            group = d * groups // channels
            for t in range(length):
                dt = delta[b, d, t] + delta_bias[d]
                dt = np.log1p(np.exp(dt)) if delta_softplus else dt
                y = 0.0
                for n in range(A.shape[1]):
                    decay = np.exp(dt * A[d, n])
                    last[b, d, n] = decay * last[b, d, n] + dt * B[b, group, n, t] * u[b, d, t]
                    y += C[b, group, n, t] * last[b, d, n]
                y += D[d] * u[b, d, t]
                out[b, d, t] = y * z[b, d, t] / (1 + np.exp(-z[b, d, t]))
    return out, last


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("groups", [0, 2])
def test_mamba_formula(backend: str, groups: int) -> None:
    args = inputs(2, 6, 9, 3, groups=groups)
    want = literal(**{k: v.numpy() if torch.is_tensor(v) else v for k, v in args.items()})
    cast = {k: v.to(kind(backend)) if torch.is_tensor(v) else v for k, v in args.items()}
    for got, expected in zip(selective_scan(**cast, return_last_state=True, backend=backend), want, strict=True):
        close(got, torch.from_numpy(expected), 9 * 3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_zero_step_keeps_the_state(backend: str) -> None:
    """dt = 0: decay exactly 1 and no input, however often; the state after the pause is the one before it."""
    args = inputs(1, 5, 200, 16, dtype=kind(backend), bare=True)
    args["delta"][..., 20:] = 0
    _, last = selective_scan(**args, return_last_state=True, backend=backend)
    short = {k: v if k == "A" else v[..., :20] for k, v in args.items()}
    _, before = selective_scan(**short, return_last_state=True, backend=backend)
    assert torch.equal(last, before)


@pytest.mark.parametrize("backend", BACKENDS)
def test_backward_direction_is_the_flipped_forward(backend: str) -> None:
    args = inputs(2, 7, SEGMENT + 9, 5, dtype=kind(backend))
    flipped = {k: v.flip(-1) if k in ("u", "delta", "z", "B", "C") else v for k, v in args.items()}
    want, want_last = selective_scan(**flipped, return_last_state=True, backend=backend)
    got, last = selective_scan(**args, return_last_state=True, direction="backward", backend=backend)
    same(got, want.flip(-1))
    same(last, want_last)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_packed_equals_sequences_alone(backend: str, direction: str) -> None:
    cu = (0, 3, 3, 4, SEGMENT + 6, SEGMENT + 20)
    args = inputs(1, 9, cu[-1], 4, dtype=kind(backend), rows=True)
    packed, last = selective_scan(
        **args,
        return_last_state=True,
        direction=direction,
        cu_seqlens=torch.tensor(cu, dtype=torch.int32),
        backend=backend,
    )
    for i, (a, b) in enumerate(itertools.pairwise(cu)):
        alone = {k: v[..., a:b] if k in ("u", "delta", "z", "B", "C") else v for k, v in args.items()}
        out, state = selective_scan(**alone, return_last_state=True, direction=direction, backend=backend)
        same(packed[..., a:b], out)
        same(last[i], state[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_leaks_across_a_border(backend: str) -> None:
    """NaN in one sequence stays in it, values and gradients."""
    args = inputs(1, 3, 12, 2, dtype=kind(backend))
    args["u"][..., :5] = float("nan")
    args["u"].requires_grad_()
    out = selective_scan(**args, cu_seqlens=torch.tensor([0, 5, 12], dtype=torch.int32), backend=backend)
    assert out[..., 5:].isfinite().all()
    (du,) = torch.autograd.grad(out[..., 5:].sum(), args["u"])
    assert du[..., 5:].isfinite().all()


@pytest.mark.parametrize("N", [1, 16, 17])
@pytest.mark.parametrize("L", [1, SEGMENT, SEGMENT + 1])
@native
def test_native_edges(N: int, L: int) -> None:
    for D in (2, 16, 21, 65):  # not 1: a lone gradient may cancel, and nothing else would give its scale
        args = inputs(1, D, L, N, dtype=torch.float32, rows=D == 21)
        args = {k: v.requires_grad_() if torch.is_tensor(v) else v for k, v in args.items()} | {
            "return_last_state": True
        }
        expected = run(selective_scan, widened(args), "reference", torch.float32)
        assert not compare(run(selective_scan, args, "native", torch.float32), expected, max(L, D) * L * N)


@native
def test_extra_memory_is_of_the_order_of_the_inputs() -> None:
    """At N = 16: saved states, parts of dB and dC, and scratch, against u, delta and z; nothing is [B,D,L,N]."""
    C, states = _native.load(), 16
    for D, L in ((256, 1024), (256, 8192), (1536, 512)):
        u, A = torch.empty(1, D, L), torch.empty(1, D, states)
        B = torch.empty(1, 1, 1, states, L)
        saved = saved_states(u, A, None)
        scan = Scan(u, u[None], A, B, B, None, u, None, True, False, False, None)
        problem, _keep = scan_native._problem(scan, saved)
        parts = 2 * C.scan_blocks(D, 1) * L * states
        per_thread = max(C.scan_forward_scratch(problem), C.scan_backward_scratch(problem))
        assert per_thread < 150_000  # tiles of a segment, whatever the length
        both = Scan(u, u.expand(2, *u.shape), A.expand(2, -1, -1), *(B.expand(2, -1, -1, -1, -1),) * 2, None, u,
                    None, True, False, True, None)  # fmt: skip
        saved = saved_states(u, both.A, None)
        problem, _keep = scan_native._problem(both, saved)
        per_thread = max(C.scan_forward_scratch(problem), C.scan_backward_scratch(problem))
        assert per_thread < 200_000 + 2 * 64 * L  # and what the first direction found for 64 channels
        assert saved.numel() + parts <= u.numel()


@native
def test_offsets_beyond_31_bits() -> None:
    try:
        memory = torch.empty(2**31 + 64, dtype=torch.bfloat16)  # only the pages that are written take memory
    except RuntimeError as error:
        pytest.skip(f"4.3 GB of address space: {error}")
    args = inputs(2, 3, 5, 2, dtype=torch.float32)
    near = args["u"].bfloat16()
    far = memory.as_strided((2, 3, 5), (2**31 + 16, 5, 1)).copy_(near)
    got, want = (selective_scan(**(args | {"u": x}), backend="native") for x in (far, near))
    assert torch.equal(got, want)


@native
def test_more_batch_rows_than_a_16_bit_grid() -> None:
    args = inputs(70_000, 1, 1, 1, dtype=torch.float32)
    got, want = (selective_scan(**args, backend=b) for b in ("native", "reference"))
    torch.testing.assert_close(got, want)


@native
def test_reads_the_encoders_layouts_in_place() -> None:
    """u and z are halves of one projection's rows, dt rows of another: no copy of any, and an output of rows."""
    args = inputs(1, 48, 70, 16, dtype=torch.float32)
    xz = torch.randn(1, 70, 96)
    args |= {"u": xz[..., :48].transpose(1, 2), "z": xz[..., 48:].transpose(1, 2)}
    args["delta"] = args["delta"].transpose(1, 2).contiguous().transpose(1, 2)
    proj = torch.randn(1, 70, 40)
    args |= {"B": proj[..., 8:24].transpose(1, 2), "C": proj[..., 24:].transpose(1, 2)}
    out = selective_scan(**args, backend="native")
    assert out.transpose(1, 2).is_contiguous()
    plain = {k: v.contiguous() if torch.is_tensor(v) else v for k, v in args.items()}
    assert torch.equal(out, selective_scan(**plain, backend="native"))


@native
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_bits_do_not_depend_on_the_number_of_threads(threads: int) -> None:
    args = inputs(2, 200, 90, 8, dtype=torch.float32)
    args = {k: v.requires_grad_() if torch.is_tensor(v) else v for k, v in args.items()}
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        want = run(selective_scan, args, "native", torch.float32)
        torch.set_num_threads(threads)
        got = run(selective_scan, args, "native", torch.float32)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(got[k], want[k]) for k in want)


def test_gradcheck() -> None:
    args = inputs(1, 3, 5, 2)
    args = {k: v.requires_grad_() if torch.is_tensor(v) else v for k, v in args.items()}
    names = [k for k, v in args.items() if torch.is_tensor(v)]
    for direction in ("forward", "backward"):

        def call(*tensors, direction=direction):
            given = args | dict(zip(names, tensors, strict=True))
            cu = torch.tensor([0, 2, 5], dtype=torch.int32)
            return selective_scan(**given, return_last_state=True, direction=direction, cu_seqlens=cu)

        assert torch.autograd.gradcheck(call, tuple(args[n] for n in names))


@native
def test_last_state_alone_has_a_gradient() -> None:
    grads = []
    for backend in ("reference", "native"):
        args = inputs(1, 5, 70, 3, dtype=kind(backend))
        args["u"].requires_grad_()
        _, last = selective_scan(**args, return_last_state=True, backend=backend)
        grads.append(torch.autograd.grad(last.sum(), args["u"])[0])
    close(grads[1], grads[0], 70 * 3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_tokens(backend: str) -> None:
    args = inputs(2, 5, 0, 4, dtype=kind(backend))
    args = {k: v.requires_grad_() if torch.is_tensor(v) else v for k, v in args.items()}
    out, last = selective_scan(**args, return_last_state=True, backend=backend)
    assert out.shape == (2, 5, 0) and last.shape == (2, 5, 4) and not last.any()
    (dD,) = torch.autograd.grad(out.sum(), args["D"])
    assert torch.equal(dD, torch.zeros_like(dD))


@native
def test_half_inputs_beside_float32_parameters() -> None:
    args = inputs(1, 20, 30, 16, dtype=torch.float32)
    mixed = args | {k: args[k].bfloat16() for k in ("u", "z")}
    got = selective_scan(**mixed, backend="native")
    assert got.dtype == torch.bfloat16
    want = selective_scan(**widened(mixed), backend="reference")
    # one rounding to bfloat16 of each value
    assert ((got.double() - want).abs() <= torch.finfo(torch.bfloat16).eps * want.abs() + 1e-5).all()


@native
def test_second_backward_is_refused() -> None:
    args = inputs(1, 3, 5, 2, dtype=torch.float32)
    u = args["u"].requires_grad_()
    (du,) = torch.autograd.grad(selective_scan(**args, backend="native").sum(), u, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        du.sum().backward()


@native
def test_compiles_without_a_break() -> None:
    args = inputs(1, 6, 20, 3, dtype=torch.float32)
    compiled = torch.compile(lambda u: selective_scan(**(args | {"u": u})), backend="aot_eager", fullgraph=True)
    grads = []
    for fn in (compiled, lambda u: selective_scan(**(args | {"u": u}))):
        u = args["u"].clone().requires_grad_()
        grads.append(torch.autograd.grad(fn(u).square().sum(), u)[0])
    assert torch.equal(*grads)


@native
def test_segment_length_is_the_kernels() -> None:
    assert _native.load().scan_segment == SEGMENT


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"u": torch.zeros(4, 10)}, r"u has shape \(4, 10\).*\[B,D,L\]"),
        ({"delta": torch.zeros(2, 4, 9)}, r"delta has shape \(2, 4, 9\).*\(2, 4, 10\)"),
        ({"A": torch.zeros(4, 3, dtype=torch.complex64)}, "must be real"),
        ({"B": torch.zeros(2, 3, 3, 10)}, "3 groups, which do not divide the 4 channels"),
        ({"C": torch.zeros(2, 2, 10)}, r"C has shape \(2, 2, 10\).*\(2, 3, 10\)"),
        ({"direction": "both"}, "'forward' or 'backward'"),
        ({"cu_seqlens": torch.tensor([0, 10])}, "int32"),
        ({"cu_seqlens": torch.tensor([0, 10], dtype=torch.int32)}, "batch size must be 1"),
    ],
)
def test_errors(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        selective_scan(**(inputs(2, 4, 10, 3, dtype=torch.float32) | change))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cu", [[0, 9], [1, 10], [0, 8, 4, 10], [0, 11, 10], [-3, 10]])
def test_bad_borders_are_refused(backend: str, cu: list[int]) -> None:
    args = inputs(1, 4, 10, 3, dtype=kind(backend))
    with use_backend(backend), pytest.raises(ValueError, match="must rise from 0 to the length 10"):
        selective_scan(**args, cu_seqlens=torch.tensor(cu, dtype=torch.int32))
