"""What this machine can do at most, measured in the same run as the ops: the denominators of the bench table."""

from __future__ import annotations

import ctypes
import functools
import math

import torch

from bench import compiled
from bench.timing import measure
from ultra_kernels import _native, _products


@functools.cache
def copy_bandwidth(device: str) -> float:
    """Bytes per second, read and written, of copying a tensor that no cache holds."""
    n = 2**30 if device == "cuda" else 2**28
    source, target = (torch.ones(n // 4, device=device) for _ in range(2))
    return 2 * n / measure(lambda: target.copy_(source), device, budget=0.5).median


@functools.cache
def matmul_rate(device: str, dtype: torch.dtype) -> float:
    """Operations per second of torch's square matrix product in `dtype`; in float32 on a CPU oneDNN's if faster."""
    n = 8192 if device == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    rate = 2 * n**3 / measure(lambda: a @ b, device, budget=0.5).median
    if device == "cuda" or dtype != torch.float32 or not torch.backends.mkldnn.is_available():
        return rate
    return max(rate, 2 * n**3 / measure(lambda: _products.multiply(a, b), device, budget=0.5).median)


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


@functools.cache
def int8_rate(device: str) -> float:
    """Operations per second of int8 products summed in int32: torch's square matrix product, or VNNI alone if faster.

    VNNI by a loop of nothing else in one core, times threads, where there is a compiler (peaks.cpp).
    """
    n = 8192 if device == "cuda" else 2048
    a, b = (torch.randint(-127, 128, (n, n), device=device, dtype=torch.int8) for _ in range(2))
    rate = 2 * n**3 / measure(lambda: torch._int_mm(a, b.t()), device, budget=0.5).median
    if device == "cuda" or (library := _peaks()) is None:
        return rate
    dots, rounds = library.int8_dots, 10_000
    return max(rate, torch.get_num_threads() * dots(rounds) / measure(lambda: dots(rounds), device, budget=0.2).median)


@functools.cache
def cached_read_bandwidth(nbytes: int = 2**20) -> float | None:
    """Bytes per second of one core that reads `nbytes` again and again, times threads; None without a compiler.

    1 MiB is a 2048 × 2048 matrix at two bits a weight. Every thread reads its part, so that each has its own cache.
    """
    if (library := _peaks()) is None:
        return None
    threads = torch.get_num_threads()
    x = torch.ones(nbytes // 4 // threads // 128 * 128, dtype=torch.int32)
    read, arguments = library.read_all, (ctypes.c_void_p(x.data_ptr()), len(x))

    def call() -> None:
        for _ in range(20):
            read(*arguments)

    return threads * 20 * 4 * len(x) / measure(call, "cpu", budget=0.2).median


@functools.cache
def _peaks() -> ctypes.CDLL | None:
    try:
        library = compiled.load("peaks.cpp")
    except ImportError:
        return None
    library.int8_dots.argtypes, library.int8_dots.restype = [ctypes.c_int64], ctypes.c_int64
    library.read_all.argtypes, library.read_all.restype = [ctypes.c_void_p, ctypes.c_int64], ctypes.c_int32
    return library


def limits(
    nbytes: float, flops: float, exps: float, device: str, dtype: torch.dtype, int8_ops: float = 0
) -> dict[str, float]:
    """Seconds that each limit asks for, the longest first; `int8_ops` are operations that are not among the flops.

    Arithmetic at the better of the rates of `dtype` and float32: where the narrow one is emulated, nobody need use it.
    """
    found = {"copy": nbytes / copy_bandwidth(device)}
    in_int8 = int8_ops / int8_rate(device) if int8_ops else 0.0
    if flops or not int8_ops:
        rate = max(matmul_rate(device, dtype), matmul_rate(device, torch.float32))
        found["matmul"] = flops / rate + in_int8  # the same units do both
    else:
        found["int8"] = in_int8
    if exps:
        found["exp"] = exps / exp_rate(device)
    return dict(sorted(found.items(), key=lambda item: -item[1]))
