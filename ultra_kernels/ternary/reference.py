"""Ternary inference in PyTorch; the contracts are in op.py."""

from __future__ import annotations

import torch

from ..bitlinear.reference import quantize_tokens, quantize_weight


def quantize_ternary(weight: torch.Tensor, scale: str) -> tuple[torch.Tensor, torch.Tensor]:
    codes, gamma = quantize_weight(weight, scale)
    return codes.to(torch.int8), gamma.float()


def pack(codes: torch.Tensor) -> torch.Tensor:
    N, K = codes.shape
    quads = torch.zeros(N, -(-K // 4), 4, dtype=torch.uint8, device=codes.device)
    quads.flatten(1)[:, :K] = codes + 1
    a, b, c, d = quads.unbind(-1)
    return a | b << 2 | c << 4 | d << 6


def unpack(packed: torch.Tensor, K: int) -> torch.Tensor:
    quads = torch.stack([packed >> shift & 3 for shift in (0, 2, 4, 6)], dim=-1)  # [N, ceil(K / 4), 4]
    return quads.flatten(1)[:, :K].to(torch.int8) - 1


def ternary_matmul(x: torch.Tensor, packed: torch.Tensor, K: int) -> torch.Tensor:
    # A floating-point product of integers is exact while every partial sum fits the significand. torch._int_mm is not
    # used: it saturates on CPUs without VNNI and refuses most shapes on CUDA.
    exact = torch.float32 if x.device.type == "cpu" and 128 * K <= 2**24 else torch.float64
    return (x.to(exact) @ unpack(packed, K).to(exact).t()).to(torch.int32)


def ternary_linear(
    x: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor, K: int, bias: torch.Tensor | None
) -> torch.Tensor:
    codes, step = quantize_tokens(x)
    product = ternary_matmul(codes.reshape(-1, K).to(torch.int8), packed, K)
    y = product.to(step.dtype).view(*x.shape[:-1], product.shape[1]) * (step * scale)
    if bias is not None:
        y = y + bias
    return y.to(x.dtype)
