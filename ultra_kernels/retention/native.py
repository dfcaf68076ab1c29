"""Retention in C++ (csrc/retention); the contract is in op.py."""

from __future__ import annotations

import torch

from .._native import address, contiguous_rows, head_rows, load, sequences


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor,
    scale: float,
    head_scale: torch.Tensor | None,
    direction: str,
    cu_seqlens: torch.Tensor | None,
    initial_state: torch.Tensor | None,
    output_final_state: bool,
    chunk: int | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(o, the final state, or an empty tensor where nobody asked for it)."""
    C_ = load()
    o = torch.empty(v.shape, dtype=q.dtype)
    problem, _keep = _problem(q, k, v, log_decay, scale, head_scale, direction, cu_seqlens, initial_state, chunk)
    shape = (sequences(q, cu_seqlens), *q.shape[2:], v.shape[-1])
    last = torch.empty(shape if output_final_state else 0, dtype=torch.float32)
    threads = torch.get_num_threads()
    scratch = torch.empty(threads * C_.retention_forward_scratch(problem), dtype=torch.float32)
    C_.retention_forward(problem, head_rows(o), address(last), scratch.data_ptr(), threads)
    return o, last


def backward(
    grad: torch.Tensor,
    grad_final: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor,
    scale: float,
    head_scale: torch.Tensor | None,
    direction: str,
    cu_seqlens: torch.Tensor | None,
    initial_state: torch.Tensor | None,
    chunk: int | None,
) -> tuple[torch.Tensor, ...]:
    """Gradients of q, k, v, and in float32 of head_scale and initial_state, empty where there is no such input."""
    C_ = load()
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype) for x in (q, k, v))
    problem, _keep = _problem(q, k, v, log_decay, scale, head_scale, direction, cu_seqlens, initial_state, chunk)
    grad = contiguous_rows(grad)
    grad_final = None if grad_final is None else grad_final.float().contiguous()
    dinitial = torch.empty(0 if initial_state is None else initial_state.shape, dtype=torch.float32)
    dscale = torch.empty(sequences(q, cu_seqlens), q.shape[2], dtype=torch.float32)
    threads = torch.get_num_threads()
    scratch = torch.empty(threads * C_.retention_backward_scratch(problem), dtype=torch.float32)
    C_.retention_backward(
        problem, head_rows(grad), head_rows(dq), head_rows(dk), head_rows(dv), address(grad_final), address(dinitial),
        dscale.data_ptr(), scratch.data_ptr(), threads,
    )  # fmt: skip
    return dq, dk, dv, dscale.new_empty(0) if head_scale is None else scale * dscale.sum(0), dinitial


def step_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor,
    state: torch.Tensor,
    scale: float,
    head_scale: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    o, state = torch.empty(v.shape, dtype=q.dtype), state.float().contiguous()
    new_state = torch.empty_like(state)
    q, k, v = (x[:, None] for x in (q, k, v))  # a sequence of one token
    problem, _keep = _problem(q, k, v, log_decay, scale, head_scale, "forward", None, None, None)
    load().retention_step(
        problem, state.data_ptr(), new_state.data_ptr(), head_rows(o[:, None]), torch.get_num_threads()
    )
    return o, new_state


def _problem(  # type: ignore[no-untyped-def]
    q, k, v, log_decay, scale, head_scale, direction, cu_seqlens, initial_state, chunk
):
    """The C++ RetentionProblem, and the tensors that must outlive it."""
    B, T, H, K = q.shape
    q, k, v = (contiguous_rows(x) for x in (q, k, v))
    decay = log_decay.float().contiguous()
    factor = torch.full((H,), scale, dtype=torch.float32)
    factor = factor if head_scale is None else factor * head_scale.float()
    # borders are int32 in the C++; the checks let int64 pass
    borders = None if cu_seqlens is None else cu_seqlens.to(torch.int32).contiguous()
    initial_state = None if initial_state is None else initial_state.float().contiguous()
    problem = load().RetentionProblem(
        (B, T, H, K, v.shape[-1], chunk or 0), head_rows(q), head_rows(k), head_rows(v), decay.data_ptr(),
        factor.data_ptr(), address(borders), 0 if borders is None else len(borders) - 1, direction != "backward",
        direction != "forward", address(initial_state),
    )  # fmt: skip
    return problem, (q, k, v, decay, factor, borders, initial_state)
