"""What this machine can do at most, measured in the same run as the ops: the denominators of the bench table."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable

import torch


def seconds(call: Callable[[], object], device: str, budget: float = 0.5, least: int = 3) -> float:
    """The median time of one call, over as many calls as fit the budget; the first call is not counted."""
    call()
    times: list[float] = []
    while len(times) < least or sum(times) < budget:
        synchronize(device)
        start = time.perf_counter()
        call()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


@functools.cache
def copy_bandwidth(device: str) -> float:
    """Bytes per second, read and written, of copying a tensor that no cache holds."""
    n = 2**30 if device == "cuda" else 2**28
    source, target = (torch.ones(n // 4, device=device) for _ in range(2))
    return 2 * n / seconds(lambda: target.copy_(source), device)


@functools.cache
def matmul_rate(device: str, dtype: torch.dtype) -> float:
    """Operations per second of torch's square matrix product in `dtype`."""
    n = 8192 if device == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    return 2 * n**3 / seconds(lambda: a @ b, device)


def least_seconds(nbytes: float, flops: float, device: str, dtype: torch.dtype) -> tuple[float, str]:
    """The time that the slower of the two limits allows, and which one that is."""
    memory, arithmetic = nbytes / copy_bandwidth(device), flops / matmul_rate(device, dtype)
    return (memory, "copy") if memory >= arithmetic else (arithmetic, "matmul")
