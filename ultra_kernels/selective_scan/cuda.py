"""The scans in CUDA C++ (csrc/selective_scan), for this op and bidirectional_scan; the contracts are in op.py."""

from __future__ import annotations

import torch

from .._cuda import Struct, count, launch, view
from .op import SEGMENT, Scan, dense_like, saved_states

# Blocks that keep a GPU busy: multiprocessors × blocks that their shared memory holds, forward (42 KB) and backward
# (72 KB), by compute capability. Fewer channels than that, and time is cut into runs.
BUSY = {(8, 0): (108 * 3, 108 * 2), (9, 0): (132 * 5, 132 * 3)}
BUSY_ELSEWHERE = (128 * 2, 128 * 1)


def forward(scan: Scan, wants_last: bool) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """(out, last states, saved states); see Scan."""
    u, out, saved = scan.u, dense_like(scan.u), saved_states(scan.u, scan.A, scan.cu_seqlens)
    last = None  # of empty sequences it stays 0
    if wants_last:
        last = torch.zeros(scan.sequences, *scan.A.shape[1:], dtype=torch.float32, device=u.device)
    saved[:, :, -(-u.shape[2] // SEGMENT) :].zero_()  # segments here do not end where sequences do: fewer slots serve
    if u.numel():
        run, runs = _runs(scan, False)
        launch("selective_scan_forward", _problem(scan, saved, out, last, run, runs))
    return out, last, saved


def backward(
    scan: Scan, grad: torch.Tensor, grad_last: torch.Tensor | None, saved: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """Gradients of u, delta, A, B, C, D, z, delta_bias; see Scan."""
    u, delta, A, B, C, D, z, delta_bias, *_ = scan
    directions, batch, groups, states, length = B.shape
    channels = u.shape[1]
    run, runs = _runs(scan, True) if u.numel() else (1, 0)
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
        launch("selective_scan_backward", _problem(scan, saved, grad, last, run, runs), gradients)
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


def _runs(scan: Scan, backward: bool) -> tuple[int, int]:
    """Segments per run and runs. Two directions: a segment each, so that one block reads it both ways."""
    u, (directions, batch, groups, _, length) = scan.u, scan.B.shape
    segments = -(-length // SEGMENT)
    if directions == 2:
        return 1, segments
    blocks = batch * groups * count("selective_scan_parts", u.shape[1] // groups) // (1 if backward else 2)
    capability = torch.cuda.get_device_capability(u.device) if u.is_cuda else None
    busy = BUSY.get(capability, BUSY_ELSEWHERE)[backward]  # type: ignore[arg-type]
    run = max(1, min(segments, segments * max(blocks, 1) // busy))
    return run, -(-segments // run)


def _problem(
    scan: Scan, saved: torch.Tensor, out: torch.Tensor, last: torch.Tensor | None, run: int, runs: int
) -> Struct:
    """The C++ Scan."""
    u, delta, A, B, C, D, z, delta_bias, softplus, reverse, shift, cu_seqlens = scan
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
