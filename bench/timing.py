"""How long a call takes: the one timing loop of the bench."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

LEAST_ROUNDS, MOST_ROUNDS = 3, 100


@dataclass(frozen=True)
class Timing:
    """Seconds of one call over `rounds` rounds."""

    median: float
    best: float
    rounds: int


def measure(call: Callable[[], object], device: str, budget: float) -> Timing:
    """Times `call` for about `budget` seconds, after one call that is not counted (it compiles and allocates).

    On a GPU the time between two events on the stream, so that waiting for the host between launches counts and the
    host's own work beside a running kernel does not; the L2 cache is overwritten before every round. On a CPU the
    wall clock.
    """
    call()
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    once = time.perf_counter() - start
    rounds = max(LEAST_ROUNDS, min(MOST_ROUNDS, int(budget / max(once, 1e-9))))
    times = _on_gpu(call, rounds) if device == "cuda" else _on_host(call, rounds)
    return Timing(statistics.median(times), min(times), rounds)


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _on_host(call: Callable[[], object], rounds: int) -> list[float]:
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return times


def _on_gpu(call: Callable[[], object], rounds: int) -> list[float]:
    # Twice the cache; the write also keeps the GPU busy while the host prepares the launch that is timed.
    flush = torch.empty(2 * torch.cuda.get_device_properties().L2_cache_size, dtype=torch.int8, device="cuda")
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(rounds)]
    for begin, end in pairs:
        flush.zero_()
        begin.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) / 1e3 for begin, end in pairs]
