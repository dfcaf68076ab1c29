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
    """Fills the gradients of x, gates, w_in, w_out, b_in, b_out and sub_norm; those that are not wanted are None, the
    gates' never is."""
    dy, x = contiguous_rows(dy), contiguous_rows(x)
    C_, threads = load(), torch.get_num_threads()
    problem, _kept = _problem(x, routes, experts, hidden)
    scratch = torch.empty(C_.moe_backward_scratch(problem, threads), dtype=torch.float32)
    C_.moe_backward(problem, dy.data_ptr(), dy.stride(0), *map(address, grads), scratch.data_ptr(), threads)


def route(
    logits: torch.Tensor, select_bias: torch.Tensor | None, top_k: int, normalize: bool
) -> tuple[torch.Tensor, ...]:
    """gates, chosen int32 `[T, k]`, order, inverse, ends, counts, mean_prob, z; logits float32."""
    (T, E), C_, logits = logits.shape, load(), logits.contiguous()
    select_bias = None if select_bias is None else select_bias.float().contiguous()
    gates, chosen = torch.empty(T, top_k), torch.empty(T, top_k, dtype=torch.int32)
    found = gates, chosen, *(torch.empty(n, dtype=torch.int64) for n in (T * top_k, T * top_k, E, E))
    found = *found, torch.empty(E), torch.empty(())
    routing = C_.MoERouting((T, E, top_k), normalize, *map(address, (logits, select_bias, gates, chosen)))
    scratch = torch.empty(C_.moe_route_scratch(T, E))
    C_.moe_route(routing, *map(address, found[2:]), scratch.data_ptr(), torch.get_num_threads())
    return found


def route_backward(
    dgates: torch.Tensor, dmean_prob: torch.Tensor, dz: torch.Tensor, logits: torch.Tensor, chosen: torch.Tensor,
    normalize: bool,
) -> torch.Tensor:  # fmt: skip
    """dlogits `[T, E]`."""
    (T, E), C_ = logits.shape, load()
    dgates, dmean_prob, logits, chosen = (t.contiguous() for t in (dgates, dmean_prob, logits, chosen))
    dlogits, scratch = torch.empty(T, E), torch.empty(C_.moe_route_scratch(T, E))
    routing = C_.MoERouting((T, E, chosen.shape[1]), normalize, address(logits), 0, 0, address(chosen))
    C_.moe_route_backward(
        routing, address(dgates), address(dmean_prob), float(dz), address(dlogits), address(scratch),
        torch.get_num_threads(),
    )  # fmt: skip
    return dlogits


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
