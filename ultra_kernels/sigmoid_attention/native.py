"""Sigmoid attention in C++ (csrc/sigmoid_attention); the contract is in op.py."""

from __future__ import annotations

import torch

from .._native import address, contiguous_rows, head_rows, load, sequences


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    bias: float | None,
    head_bias: torch.Tensor | None,
    normalize: bool,
    causal: bool,
    cu_seqlens: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(o, the sums of each row's weights, or an empty tensor without normalize)."""
    C_ = load()
    B, T, H, _ = q.shape
    o = torch.empty(v.shape, dtype=q.dtype)
    sums = torch.empty((B, H, T) if normalize else (0,), dtype=torch.float32)
    problem, _keep = _problem(q, k, v, scale, bias, head_bias, normalize, causal, cu_seqlens, sums)
    threads = torch.get_num_threads()
    scratch = torch.empty(threads * C_.sigmoid_forward_scratch(problem), dtype=torch.float32)
    C_.sigmoid_forward(problem, head_rows(o), scratch.data_ptr(), threads)
    return o, sums


def backward(
    grad: torch.Tensor,
    o: torch.Tensor | None,
    sums: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    bias: float | None,
    head_bias: torch.Tensor | None,
    normalize: bool,
    causal: bool,
    cu_seqlens: torch.Tensor | None,
) -> tuple[torch.Tensor, ...]:
    """Gradients of q, k, v, and in float32 of head_bias, empty where there is none."""
    C_ = load()
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype) for x in (q, k, v))
    problem, _keep = _problem(q, k, v, scale, bias, head_bias, normalize, causal, cu_seqlens, sums)
    grad = contiguous_rows(grad.to(q.dtype))
    dbias = torch.empty(sequences(q, cu_seqlens), q.shape[2], dtype=torch.float32)
    threads = torch.get_num_threads()
    scratch = torch.empty(threads * C_.sigmoid_backward_scratch(problem), dtype=torch.float32)
    C_.sigmoid_backward(
        problem, head_rows(o), head_rows(grad), head_rows(dq), head_rows(dk), head_rows(dv), dbias.data_ptr(),
        scratch.data_ptr(), threads,
    )  # fmt: skip
    return dq, dk, dv, dbias.new_empty(0) if head_bias is None else dbias.sum(0)


def _problem(q, k, v, scale, bias, head_bias, normalize, causal, cu_seqlens, sums):  # type: ignore[no-untyped-def]
    """The C++ SigmoidProblem, and the tensors that must outlive it."""
    B, T, H, K = q.shape
    q, k, v = (contiguous_rows(x) for x in (q, k, v))
    head_bias = None if head_bias is None else head_bias.float().contiguous()
    borders = None if cu_seqlens is None else cu_seqlens.to(torch.int32).contiguous()  # the checks let int64 pass
    problem = load().SigmoidProblem(
        (B, T, H, K, v.shape[-1]), head_rows(q), head_rows(k), head_rows(v), scale, 0.0 if bias is None else bias,
        bias is None and head_bias is None, address(head_bias), normalize, causal, address(sums), address(borders),
        sequences(q, cu_seqlens),
    )  # fmt: skip
    return problem, (q, k, v, head_bias, borders, sums)
