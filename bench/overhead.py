"""`python -m bench.overhead [OP ...]` prints what a call costs before any work: each op at its smallest case.

Microseconds on the CPU, the best of some rounds of many calls, without gradients, per backend that can run here.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import torch

import ultra_kernels
from ultra_kernels._dispatch import OPS
from ultra_kernels._testing import Case, cases

CALLS, ROUNDS = 200, 7


def smallest(name: str) -> Case:
    return min((c for c in cases(name) if c.flops), key=lambda c: c.elements)


def microseconds(call: Callable[[], object]) -> float:
    call()
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        for _ in range(CALLS):
            call()
        times.append(time.perf_counter() - start)
    return min(times) / CALLS * 1e6


@torch.no_grad()
def main(names: list[str]) -> int:
    if unknown := set(names) - OPS.keys():
        sys.stderr.write(f"no such op: {', '.join(sorted(unknown))}; there are {', '.join(sorted(OPS))}\n")
        return 2
    for name in names or sorted(OPS):
        case, function = smallest(name), getattr(ultra_kernels, name)
        inputs = case.inputs(torch.float32)
        for backend in OPS[name].order["cpu"]:
            if OPS[name].why_not(backend, torch.empty(0)) is None:
                took = microseconds(lambda f=function, i=inputs, b=backend: f(**i, backend=b))
                sys.stdout.write(f"{name:28} {case.name:24} {backend:10} {took:8.1f} us\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
