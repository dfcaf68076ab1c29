"""The selective scan of Mamba (S6)."""

from __future__ import annotations

from typing import NamedTuple

import torch

from .. import _cuda, _native
from .._dispatch import Op, define_differentiable, of_all, triton_why_not
from . import reference

SEGMENT = 64  # steps between two states saved for the backward pass; kScanSegment of csrc/selective_scan
MAX_STATES = 64  # of the Triton kernels: a program keeps all states of 32 channels in registers


def triton_limits(
    u: torch.Tensor, delta: torch.Tensor | None = None, z: torch.Tensor | None = None, states: int = 1
) -> str | None:
    """The reasons of triton_why_not, and numbers of states that the kernels are not made for."""
    if (reason := of_all(triton_why_not)(u, delta, z)) is not None:
        return reason
    return f"N is {states}, above {MAX_STATES}; use fewer states" if states > MAX_STATES else None


ORDER: dict[str, tuple[str, ...]] = {"cuda": ("cuda", "triton", "reference"), "cpu": ("native", "reference")}
WHY_NOT = {"cuda": of_all(_cuda.why_not), "triton": triton_limits, "native": of_all(_native.why_not)}
OP = Op("selective_scan", __package__, ORDER, WHY_NOT)


def selective_scan(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    delta_bias: torch.Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    *,
    direction: str = "forward",
    cu_seqlens: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """h_t = exp(Δ_t A) h_{t−1} + Δ_t B_t u_t from h = 0, y_t = C_t · h_t, out = (y + D u) · silu(z).

    u, delta, z `[B,D,L]`; A `[D,N]` real; B, C `[B,N,L]`, or `[B,G,N,L]` where channel d reads group
    d // (D/G); D, delta_bias `[D]`. Δ = delta + delta_bias, with delta_softplus its softplus. direction
    "backward" reads the time axis from its end: the forward scan of the flipped inputs, flipped back.
    cu_seqlens int32 `[num_seqs + 1]` (B = 1): h starts from 0 in every sequence. Computed in float32.

    Returns out (u's shape and dtype) or, with return_last_state, (out, last_state): float32 h after the last
    step read, `[B,D,N]`, with cu_seqlens `[num_seqs,D,N]`. Drop-in for mamba-ssm's selective_scan_fn with
    B, C varying in time. Raises ValueError, BackendUnavailable. After Gu & Dao 2023 (arXiv:2312.00752).
    """
    check_scan("selective_scan", u, delta, A, B, C, D, z, delta_bias, cu_seqlens)
    if direction not in ("forward", "backward"):
        raise ValueError(f"selective_scan: direction is {direction!r}; it must be 'forward' or 'backward'")
    chosen = OP.choose(backend, u, delta, z, A.shape[-1])
    args = (u, delta, A, B, C, D, z, delta_bias, delta_softplus, direction, cu_seqlens)
    out, last = reference.selective_scan(*args) if chosen == "reference" else _forward(*args, chosen)[:2]
    return (out, last) if return_last_state else out


def check_scan(
    op: str,
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    z: torch.Tensor | None,
    delta_bias: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    directions: tuple[int, ...] = (),
) -> None:
    """Raises ValueError unless shapes and devices fit; `directions`: leading shape of doubled arguments."""
    if u.dim() != 3:
        raise ValueError(f"{op}: u has shape {tuple(u.shape)}; it must be [B,D,L]")
    batch, channels, length = u.shape
    if A.dim() != 2 + len(directions) or A.is_complex():
        wanted_A = (*directions, channels, "N")
        raise ValueError(f"{op}: A is {A.dtype} of shape {tuple(A.shape)}; it must be real {wanted_A}")
    states = A.shape[-1]
    grouped = (B.shape[1],) if not directions and B.dim() == 4 else ()
    if grouped and (grouped[0] == 0 or channels % grouped[0]):
        raise ValueError(f"{op}: B has {grouped[0]} groups, which do not divide the {channels} channels of u")
    wanted: list[tuple[str, torch.Tensor | None, tuple[int, ...]]] = [
        ("delta", delta, (*directions, batch, channels, length)),
        ("A", A, (*directions, channels, states)),
        ("B", B, (*directions, batch, *grouped, states, length)),
        ("C", C, (*directions, batch, *grouped, states, length)),
        ("D", D, (channels,)),
        ("z", z, (batch, channels, length)),
        ("delta_bias", delta_bias, (*directions, channels)),
    ]
    for name, tensor, shape in wanted:
        if tensor is None:
            continue
        if tensor.shape != shape:
            raise ValueError(
                f"{op}: {name} has shape {tuple(tensor.shape)}; "
                f"with u {tuple(u.shape)} and N {states} it must be {tuple(shape)}"
            )
        if tensor.device != u.device:
            raise ValueError(f"{op}: {name} is on {tensor.device}, u on {u.device}; move it there")
    check_cu_seqlens(op, "u", u, cu_seqlens)


def check_cu_seqlens(op: str, name: str, x: torch.Tensor, cu_seqlens: torch.Tensor | None) -> None:
    """Raises ValueError unless cu_seqlens is absent or int32 `[num_seqs + 1]` beside an x of batch size 1."""
    if cu_seqlens is None:
        return
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.dim() != 1 or not cu_seqlens.shape[0]:
        got = f"{cu_seqlens.dtype} of shape {tuple(cu_seqlens.shape)}"
        raise ValueError(f"{op}: cu_seqlens is {got}; it must be int32 [num_seqs + 1]")
    if x.shape[0] != 1:
        raise ValueError(f"{op}: with cu_seqlens the batch size must be 1; {name} has shape {tuple(x.shape)}")
    if cu_seqlens.device != x.device:
        raise ValueError(f"{op}: cu_seqlens is on {cu_seqlens.device}, {name} on {x.device}; move it there")


def dense_like(t: torch.Tensor) -> torch.Tensor:
    """An empty tensor of t's shape [...,D,L] with the last two axes in t's order in memory, without gaps."""
    *lead, D, L = t.shape
    return t.new_empty(*lead, L, D).transpose(-1, -2) if t.stride(-2) == 1 else t.new_empty(*lead, D, L)


def saved_states(u: torch.Tensor, A: torch.Tensor, cu_seqlens: torch.Tensor | None) -> torch.Tensor:
    """Room for one state per segment `[directions, B, slots, N, D]`; every sequence starts a new segment."""
    *directions, D, N = A.shape
    L = u.shape[2]
    slots = -(-L // SEGMENT) if cu_seqlens is None else L // SEGMENT + cu_seqlens.shape[0] - 1
    return u.new_empty(*(directions or (1,)), u.shape[0], slots, N, D, dtype=torch.float32)


def fake_gradients(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    z: torch.Tensor | None,
    delta_bias: torch.Tensor | None,
) -> tuple[torch.Tensor, ...]:
    """The backward's outputs without data: dB, dC lie as [...,L,N], an absent input's gradient is empty."""
    dB, dC = (M.new_empty(*M.shape[:-2], M.shape[-1], M.shape[-2]).transpose(-1, -2) for M in (B, C))
    dD, dbias = (u.new_empty(0) if t is None else t.new_empty(t.shape) for t in (D, delta_bias))
    dz = u.new_empty(0) if z is None else dense_like(z)
    return dense_like(u), dense_like(delta), A.new_empty(A.shape), dB, dC, dD, dz, dbias


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    *tensors, ctx.delta_softplus, ctx.direction, cu_seqlens, ctx.backend = inputs
    ctx.save_for_backward(*tensors, cu_seqlens, output[2])
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)  # no zeros for the saved states, nor for a last state that nobody used


def _gradients(ctx, grad, grad_last, grad_saved):  # type: ignore[no-untyped-def]
    *tensors, cu_seqlens, saved = ctx.saved_tensors
    grad = torch.zeros_like(tensors[0]) if grad is None else grad
    grads = _backward(grad, grad_last, *tensors, ctx.delta_softplus, ctx.direction, cu_seqlens, saved, ctx.backend)
    return *(None if t is None else g for t, g in zip(tensors, grads, strict=True)), None, None, None, None


class Scan(NamedTuple):
    """What this op and bidirectional_scan ask of a backend, in one form; they share the backends' files.

    u, z `[B,D,L]`; delta `[D2,B,D,L]`, A `[D2,D,N]`, B, C `[D2,B,G,N,L]`, D `[D]`, delta_bias `[D2,D]`: the direction
    axis D2 has size 1, read backwards if `reverse`, or 2, first forwards and then backwards, summed. With `shift` the
    result of a step is the output of the next one read. A backend's forward(scan, wants_last) returns the output, the
    last states `[sequences,D,N]` if wanted, and the saved states; its backward(scan, grad, grad_last, saved) the
    gradients of u to delta_bias in their dtypes and in this form, empty where the input is None.
    """

    u: torch.Tensor
    delta: torch.Tensor
    A: torch.Tensor
    B: torch.Tensor
    C: torch.Tensor
    D: torch.Tensor | None
    z: torch.Tensor | None
    delta_bias: torch.Tensor | None
    softplus: bool
    reverse: bool
    shift: bool
    cu_seqlens: torch.Tensor | None

    @property
    def sequences(self) -> int:
        return self.u.shape[0] if self.cu_seqlens is None else len(self.cu_seqlens) - 1

    @property
    def flags(self) -> dict[str, int]:
        return {name: int(getattr(self, name)) for name in ("reverse", "shift", "softplus")}


def grouped(B: torch.Tensor) -> torch.Tensor:
    """B or C `[B,N,L]` or `[B,G,N,L]` with the group axis."""
    return B.unsqueeze(1) if B.dim() == 3 else B


def _scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, direction, cu_seqlens) -> Scan:  # type: ignore[no-untyped-def]
    bias = None if delta_bias is None else delta_bias[None]
    rows = (grouped(B)[None], grouped(C)[None])
    return Scan(u, delta[None], A[None], *rows, D, z, bias, delta_softplus, direction == "backward", False, cu_seqlens)


