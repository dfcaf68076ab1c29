"""BitLinear on the CPU in C++ (csrc/ternary, csrc/bitlinear); the contract is in op.py."""

from __future__ import annotations

import torch

from .._native import DTYPES, contiguous_rows, load
from ..ternary.native import product, quantize_rows, quantize_weight

__all__ = ["backward", "fingerprint", "forward", "quantize_weight"]


def forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    gamma: torch.Tensor,
    N: int,
    bias: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(y `[M, N]`, codes int8 `[M, K]`, step `[M]`, 1 / RMS `[M]` or empty) of x `[M, K]`."""
    K = x.shape[1]
    codes, step, rstd = quantize_rows(x, norm_weight)
    return product(codes, step, weight, gamma, (N, K), bias, dtype), codes, step, rstd


def backward(
    dy: torch.Tensor,
    codes: torch.Tensor,
    step: torch.Tensor,
    rstd: torch.Tensor,
    x: torch.Tensor | None,
    weight: torch.Tensor,
    gamma: torch.Tensor,
    shape: tuple[int, int],
    norm_weight: torch.Tensor | None,
    wants: tuple[bool, bool, bool, bool],
) -> tuple[torch.Tensor, ...]:
    """Gradients of x, weight, bias and norm_weight, float32 but for x's with a norm; empty where not wanted."""
    C_, threads = load(), torch.get_num_threads()
    (N, K), M = shape, dy.shape[0]
    pairs = dy.dtype == torch.bfloat16 and N % 2 == 0 and C_.pairs()
    dy = contiguous_rows(dy if pairs else dy.float())
    if pairs and (dy.stride(0) % 2 or dy.data_ptr() % 4):
        dy = dy.contiguous()
    sizes, place = (M, N, K), (dy.data_ptr(), dy.stride(0), pairs)
    scratch = torch.empty(C_.bitlinear_scratch(threads), dtype=torch.float32)
    wants_x, wants_weight, wants_bias, wants_norm = wants
    dx = dweight = dbias = dnorm = torch.empty(0)
    if wants_weight:
        dweight = torch.empty((N, K), dtype=torch.float32)
        C_.bitlinear_dweight(
            *place, sizes, codes.data_ptr(), step.data_ptr(), dweight.data_ptr(), scratch.data_ptr(), threads
        )
    if wants_x or wants_norm:
        dx = torch.empty((M, K), dtype=torch.float32)
        C_.bitlinear_dx(*place, sizes, weight.data_ptr(), gamma.data_ptr(), dx.data_ptr(), scratch.data_ptr(), threads)
    if norm_weight is not None and (wants_x or wants_norm):
        assert x is not None
        x = contiguous_rows(x)
        grad, dx = dx, torch.empty((M, K), dtype=x.dtype)
        dnorm = torch.empty(K, dtype=torch.float32)
        parts = torch.empty(C_.row_blocks(M) * K, dtype=torch.float32)
        gain = norm_weight.float().contiguous()
        C_.bitlinear_norm_backward(
            grad.data_ptr(), x.data_ptr(), x.stride(0), DTYPES[x.dtype], rstd.data_ptr(), gain.data_ptr(), M, K,
            dx.data_ptr(), dnorm.data_ptr(), parts.data_ptr(), threads,
        )  # fmt: skip
    if wants_bias:
        dbias = dy.sum(0, dtype=torch.float32)
    return dx, dweight, dbias, dnorm


def fingerprint(weight: torch.Tensor) -> int:
    """Tells writes to a weight that autograd does not count, those through `.data`."""
    weight = weight.contiguous()
    number: int = load().bitlinear_fingerprint(weight.data_ptr(), weight.numel(), weight.element_size())
    return number
