"""Rotary position encoding."""

from __future__ import annotations

import torch

from .._dispatch import Op
from . import reference

OP = Op("rotary", __package__, {"cuda": ("reference",), "cpu": ("reference",)}, {})


def rotary(
    x: torch.Tensor,
    positions: torch.Tensor,
    *,
    theta: float = 10000.0,
    inv_freq: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Turns the pair (x_2i, x_2i+1) at position p by the angle p·f_i, f_i = theta^(-2i/K), at least in float32.

    x `[B,T,H,K]`, K even; positions `[T]` or `[B,T]`, any integers; inv_freq `[K/2]` replaces f (no gradient).
    Returns x's shape and dtype. Only differences of positions reach the products of two turned vectors.
    Raises ValueError on an odd K or a shape mismatch, BackendUnavailable. After Su et al. 2021 (arXiv:2104.09864).
    """
    if x.dim() != 4 or x.shape[-1] % 2:
        raise ValueError(f"rotary: x must be [B, T, H, K] with an even K, got {tuple(x.shape)}")
    B, T, _, K = x.shape
    if positions.shape not in ((T,), (B, T)) or positions.is_floating_point():
        raise ValueError(
            f"rotary: positions must be integers [{T}] or [{B}, {T}], got {positions.dtype} {tuple(positions.shape)}"
        )
    if inv_freq is not None and inv_freq.shape != (K // 2,):
        raise ValueError(f"rotary: inv_freq has shape {tuple(inv_freq.shape)}, must be ({K // 2},)")
    OP.choose(backend, x)
    return reference.rotary(x, positions, theta, inv_freq)
