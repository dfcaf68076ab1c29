"""The scans in C++ (csrc/selective_scan), for this op and bidirectional_scan; the contracts are in op.py."""

from __future__ import annotations

import torch

from .._native import address, load, view
from .op import dense_like, saved_states

# What the C++ takes has a leading direction axis D2 of size 1 or 2 and groups: delta [D2,B,D,L], A [D2,D,N],
# B, C [D2,B,G,N,L], delta_bias [D2,D].


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
    last = torch.empty(sequences, *A.shape, dtype=torch.float32)
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
    C_ = load()
    out, saved = dense_like(u), saved_states(u, A, cu_seqlens)
    problem, _keep = _problem(u, delta, A, B, C, D, z, delta_bias, softplus, reverse, shift, cu_seqlens, saved)
    threads = torch.get_num_threads()
    scratch = torch.empty(threads * C_.scan_forward_scratch(problem), dtype=torch.float32)
    C_.scan_forward(problem, view(out), address(last), scratch.data_ptr(), threads)
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
    C_ = load()
    directions, batch, groups, states, length = B.shape
    channels = u.shape[1]
    blocks = C_.scan_blocks(channels, groups) if channels else 0
    problem, _keep = _problem(u, delta, A, B, C, D, z, delta_bias, softplus, reverse, shift, cu_seqlens, saved)
    du, ddelta, dz = dense_like(u), dense_like(delta), None if z is None else dense_like(z)
    dA = torch.empty(batch, *A.shape, dtype=torch.float32)
    dD = torch.empty(batch, channels, dtype=torch.float32)
    dbias = torch.empty(batch, directions, channels, dtype=torch.float32)
    rows = (directions, batch, groups, length, states)
    dB, dC = (torch.empty(rows, dtype=torch.float32) for _ in range(2))
    dB_parts, dC_parts = (torch.empty(blocks, *rows, dtype=torch.float32) for _ in range(2))
    dlast = None if grad_last is None else grad_last.float().contiguous()
    threads = torch.get_num_threads()
    scratch = torch.empty(threads * C_.scan_backward_scratch(problem), dtype=torch.float32)
    C_.scan_backward(
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


def _problem(  # type: ignore[no-untyped-def]
    u, delta, A, B, C, D, z, delta_bias, softplus, reverse, shift, cu_seqlens, saved
):
    """The C++ ScanProblem, and the tensors that must outlive it."""
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
