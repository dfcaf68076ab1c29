"""Ternary weights for inference: quantise, pack at 2 bits, multiply exactly in integers."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch

from .. import _cuda, _native
from .._dispatch import FLOATS, Op, define_constant, full_precision, triton_why_not
from . import reference

MAX_M = 8  # rows of x that the CUDA kernels take; with more, tensor cores are faster

_DTYPES = (*FLOATS, torch.int8)


def _cuda_limits(x: torch.Tensor, *tensors: torch.Tensor | None) -> str | None:
    """The reasons of _cuda.why_not, and more rows or matrices than its kernels take."""
    if (reason := _cuda.why_not(x, dtypes=_DTYPES)) is not None:
        return reason
    if tensors and tensors[0] is not None and tensors[0].ndim == 4:
        return "the CUDA kernels take one matrix, not those of several groups"
    if (rows := math.prod(x.shape[:-1])) > MAX_M:
        return f"the CUDA kernels take up to {MAX_M} rows, x has {rows}"
    return _elsewhere(x, *tensors)


def _triton_limits(x: torch.Tensor, *tensors: torch.Tensor | None) -> str | None:
    """The reasons of triton_why_not, where x may be int8 too."""
    return triton_why_not(x, dtypes=_DTYPES) or _elsewhere(x, *tensors)


def _native_limits(x: torch.Tensor, *tensors: torch.Tensor | None) -> str | None:
    """The reasons of _native.why_not, where x may be int8 too."""
    return _native.why_not(x, dtypes=_DTYPES) or _elsewhere(x, *tensors)


def _elsewhere(x: torch.Tensor, *tensors: torch.Tensor | None) -> str | None:
    """A tensor on another device, or a bias of another dtype, than kernels read."""
    for t in tensors:
        if t is not None and t.device != x.device:
            return f"x is on {x.device}, another tensor on {t.device}; move it there"
        if t is not None and t.is_floating_point() and t.dtype not in FLOATS:
            return f"the kernels take a bias of float32, bfloat16 or float16, not {t.dtype}"
    return None


_PRODUCTS = {"cuda": ("cuda", "triton", "reference"), "cpu": ("native", "reference")}
_LIMITS = {"cuda": _cuda_limits, "triton": _triton_limits, "native": _native_limits}
QUANTIZE = Op(
    "quantize_ternary",
    __package__,
    {"cuda": ("triton", "reference"), "cpu": ("reference",)},
    {"triton": _triton_limits},
)
MATMUL = Op("ternary_matmul", __package__, _PRODUCTS, _LIMITS)
LINEAR = Op("ternary_linear", __package__, _PRODUCTS, _LIMITS)


@dataclass(frozen=True)
class PackedTernary:
    """A ternary matrix `[N, K]` at 2 bits a weight.

    codes: uint8 `[ceil(N / 16), ceil(K / 16), 64]`, panels of 16 rows cut into blocks of 16 columns. Bits 2s and
        2s+1 of byte 4r + i of block j of panel p hold weight (16p + r, 16j + 4s + i), plus one (0, 1 or 2); 0 past the
        matrix. So a 64-byte load, shifted by 2s and masked, is four columns of 16 rows as int8 dot products take them.
    scale: float32 `[]`; the matrix is scale · weights. shape: (N, K).
    """

    codes: torch.Tensor
    scale: torch.Tensor
    shape: tuple[int, int]

    def to(self, device: torch.device | str) -> PackedTernary:
        return replace(self, codes=self.codes.to(device), scale=self.scale.to(device))


def codes_shape(N: int, K: int) -> tuple[int, int, int]:
    """Of PackedTernary.codes."""
    return -(-N // 16), -(-K // 16), 64


def quantize_ternary(
    weight: torch.Tensor, *, scale: Literal["mean", "median"] = "mean", backend: str | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes, γ): codes = clip(round(weight / (γ + 1e-5)), −1, 1), γ = mean (or lower median) of |weight|.

    weight `[N, K]`; codes int8 `[N, K]` in {−1, 0, 1}, γ float32 `[]`. Rounds half to even, as `bitlinear` does; no
    gradient.
    Raises ValueError for another rank, an empty weight or an unknown scale. After Ma et al. 2024 (arXiv:2402.17764).
    """
    if weight.ndim != 2 or not weight.numel():
        raise ValueError(f"quantize_ternary: weight has shape {tuple(weight.shape)}; it must be (N, K), not empty")
    if scale not in ("mean", "median"):
        raise ValueError(f"quantize_ternary: scale {scale!r} is unknown; it must be 'mean' or 'median'")
    chosen = QUANTIZE.choose(backend, weight)
    if chosen == "reference":
        return reference.quantize_ternary(weight.detach(), scale)
    codes, gamma = _quantize(weight, scale, chosen)
    return codes, gamma


def pack_ternary(codes: torch.Tensor, scale: torch.Tensor) -> PackedTernary:
    """byte = Σ_s (code_s + 1) · 4^s, s from 0 to 3: four weights a byte, in the panels that `PackedTernary` describes.

    codes int8 `[N, K]` in {−1, 0, 1}, scale one element; returns PackedTernary(codes uint8 `[ceil(N/16), ceil(K/16),
    64]`, scale float32 `[]`, shape). Raises ValueError for another dtype or shape, or a code outside −1..1. Weights
    after Ma et al. 2024 (arXiv:2402.17764).
    """
    if codes.ndim != 2 or codes.dtype != torch.int8:
        raise ValueError(f"pack_ternary: codes are {codes.dtype} {tuple(codes.shape)}; they must be int8 (N, K)")
    if scale.numel() != 1:
        raise ValueError(f"pack_ternary: scale has shape {tuple(scale.shape)}; it must have one element")
    if codes.numel() and bool((codes.short().abs() > 1).any()):  # abs of an int8 −128 is −128
        raise ValueError(f"pack_ternary: codes reach {int(codes.short().abs().max())}; they must be −1, 0 or 1")
    return PackedTernary(reference.pack(codes), scale.detach().float().reshape(()), (codes.shape[0], codes.shape[1]))


