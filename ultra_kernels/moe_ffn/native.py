"""The experts of a mixture on the CPU in C++ (csrc/moe_ffn); the contract is in op.py."""

from __future__ import annotations

from typing import Any

import torch

from .._native import DTYPES, address, contiguous_rows, load
from .reference import ACTIVATIONS, Experts, Routes


def forward(x: torch.Tensor, routes: Routes, experts: Experts, hidden: torch.Tensor) -> torch.Tensor:
    """y `[T, D]`; fills `hidden`."""
    x = contiguous_rows(x)
    y = torch.empty(x.shape, dtype=x.dtype)
    C_, threads = load(), torch.get_num_threads()
    problem, _kept = _problem(x, routes, experts, hidden)
    scratch = torch.empty(C_.moe_forward_scratch(problem, threads), dtype=torch.float32)
    C_.moe_forward(problem, y.data_ptr(), scratch.data_ptr(), threads)
    return y


def backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    routes: Routes,
    experts: Experts,
    hidden: torch.Tensor,
    grads: list[torch.Tensor | None],
) -> None:
    """Fills the gradients of x, gates, w_in, w_out, b_in, b_out and sub_norm; None: not wanted, but for the gates'."""
    dy, x = contiguous_rows(dy), contiguous_rows(x)
    C_, threads = load(), torch.get_num_threads()
    problem, _kept = _problem(x, routes, experts, hidden)
    scratch = torch.empty(C_.moe_backward_scratch(problem, threads), dtype=torch.float32)
    C_.moe_backward(problem, dy.data_ptr(), dy.stride(0), *map(address, grads), scratch.data_ptr(), threads)


def _problem(
    x: torch.Tensor, routes: Routes, experts: Experts, hidden: torch.Tensor
) -> tuple[Any, list[torch.Tensor | None]]:
    """MoEProblem of csrc/moe_ffn, and tensors that must live as long."""
    *tensors, activation, gated = experts
    (E, D, F), (T, k) = experts.w_out.shape, routes.gates.shape
    kept = [t if t is None else t.contiguous() for t in (*routes, *tensors)]
    addresses = [address(t) for t in kept]
    problem = load().MoEProblem(
        (T, E, k, D, F), gated, list(ACTIVATIONS).index(activation), DTYPES[x.dtype], x.data_ptr(), x.stride(0),
        addresses[:4], *addresses[4:], hidden.data_ptr(),
    )  # fmt: skip
    return problem, kept
