"""Ternary products on the CPU in C++ (csrc/ternary); the contracts are in op.py."""

from __future__ import annotations

import math

import torch

from .._native import DTYPES, address, contiguous_rows, load
from .op import codes_shape


def ternary_matmul(x: torch.Tensor, codes: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    C_, threads = load(), torch.get_num_threads()
    (N, K), M = shape, x.shape[0]
    x = x if x.stride(1) == 1 and x.stride(0) >= K else x.contiguous()
    y = torch.empty((M, N), dtype=torch.int32)
    scratch = _scratch(M, K)
    C_.ternary_matmul(x.data_ptr(), x.stride(0), (M, N, K), codes.data_ptr(), y.data_ptr(), address(scratch), threads)
    return y


def ternary_linear(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    shape: tuple[int, int],
    bias: torch.Tensor | None,
    ends: torch.Tensor | None = None,
) -> torch.Tensor:
    C_, (N, K) = load(), shape
    M = math.prod(x.shape[:-1])
    rows = contiguous_rows(x.reshape(M, K))
    y = torch.empty((*x.shape[:-1], N), dtype=x.dtype)
    scratch = torch.empty(C_.ternary_linear_scratch(M, K), dtype=torch.uint8)
    bias = None if bias is None else bias.float().contiguous()
    C_.ternary_linear(
        rows.data_ptr(), rows.stride(0), DTYPES[x.dtype], (M, N, K), address(ends), scale.numel(), codes.data_ptr(),
        scale.data_ptr(), address(bias), y.data_ptr(), scratch.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return y


def quantize_rows(x: torch.Tensor, norm_weight: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(codes int8 `[M, K]`, step `[M]`, 1 / RMS `[M]`) of x `[M, K]`; no RMS without norm_weight."""
    M, K = x.shape
    x = contiguous_rows(x)
    codes = torch.empty((M, K), dtype=torch.int8)
    step = torch.empty(M, dtype=torch.float32)
    rstd = torch.empty(0 if norm_weight is None else M, dtype=torch.float32)
    weight = None if norm_weight is None else norm_weight.float().contiguous()
    load().ternary_quantize_rows(
        x.data_ptr(), x.stride(0), DTYPES[x.dtype], M, K, address(weight), codes.data_ptr(), step.data_ptr(),
        rstd.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return codes, step, rstd


def product(
    codes: torch.Tensor,
    step: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    shape: tuple[int, int],
    bias: torch.Tensor | None,
    ends: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """(codes · weightᵀ) · step · scale + bias, `[M, N]` in `dtype`; codes and step of `quantize_rows`.

    With ends weight, scale and bias are those of all groups.
    """
    C_, threads = load(), torch.get_num_threads()
    (N, K), M = shape, codes.shape[0]
    y = torch.empty((M, N), dtype=dtype)
    scratch = _scratch(M, K)
    bias = None if bias is None else bias.float().contiguous()
    C_.ternary_product(
        codes.data_ptr(), step.data_ptr(), (M, N, K), address(ends), scale.numel(), weight.data_ptr(), scale.data_ptr(),
        address(bias), y.data_ptr(), DTYPES[dtype], address(scratch), threads,
    )  # fmt: skip
    return y


def quantize_weight(weight: torch.Tensor, scale: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(packed codes, γ float32 `[]`) of weight `[N, K]`, or those of each matrix of `[E, N, K]`."""
    *several, N, K = weight.shape
    weight = weight.contiguous()
    median = scale == "median"
    gamma = torch.empty(several, dtype=torch.float32)
    if median:
        torch.stack([w.abs().flatten().median() for w in weight.view(-1, N, K)], out=gamma.view(-1))
    packed = torch.empty((*several, *codes_shape(N, K)), dtype=torch.uint8)
    load().ternary_quantize_weight(
        weight.data_ptr(), DTYPES[weight.dtype], gamma.numel(), N, K, median, gamma.data_ptr(), packed.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return packed, gamma


def _scratch(M: int, K: int) -> torch.Tensor | None:
    size = load().ternary_scratch(M, K)
    return torch.empty(size, dtype=torch.uint8) if size else None
