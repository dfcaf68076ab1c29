"""The scans in CUDA C++ (csrc/selective_scan), for this op and bidirectional_scan; the contracts are in op.py."""

from __future__ import annotations

import torch

from .._cuda import Struct, count, launch, view
from .op import SEGMENT, dense_like, saved_states

# What the CUDA C++ takes has a leading direction axis D2 of size 1 or 2 and groups: delta [D2,B,D,L], A [D2,D,N],
# B, C [D2,B,G,N,L], delta_bias [D2,D].

# Blocks that keep a GPU busy: multiprocessors × blocks that their shared memory holds, forward (42 KB) and backward
# (72 KB), by compute capability. Fewer channels than that, and time is cut into runs.
BUSY = {(8, 0): (108 * 3, 108 * 2), (9, 0): (132 * 5, 132 * 3)}
BUSY_ELSEWHERE = (128 * 2, 128 * 1)


def forward(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    z: torch.Tensor | None,
    delta_bias: torch.Tensor | None,
    delta_softplus: bool,
    direction: str,
    cu_seqlens: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(out, last_state, the states that backward() starts from)."""
    sequences = u.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
    last = torch.zeros(sequences, *A.shape, dtype=torch.float32, device=u.device)  # of empty sequences it stays
    out, saved = scan_forward(
        u, delta[None], A[None], grouped(B)[None], grouped(C)[None], D, z,
        None if delta_bias is None else delta_bias[None], delta_softplus, direction == "backward", False,
        cu_seqlens, last,
    )  # fmt: skip
    return out, last, saved


def backward(
    grad: torch.Tensor,
    grad_last: torch.Tensor | None,
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    z: torch.Tensor | None,
    delta_bias: torch.Tensor | None,
    delta_softplus: bool,
    direction: str,
    cu_seqlens: torch.Tensor | None,
    saved: torch.Tensor,
) -> tuple[torch.Tensor, ...]:
    """Gradients of u, delta, A, B, C, D, z, delta_bias; empty where the input is None."""
    du, ddelta, dA, dB, dC, dD, dz, dbias = scan_backward(
        grad, grad_last, u, delta[None], A[None], grouped(B)[None], grouped(C)[None], D, z,
        None if delta_bias is None else delta_bias[None], delta_softplus, direction == "backward", False,
        cu_seqlens, saved,
    )  # fmt: skip
    dbias = dbias if delta_bias is None else dbias[0]
    return du, ddelta[0], dA[0], dB[0].view(B.shape), dC[0].view(C.shape), dD, dz, dbias


def grouped(B: torch.Tensor) -> torch.Tensor:
    """[...,N,L] with the group axis of [B,G,N,L]."""
    return B.unsqueeze(-3) if B.dim() == 3 else B


def scan_forward(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    z: torch.Tensor | None,
    delta_bias: torch.Tensor | None,
    softplus: bool,
    reverse: bool,
    shift: bool,
    cu_seqlens: torch.Tensor | None,
    last: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, saved states); `last` is written."""
    out, saved = dense_like(u), saved_states(u, A, cu_seqlens)
    saved[:, :, -(-u.shape[2] // SEGMENT) :].zero_()  # segments here do not end where sequences do: fewer slots serve
    if u.numel():
        run, runs = _runs(u, A, B, False)
        problem = _problem(
            u, delta, A, B, C, D, z, delta_bias, softplus, reverse, shift, cu_seqlens, saved, out, last, run, runs
        )
        launch("selective_scan_forward", problem)
    return out, saved


def scan_backward(
    grad: torch.Tensor,
    grad_last: torch.Tensor | None,
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    z: torch.Tensor | None,
    delta_bias: torch.Tensor | None,
    softplus: bool,
    reverse: bool,
    shift: bool,
    cu_seqlens: torch.Tensor | None,
    saved: torch.Tensor,
) -> tuple[torch.Tensor, ...]:
    """Gradients of u, delta, A, B, C, D, z, delta_bias in their dtypes; empty where the input is None."""
    directions, batch, groups, states, length = B.shape
    channels = u.shape[1]
    run, runs = _runs(u, A, B, True) if u.numel() else (1, 0)
    blocks = count("selective_scan_parts", channels // groups)

    def new(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.float32, device=u.device)

    du, ddelta, dz = dense_like(u), dense_like(delta), None if z is None else dense_like(z)
    dA, dD = new(batch * runs, directions, states, channels), new(batch * runs, channels)
    dbias, adjoint = new(batch * runs, directions, channels), new(directions, batch, runs, states, channels)
    dB, dC = (new(blocks, directions, batch, groups, length, states) for _ in range(2))
    if u.numel():
        last = None if grad_last is None else grad_last.float().contiguous()
        gradients = Struct(view(du), view(dz), view(ddelta[0]), ddelta.stride(0), adjoint, dA, dD, dbias, dB, dC)
        problem = _problem(
            u, delta, A, B, C, D, z, delta_bias, softplus, reverse, shift, cu_seqlens, saved, grad, last, run, runs
        )
        launch("selective_scan_backward", problem, gradients)
    # Sums of the parts in a fixed order: torch's reductions on a GPU use no atomics.
    return (
        du,
        ddelta,
        dA.sum(0).transpose(-1, -2).to(A.dtype, memory_format=torch.contiguous_format),
        dB.sum(0).to(B.dtype).transpose(-1, -2),
        dC.sum(0).to(C.dtype).transpose(-1, -2),
        u.new_empty(0) if D is None else dD.sum(0).to(D.dtype),
        u.new_empty(0) if dz is None else dz,
        u.new_empty(0) if delta_bias is None else dbias.sum(0).to(delta_bias.dtype),
    )


def _runs(u: torch.Tensor, A: torch.Tensor, B: torch.Tensor, backward: bool) -> tuple[int, int]:
    """Segments per run and runs. Two directions: a segment each, so that one block reads it both ways."""
    directions, batch, groups, _, length = B.shape
    segments = -(-length // SEGMENT)
    if directions == 2:
        return 1, segments
    blocks = batch * groups * count("selective_scan_parts", u.shape[1] // groups) // (1 if backward else 2)
    capability = torch.cuda.get_device_capability(u.device) if u.is_cuda else None
    busy = BUSY.get(capability, BUSY_ELSEWHERE)[backward]  # type: ignore[arg-type]
    run = max(1, min(segments, segments * max(blocks, 1) // busy))
    return run, -(-segments // run)


def _problem(  # type: ignore[no-untyped-def]
    u, delta, A, B, C, D, z, delta_bias, softplus, reverse, shift, cu_seqlens, saved, out, last, run, runs
) -> Struct:
    """The C++ Scan."""
    directions, batch, groups, states, length = B.shape
    B, C = (_rows(M) for M in (B, C))
    D, delta_bias = (None if t is None else t.float().contiguous() for t in (D, delta_bias))
    steps = torch.empty(directions, batch, runs, u.shape[1], dtype=torch.float32, device=u.device)
    return Struct(
        directions, batch, u.shape[1], length, states, groups, view(u), view(z), view(out), view(delta[0]),
        delta.stride(0), A.float().contiguous(), D, delta_bias, (B, *B.stride()[:-1]), (C, *C.stride()[:-1]),
        None if cu_seqlens is None else cu_seqlens.contiguous(), 0 if cu_seqlens is None else len(cu_seqlens) - 1,
        saved, saved.shape[2], last, reverse, softplus, shift, run, runs, steps,
    )  # fmt: skip


def _rows(M: torch.Tensor) -> torch.Tensor:
    """B or C as float32 [...,L,N] with N contiguous: free where a projection of rows made it."""
    rows = M.float().transpose(-1, -2)
    return rows if rows.stride(-1) == 1 else rows.contiguous()