def unpack_ternary(packed: PackedTernary) -> tuple[torch.Tensor, torch.Tensor]:
    """code_s = (byte // 4^s) mod 4 − 1: the (codes int8 `[N, K]`, scale float32 `[]`) that `pack_ternary` was given.

    Raises nothing for what `pack_ternary` returned. Weights after Ma et al. 2024 (arXiv:2402.17764).
    """
    return reference.unpack(packed.codes, packed.shape), packed.scale


def ternary_matmul(x: torch.Tensor, packed: PackedTernary, *, backend: str | None = None) -> torch.Tensor:
    """y = x · codesᵀ in int32, exact on every backend; the scale is left to the caller.

    x int8 `[M, K]`, packed `[N, K]`; returns int32 `[M, N]`. M, N and K may be any size, 0 included, K below 2^23.
    Raises ValueError on another dtype or shape, BackendUnavailable. After Ma et al. 2024 (arXiv:2402.17764).
    """
    K = packed.shape[1]
    if x.dtype != torch.int8 or x.ndim != 2 or x.shape[1] != K:
        raise ValueError(f"ternary_matmul: x is {x.dtype} {tuple(x.shape)}; it must be int8 (M, {K})")
    chosen = MATMUL.choose(backend, x, packed.codes)
    if chosen == "reference":
        with full_precision(x):
            return reference.ternary_matmul(x, packed.codes, packed.shape)
    y: torch.Tensor = _matmul(x, packed.codes, packed.shape, chosen)
    return y


def ternary_linear(
    x: torch.Tensor, packed: PackedTernary, bias: torch.Tensor | None = None, *, backend: str | None = None
) -> torch.Tensor:
    """`bitlinear` for inference: y = (round(x / s) · codesᵀ) · s · scale + bias, s = max(absmax(x), 1e-5) / 127.

    s is per token. x `[..., K]`, packed `[N, K]`, bias `[N]`; returns `[..., N]` in x's dtype. The product is exact in
    int32, the scales are float32. No gradient. Raises ValueError on a shape mismatch, BackendUnavailable.
    After Ma et al. 2024 (arXiv:2402.17764).
    """
    N, K = packed.shape
    if x.shape[-1] != K:
        raise ValueError(f"ternary_linear: x has shape {tuple(x.shape)}; its last axis must be {K}")
    if bias is not None and bias.shape != (N,):
        raise ValueError(f"ternary_linear: bias has shape {tuple(bias.shape)}; it must be ({N},)")
    chosen = LINEAR.choose(backend, x, packed.codes, packed.scale, bias)
    if chosen == "reference":
        with torch.no_grad(), full_precision(x):
            return reference.ternary_linear(x, packed.codes, packed.scale, packed.shape, bias)
    y: torch.Tensor = _linear(x, packed.codes, packed.scale, packed.shape, bias, chosen)
    return y


def grouped_ternary_linear(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    shape: tuple[int, int],
    bias: torch.Tensor | None,
    ends: torch.Tensor,
    backend: str,
) -> torch.Tensor:
    """`ternary_linear` with matrix e and bias[e] for the rows ends[e−1] <= r < ends[e] of x.

    x `[S, K]`, codes uint8 `[E, ceil(N/16), ceil(K/16), 64]`: those of E PackedTernary of one shape (N, K); scale
    `[E]`, bias `[E, N]`, ends int64 `[E]`, the last S; backend: what LINEAR has chosen. Returns `[S, N]` in x's
    dtype. For `PackedMoE`, which has checked all of it and works without gradients and autocast.
    """
    y: torch.Tensor = _grouped_linear(x, codes, scale, shape, bias, ends, backend)
    return y


_quantize = define_constant(
    "quantize_ternary(Tensor weight, str scale, str backend) -> (Tensor, Tensor)",
    lambda *args: QUANTIZE.module(args[-1]).quantize_ternary(*args[:-1]),
    lambda weight, scale, backend: (
        weight.new_empty(weight.shape, dtype=torch.int8),
        weight.new_empty((), dtype=torch.float32),
    ),
)
_matmul = define_constant(
    "ternary_matmul(Tensor x, Tensor codes, int[] shape, str backend) -> Tensor",
    lambda *args: MATMUL.module(args[-1]).ternary_matmul(*args[:-1]),
    lambda x, codes, shape, backend: x.new_empty(x.shape[0], shape[0], dtype=torch.int32),
)
_linear = define_constant(
    "ternary_linear(Tensor x, Tensor codes, Tensor scale, int[] shape, Tensor? bias, str backend) -> Tensor",
    lambda *args: LINEAR.module(args[-1]).ternary_linear(*args[:-1]),
    lambda x, codes, scale, shape, *args: x.new_empty(*x.shape[:-1], shape[0]),
)
# The reference too: its loop over the groups depends on data, which a compiled graph could not hold.
_grouped_linear = define_constant(
    "grouped_ternary_linear(Tensor x, Tensor codes, Tensor scale, int[] shape, Tensor? bias, Tensor ends, str backend)"
    " -> Tensor",
    lambda *args: LINEAR.module(args[-1]).ternary_linear(*args[:-1]),
    lambda x, codes, scale, shape, *args: x.new_empty(x.shape[0], shape[0]),
)
