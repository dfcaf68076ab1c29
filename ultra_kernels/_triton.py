"""How an op states which Triton kernels it ships, so that they can be compiled and checked without a GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

ARCHS = (80, 90, 100)  # compute capability × 10: Ampere, Hopper, Blackwell
TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64",
         torch.int8: "i8", torch.uint8: "u8", torch.int32: "i32", torch.int64: "i64", torch.bool: "i1"}  # fmt: skip


def arch_of(tensor: torch.Tensor) -> int:
    """The architecture that `tensor` is on; on a CPU, where kernels are interpreted, that of Hopper."""
    if tensor.device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(tensor.device)
    return major * 10 + minor


class Launch(NamedTuple):
    """One kernel launch: arguments by name, with a tensor's dtype in its place; options such as num_warps."""

    kernel: Any  # triton.runtime.JITFunction
    arguments: dict[str, Any]
    options: dict[str, Any]


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

    def covers(self, launch: Launch) -> bool:
        """Whether `launch` is of this specialisation; addresses are taken as aligned."""
        if self.kernel is not launch.kernel:
            return False
        for name, value in launch.arguments.items():
            if name in self.constexprs:
                if self.constexprs[name] != value:
                    return False
            elif isinstance(value, torch.dtype):
                if self.signature[name] != f"*{TYPES[value]}":
                    return False
            elif isinstance(value, int):
                p = next(p for p in self.kernel.params if p.name == name)
                specialised = not p.do_not_specialize and value % 16 == 0
                if self.signature[name] != "i32" or specialised != (name in self.aligned):
                    return False
        return all(getattr(self, option) == value for option, value in launch.options.items())


@contextlib.contextmanager
def recorded_launches(run: bool = True) -> Iterator[list[Launch]]:
    """The launches of the Triton kernels within the block, as they come; run=False: nothing is launched."""
    from triton.runtime import JITFunction

    seen: list[Launch] = []
    original = JITFunction.run

    def record(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        options = {k: v for k, v in kwargs.items() if k not in self.arg_names}
        named = dict(zip(self.arg_names, args, strict=False)) | {k: kwargs[k] for k in kwargs if k not in options}
        arguments = {k: v.dtype if isinstance(v, torch.Tensor) else v for k, v in named.items()}
        seen.append(Launch(self, arguments, options))
        return original(self, *args, grid=grid, warmup=warmup, **kwargs) if run else None

    JITFunction.run = record
    try:
        yield seen
    finally:
        JITFunction.run = original
