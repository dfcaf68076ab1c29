"""The scans in C++ (csrc/selective_scan), for this op and bidirectional_scan; the contracts are in op.py."""

from __future__ import annotations

import torch

from .._native import address, load, view
from .op import Scan, dense_like, saved_states


def forward(scan: Scan, wants_last: bool) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """(out, last states, saved states); see Scan."""
    library, out, saved = load(), dense_like(scan.u), saved_states(scan.u, scan.A, scan.cu_seqlens)
    last = torch.empty(scan.sequences, *scan.A.shape[1:], dtype=torch.float32) if wants_last else None
    problem, _keep = _problem(scan, saved)
    threads = torch.get_num_threads()
    scratch = torch.empty(threads * library.scan_forward_scratch(problem), dtype=torch.float32)
    library.scan_forward(problem, view(out), address(last), scratch.data_ptr(), threads)
    return out, last, saved


def backward(
    scan: Scan, grad: torch.Tensor, grad_last: torch.Tensor | None, saved: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """Gradients of u, delta, A, B, C, D, z, delta_bias; see Scan."""
    library, (u, delta, A, B, C, D, z, delta_bias, *_) = load(), scan
    directions, batch, groups, states, length = B.shape
    channels = u.shape[1]
    blocks = library.scan_blocks(channels, groups) if channels else 0
    problem, _keep = _problem(scan, saved)
    du, ddelta, dz = dense_like(u), dense_like(delta), None if z is None else dense_like(z)
    dA = torch.empty(batch, *A.shape, dtype=torch.float32)
    dD = torch.empty(batch, channels, dtype=torch.float32)
    dbias = torch.empty(batch, directions, channels, dtype=torch.float32)
    rows = (directions, batch, groups, length, states)
    dB, dC = (torch.empty(rows, dtype=torch.float32) for _ in range(2))
    dB_parts, dC_parts = (torch.empty(blocks, *rows, dtype=torch.float32) for _ in range(2))
    dlast = None if grad_last is None else grad_last.float().contiguous()
    threads = torch.get_num_threads()
    scratch = torch.empty(threads * library.scan_backward_scratch(problem), dtype=torch.float32)
    library.scan_backward(
        problem, view(grad), view(du), view(dz), view(ddelta[0]), ddelta.stride(0), address(dlast),
        dA.data_ptr(), dD.data_ptr(), dbias.data_ptr(), dB.data_ptr(), dC.data_ptr(), dB_parts.data_ptr(),
        dC_parts.data_ptr(), scratch.data_ptr(), threads,
    )  # fmt: skip
    return (
        du,
        ddelta,
        _sum(dA).to(A.dtype),
        dB.to(B.dtype).transpose(-1, -2),
        dC.to(C.dtype).transpose(-1, -2),
        u.new_empty(0) if D is None else _sum(dD).to(D.dtype),
        u.new_empty(0) if dz is None else dz,
        u.new_empty(0) if delta_bias is None else _sum(dbias).to(delta_bias.dtype),
    )


def _sum(parts: torch.Tensor) -> torch.Tensor:
    """Over the first axis, in order: the same bits for every number of threads."""
    total = torch.zeros_like(parts[0]) if not len(parts) else parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def _problem(scan: Scan, saved: torch.Tensor):  # type: ignore[no-untyped-def]
    """The C++ ScanProblem, and the tensors that must outlive it."""
    u, delta, A, B, C, D, z, delta_bias, softplus, reverse, shift, cu_seqlens = scan
    directions, _, groups, states, length = B.shape
    batch, channels, _ = u.shape
    A = A.float().contiguous()
    B, C = (_rows(M) for M in (B, C))
    D, delta_bias = (None if t is None else t.float().contiguous() for t in (D, delta_bias))
    cu_seqlens = None if cu_seqlens is None else cu_seqlens.contiguous()
    num_seqs = 0 if cu_seqlens is None else len(cu_seqlens) - 1
    problem = load().ScanProblem(
        (directions, batch, channels, length, states, groups), view(u), view(z), view(delta[0]),
        delta.stride(0), A.data_ptr(), (B.data_ptr(), *B.stride()[:-1]), (C.data_ptr(), *C.stride()[:-1]),
        address(D), address(delta_bias), address(cu_seqlens), num_seqs, saved.data_ptr(),
        saved.shape[2], reverse, softplus, shift,
    )  # fmt: skip
    return problem, (A, B, C, D, delta_bias, cu_seqlens)


def _rows(M: torch.Tensor) -> torch.Tensor:
    """B or C as float32 [...,L,N] with N contiguous: free where a projection of rows made it."""
    rows = M.float().transpose(-1, -2)
    return rows if rows.stride(-1) == 1 else rows.contiguous()
