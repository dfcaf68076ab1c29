"""How an op states which Triton kernels it ships, so that they can be compiled and checked without a GPU."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

ARCHS = (80, 90, 100)  # compute capability × 10: Ampere, Hopper, Blackwell


@dataclass(frozen=True)
class Configuration:
    """One specialisation of a kernel that some launch asks for.

    signature: argument -> Triton type ("*fp32", "i32"); constexprs: the values of the other arguments.
    aligned: arguments that a launch finds divisible by 16, addresses and sizes alike; they get vector loads.
    """

    name: str
    kernel: Any  # triton.runtime.JITFunction
    signature: dict[str, str]
    constexprs: dict[str, Any]
    aligned: tuple[str, ...]
    num_warps: int
    num_stages: int = 1
    enable_fp_fusion: bool = True
    archs: tuple[int, ...] = field(default=ARCHS)
