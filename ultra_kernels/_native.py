"""Finds and loads the compiled C++ library, and says why not when there is none."""

from __future__ import annotations

import ctypes
import functools
import importlib.machinery
import importlib.metadata
import importlib.util
import json
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch

from ._version import __version__

ABI = 8  # kAbi of csrc/bindings.cpp
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # DType of csrc/common/simd.h


class NativeUnavailable(RuntimeError):
    """The C++ library cannot be used; the message says why."""


@functools.cache
def load() -> ModuleType:
    """The module `_C`: beside this file (installed, or built in place), else of the installed distribution.

    The second place serves a clone's root, from where Python imports the source folders instead of the installed
    ones. Raises NativeUnavailable with the reason.
    """
    problems = []
    for path in _candidates():
        try:
            module = _load_file(path)
        except ImportError as error:
            problems.append(f"{path}: {error}")
            continue
        if (module.abi, module.version) == (ABI, __version__):
            return module
        problems.append(f"{path}: version {module.version}, ABI {module.abi}; need {__version__}, ABI {ABI}")
    raise NativeUnavailable("; ".join(problems) or build_info("cpp").get("reason") or "the C++ library was not built")


@functools.cache
def missing() -> str | None:
    """None when the C++ library is loaded, otherwise the reason."""
    try:
        load()
    except NativeUnavailable as error:
        return str(error)
    return None


# Dynamo must not look inside: the answer does not change within a process.
missing_constant = torch.compiler.assume_constant_result(lambda: missing())


def why_not(tensor: torch.Tensor, *args: object, dtypes: Iterable[torch.dtype] = DTYPES) -> str | None:
    """The reasons common to all native backends: no library, another device, a dtype outside `dtypes`."""
    if tensor.device.type != "cpu":
        return f"the C++ kernels run on the CPU, this tensor is on {tensor.device.type}"
    if tensor.dtype not in dtypes:
        return f"the C++ kernels take float32, bfloat16 and float16, not {str(tensor.dtype).removeprefix('torch.')}"
    reason: str | None = missing_constant()
    return reason


def view(t: torch.Tensor | None) -> tuple[int, ...]:
    """A [B,D,L] tensor of any strides as csrc/common/view.h takes it: address, three strides, dtype; None: absent."""
    return (0, 0, 0, 0, 0) if t is None else (t.data_ptr(), *t.stride(), DTYPES[t.dtype])


def head_rows(x: torch.Tensor | None) -> tuple[int, ...]:
    """`[B,T,H,*]` as HeadRows of csrc/common/heads.h; None: absent."""
    return view(None) if x is None else (x.data_ptr(), *view(x.select(-1, 0) if x.shape[-1] else x.flatten(2))[1:])


def contiguous_rows(x: torch.Tensor) -> torch.Tensor:
    """x itself unless its last axis has gaps: the C++ reads the others by strides."""
    return x if x.stride(-1) == 1 else x.contiguous()


def sequences(x: torch.Tensor, cu_seqlens: torch.Tensor | None) -> int:
    """The number of sequences of x `[B,T,...]`."""
    return x.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1


def address(t: torch.Tensor | None) -> int:
    """Where the data of a contiguous tensor lies; 0, the null pointer, for None."""
    return 0 if t is None else t.data_ptr()


def build_info(library: Literal["cpp", "cuda"]) -> dict[str, Any]:
    """What setup.py recorded of a library: its state, compiler and flags, or the reason for its absence and the fix."""
    for folder in folders():
        file = folder / "_build_info.json"
        if file.is_file():
            info: dict[str, Any] = json.loads(file.read_text()).get(library, {})  # older builds had another layout
            return info
    return {}


def folders() -> list[Path]:
    """Where compiled libraries may lie: beside this file, and in the installed distribution."""
    here = Path(__file__).resolve().parent
    for distribution in importlib.metadata.distributions(name="ultra"):
        # a build leaves an egg-info in the clone's root, first where Python starts there; it lists no installed files
        if distribution.read_text("RECORD") is not None:
            installed = Path(str(distribution.locate_file("ultra_kernels"))).resolve()
            return [here] if installed == here else [here, installed]
    return [here]


def _candidates() -> list[Path]:
    names = [f"_C{suffix}" for suffix in importlib.machinery.EXTENSION_SUFFIXES]
    return [folder / name for folder in folders() for name in names if (folder / name).is_file()]


def _load_file(path: Path) -> ModuleType:
    try:
        return _exec(path)
    except ImportError as error:
        if "GOMP_" not in str(error):
            raise
    # The library leaves its OpenMP symbols to torch's runtime (setup.py says why); this torch brought none.
    try:
        ctypes.CDLL("libgomp.so.1", mode=ctypes.RTLD_GLOBAL)
    except OSError as error:
        raise ImportError(f"no OpenMP runtime: torch loaded none and libgomp.so.1 failed: {error}") from error
    return _exec(path)


def _exec(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("ultra_kernels._C", path)
    if spec is None or spec.loader is None:
        raise ImportError("not an extension module")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
