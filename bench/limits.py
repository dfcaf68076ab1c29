"""What this machine can do at most, measured in the same run as the ops: the denominators of the bench table."""

from __future__ import annotations

import functools

import torch

from bench.timing import measure


@functools.cache
def copy_bandwidth(device: str) -> float:
    """Bytes per second, read and written, of copying a tensor that no cache holds."""
    n = 2**30 if device == "cuda" else 2**28
    source, target = (torch.ones(n // 4, device=device) for _ in range(2))
    return 2 * n / measure(lambda: target.copy_(source), device, budget=0.5).median


@functools.cache
def matmul_rate(device: str, dtype: torch.dtype) -> float:
    """Operations per second of torch's square matrix product in `dtype`."""
    n = 8192 if device == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    return 2 * n**3 / measure(lambda: a @ b, device, budget=0.5).median


def least_seconds(nbytes: float, flops: float, device: str, dtype: torch.dtype) -> tuple[float, str]:
    """The time that the slower of the two limits allows, and which one that is.

    Arithmetic at the better of the rates of `dtype` and float32: where the narrow one is emulated, nobody need use it.
    """
    rate = max(matmul_rate(device, dtype), matmul_rate(device, torch.float32))
    memory, arithmetic = nbytes / copy_bandwidth(device), flops / rate
    return (memory, "copy") if memory >= arithmetic else (arithmetic, "matmul")
