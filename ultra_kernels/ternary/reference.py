"""Ternary inference in PyTorch; the contracts are in op.py."""

from __future__ import annotations

import torch

from ..bitlinear.op import segments
from ..bitlinear.reference import quantize_tokens, quantize_weight


def quantize_ternary(weight: torch.Tensor, scale: str) -> tuple[torch.Tensor, torch.Tensor]:
    codes, gamma = quantize_weight(weight, scale)
    return codes.to(torch.int8), gamma.float()


def pack(codes: torch.Tensor) -> torch.Tensor:
    N, K = codes.shape
    panels, blocks = -(-N // 16), -(-K // 16)
    padded = torch.zeros(16 * panels, 16 * blocks, dtype=torch.uint8, device=codes.device)
    padded[:N, :K] = codes + 1
    a, b, c, d = padded.view(panels, 16, blocks, 4, 4).permute(0, 2, 1, 4, 3).unbind(-1)  # each [P, J, row, k mod 4]
    return (a | b << 2 | c << 4 | d << 6).flatten(2)


def unpack(packed: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    N, K = shape
    panels, blocks, _ = packed.shape
    fields = torch.stack([packed >> shift & 3 for shift in (0, 2, 4, 6)], dim=-1)
    rows = fields.view(panels, blocks, 16, 4, 4).permute(0, 2, 1, 4, 3).reshape(16 * panels, 16 * blocks)
    return rows[:N, :K].to(torch.int8) - 1


def ternary_matmul(x: torch.Tensor, packed: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    # A floating-point product of integers is exact while every partial sum fits the significand. torch._int_mm is not
    # used: it saturates on CPUs without VNNI and refuses most shapes on CUDA.
    exact = torch.float32 if x.device.type == "cpu" and 128 * shape[1] <= 2**24 else torch.float64
    return (x.to(exact) @ unpack(packed, shape).to(exact).t()).to(torch.int32)


def ternary_linear(
    x: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor,
    shape: tuple[int, int],
    bias: torch.Tensor | None,
    ends: torch.Tensor | None = None,
) -> torch.Tensor:
    if ends is not None:
        y = x.new_empty(x.shape[0], shape[0])
        for e, own in segments(ends):
            y[own] = ternary_linear(x[own], packed[e], scale[e], shape, None if bias is None else bias[e])
        return y
    codes, step = quantize_tokens(x)
    product = ternary_matmul(codes.reshape(-1, shape[1]).to(torch.int8), packed, shape)
    y = product.to(step.dtype).view(*x.shape[:-1], product.shape[1]) * (step * scale)
    if bias is not None:
        y = y + bias
    return y.to(x.dtype)