def _run_backward(grad, grad_last, *args):  # type: ignore[no-untyped-def]
    *inputs, saved, backend = args
    du, ddelta, dA, dB, dC, dD, dz, dbias = OP.module(backend).backward(_scan(*inputs), grad, grad_last, saved)
    B, C, delta_bias = inputs[3], inputs[4], inputs[7]
    dbias = dbias if delta_bias is None else dbias[0]
    return du, ddelta[0], dA[0], dB[0].view(B.shape), dC[0].view(C.shape), dD, dz, dbias


TENSORS = (
    "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? delta_bias, "
    "bool delta_softplus"
)
GRADIENTS = "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"  # of TENSORS, in their order

_forward, _backward = define_differentiable(
    f"selective_scan({TENSORS}, str direction, Tensor? cu_seqlens, str backend) -> (Tensor, Tensor, Tensor)",
    f"selective_scan_backward(Tensor grad, Tensor? grad_last, {TENSORS}, str direction, Tensor? cu_seqlens, "
    f"Tensor saved, str backend) -> {GRADIENTS}",
    forward=lambda *args: OP.module(args[-1]).forward(_scan(*args[:-1]), True),
    forward_fake=lambda u, delta, A, B, C, D, z, delta_bias, delta_softplus, direction, cu_seqlens, backend: (
        dense_like(u),
        u.new_empty(u.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1, *A.shape, dtype=torch.float32),
        saved_states(u, A, cu_seqlens),
    ),
    backward=_run_backward,
    backward_fake=lambda grad, grad_last, *args: fake_gradients(*args[:8]),
    setup_context=_setup_context,
    gradients=_gradients,
)
