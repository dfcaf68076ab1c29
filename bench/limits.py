"""What this machine can do at most, measured in the same run as the ops: the denominators of the bench table."""

from __future__ import annotations

import functools
import math

import torch

from bench.timing import measure
from ultra_kernels import _native


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


@functools.cache
def exp_rate(device: str) -> float:
    """Exponentials per second: the library's own on a cached vector, times threads.

    On a GPU 16 a clock and multiprocessor; no limit where torch does not tell the clock.
    """
    if device == "cuda":
        gpu = torch.cuda.get_device_properties()
        kilohertz = getattr(gpu, "clock_rate", math.inf)
        return 16.0 * gpu.multi_processor_count * kilohertz * 1e3
    n, repeats = 4096, 200
    x, y = -torch.rand(n), torch.empty(n)
    if _native.missing() is not None:
        return n / measure(lambda: torch.exp2(x, out=y), device, budget=0.2).best
    apply, arguments = _native.load().simd_apply, (3, x.data_ptr(), y.data_ptr(), n)

    def call() -> None:
        for _ in range(repeats):
            apply(*arguments)

    return torch.get_num_threads() * repeats * n / measure(call, device, budget=0.2).median


def least_seconds(nbytes: float, flops: float, exps: float, device: str, dtype: torch.dtype) -> tuple[float, str]:
    """The time that the slowest of the limits allows, and which one that is.

    Arithmetic at the better of the rates of `dtype` and float32: where the narrow one is emulated, nobody need use it.
    """
    rate = max(matmul_rate(device, dtype), matmul_rate(device, torch.float32))
    limits = {"copy": nbytes / copy_bandwidth(device), "matmul": flops / rate}
    if exps:
        limits["exp"] = exps / exp_rate(device)
    name = max(limits, key=lambda k: limits[k])
    return limits[name], name
