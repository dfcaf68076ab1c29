"""BitLinear on the CPU in C++ (csrc/ternary, csrc/bitlinear); the contract is in op.py."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .._native import DTYPES, contiguous_rows, load
from ..ternary.native import product, quantize_rows, quantize_weight
from .op import groups

__all__ = ["backward", "fingerprint", "forward", "quantize_weight"]


def forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    gamma: torch.Tensor,
    N: int,
    bias: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    ends: torch.Tensor | None,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(y `[M, N]`, codes int8 `[M, K]`, step `[M]`, 1 / RMS `[M]` or empty) of x `[M, K]`."""
    K = x.shape[1]
    codes, step, rstd = quantize_rows(x, norm_weight)
    return product(codes, step, weight, gamma, (N, K), bias, ends, dtype), codes, step, rstd


def backward(
    dy: torch.Tensor,
    codes: torch.Tensor,
    step: torch.Tensor,
    rstd: torch.Tensor,
    x: torch.Tensor | None,
    weight: torch.Tensor,
    gamma: torch.Tensor,
    shape: Sequence[int],
    norm_weight: torch.Tensor | None,
    ends: torch.Tensor | None,
    wants: tuple[bool, bool, bool, bool],
) -> tuple[torch.Tensor, ...]:
    """Gradients of x, weight, bias and norm_weight, float32 but for x's with a norm; no values where not wanted."""
    C_, threads = load(), torch.get_num_threads()
    (N, K), M = shape[-2:], dy.shape[0]
    pairs = dy.dtype == torch.bfloat16 and N % 2 == 0 and C_.pairs()
    dy = contiguous_rows(dy if pairs else dy.float())
    if pairs and (dy.stride(0) % 2 or dy.data_ptr() % 4):
        dy = dy.contiguous()
    scratch = torch.empty(C_.bitlinear_scratch(threads), dtype=torch.float32)
    wants_x, wants_weight, wants_bias, wants_norm = wants
    unwanted, dnorm = (*shape[:-2], 0), torch.empty(0)
    dx = torch.empty((M, K) if wants_x or wants_norm else 0, dtype=torch.float32)
    dweight = torch.empty(tuple(shape) if wants_weight else unwanted, dtype=torch.float32)
    dbias = torch.empty(tuple(shape[:-1]) if wants_bias else unwanted, dtype=torch.float32)
    by_row, by_group = (dy, codes, step, dx), (weight, gamma, dweight, dbias)
    parts: list[tuple[torch.Tensor, ...]] = [(*by_row, *by_group)]
    if ends is not None:
        parts = [(*(t[own] for t in by_row), *(t[e] for t in by_group)) for e, own in groups(ends)]
    for rows, part_codes, part_step, part_dx, matrix, scale, part_dweight, part_dbias in parts:
        sizes, place = (rows.shape[0], N, K), (rows.data_ptr(), rows.stride(0), pairs)
        if wants_weight:
            C_.bitlinear_dweight(
                *place, sizes, part_codes.data_ptr(), part_step.data_ptr(), part_dweight.data_ptr(),
                scratch.data_ptr(), threads,
            )  # fmt: skip
        if wants_x or wants_norm:
            C_.bitlinear_dx(
                *place, sizes, matrix.data_ptr(), scale.data_ptr(), part_dx.data_ptr(), scratch.data_ptr(), threads
            )
        if wants_bias:
            torch.sum(rows, 0, dtype=torch.float32, out=part_dbias)
    if norm_weight is not None and (wants_x or wants_norm):
        assert x is not None
        x = contiguous_rows(x)
        grad, dx = dx, torch.empty((M, K), dtype=x.dtype)
        dnorm = torch.empty(K, dtype=torch.float32)
        sums = torch.empty(C_.row_blocks(M) * K, dtype=torch.float32)
        gain = norm_weight.float().contiguous()
        C_.bitlinear_norm_backward(
            grad.data_ptr(), x.data_ptr(), x.stride(0), DTYPES[x.dtype], rstd.data_ptr(), gain.data_ptr(), M, K,
            dx.data_ptr(), dnorm.data_ptr(), sums.data_ptr(), threads,
        )  # fmt: skip
    return dx, dweight, dbias, dnorm


def fingerprint(weight: torch.Tensor) -> int:
    """Tells writes to a weight that autograd does not count, those through `.data`."""
    weight = weight.contiguous()
    number: int = load().bitlinear_fingerprint(weight.data_ptr(), weight.numel(), weight.element_size())
    return number
