"""Launches each Triton and CUDA kernel of every op on the smallest case that has it, forward and backward.

For compute-sanitizer, under which everything takes many times as long: `compute-sanitizer python -m bench.each_kernel`.
--list prints what would run; it needs no GPU.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch

import ultra_kernels
from ultra_kernels._dispatch import OPS
from ultra_kernels._testing import Case, cases, run
from ultra_kernels._triton import recorded_launches


def small_cases(name: str) -> list[Case]:
    return sorted((c for c in cases(name) if c.elements and not c.bench), key=lambda c: c.elements)


def kernels(name: str) -> set[Any]:
    """The Triton kernels that the op ships."""
    return {c.kernel for c in OPS[name].module("triton").configurations()}


def plan() -> Iterator[tuple[str, str]]:
    for name, op in OPS.items():
        yield from ((name, b) for b in op.order["cuda"] if b != "reference")


def launch_triton(name: str) -> tuple[list[str], set[Any]]:
    """Runs cases, smallest first, that launch a kernel for the first time; their names, and kernels never launched."""
    left, used = kernels(name), []
    for case in small_cases(name):
        with recorded_launches() as seen:
            run(getattr(ultra_kernels, name), case.inputs(case.dtypes[0], "cuda"), "triton", case.dtypes[0])
        torch.cuda.synchronize()
        used.append(case.name)
        left -= {launch.kernel for launch in seen}
        if not left:
            break
    return used, left


def launch_cuda(name: str) -> list[str]:
    """A CUDA C++ kernel is chosen inside the library: the smallest case of more than a few elements, every dtype."""
    case = next(c for c in small_cases(name) if c.elements > 100 and "cuda" not in c.refused_by)
    for dtype in case.dtypes:
        run(getattr(ultra_kernels, name), case.inputs(dtype, "cuda"), "cuda", dtype)
    torch.cuda.synchronize()
    return [case.name]


def main(arguments: list[str]) -> int:
    status = 0
    missing: dict[str, set[Any]] = {}  # package of kernels, which ops may share -> those that no op of it has launched
    for name, backend in plan():
        if "--list" in arguments:
            what = f"{len(kernels(name))} kernels" if backend == "triton" else small_cases(name)[0].name
            sys.stdout.write(f"{name} {backend}: {what}\n")
            continue
        if (reason := OPS[name].why_not(backend, torch.empty(0, device="cuda"))) is not None:
            sys.stdout.write(f"{name} {backend}: not run: {reason}\n")
            continue
        used, left = launch_triton(name) if backend == "triton" else (launch_cuda(name), set())
        sys.stdout.write(f"{name} {backend}: ran {', '.join(used)}\n")
        if backend == "triton":
            missing[OPS[name].kernels] = missing.get(OPS[name].kernels, left) & left
    for package, left in missing.items():
        if left:
            sys.stdout.write(f"{package}: never launched: {', '.join(k.fn.__name__ for k in left)}\n")
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
