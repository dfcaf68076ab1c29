"""Finds and loads the compiled CUDA library, proves that a GPU runs it, and says why not where it does not.

The library is one file, `libultra_cuda.so` (a `_cuda.so` would be imported in place of this module), with CUDA's
runtime linked in: it depends on neither torch nor Python, only on the driver. Loading it asks nothing of the driver;
the first call on a GPU does, and its answer is kept.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from . import _native
from ._native import DTYPES as DTYPES
from ._version import __version__

ABI = 4  # kAbi of csrc/common/library_cuda.cu
_proven: dict[int, tuple[str, str] | None] = {}


class CudaUnavailable(RuntimeError):
    """The CUDA library cannot be used; the message says why."""


@functools.cache
def load() -> ctypes.CDLL:
    """The library, looked for where `_native.load` looks. Raises CudaUnavailable with the reason.

    The call through ctypes lets other Python threads run, which matters: a launch waits while the GPU's queue is full.
    """
    problems = []
    for path in (folder / "libultra_cuda.so" for folder in _native.folders()):
        if not path.is_file():
            continue
        try:
            library = ctypes.CDLL(str(path))
            abi, version = library.ultra_cuda_abi(), _text(library.ultra_cuda_version)
        except (OSError, AttributeError) as error:
            problems.append(f"{path}: {error}")
            continue
        if (abi, version) == (ABI, __version__):
            return library
        problems.append(f"{path}: version {version}, ABI {abi}; need {__version__}, ABI {ABI}")
    built = _native.build_info("cuda")
    raise CudaUnavailable("; ".join(problems) or built.get("reason") or "the CUDA library was not built")


@functools.cache
def missing() -> str | None:
    """None when the CUDA library is loaded, otherwise the reason."""
    try:
        load()
    except CudaUnavailable as error:
        return str(error)
    return None


def obstacle(index: int) -> tuple[str, str] | None:
    """None when GPU `index` runs the library's kernels, else the reason and the remedy; kept per process and GPU."""
    if index not in _proven:
        if torch.cuda.is_current_stream_capturing():
            return "the CUDA kernels were not tried before a CUDA graph was captured", "call the op once before"
        _proven[index] = _prove(index)
    return _proven[index]


def unusable(index: int) -> str | None:
    """None when GPU `index` runs the library's kernels, otherwise one sentence with reason and remedy."""
    found = obstacle(index)
    return None if found is None else "; ".join(found)


# Dynamo must not look inside: the answer does not change within a process.
unusable_constant = torch.compiler.assume_constant_result(lambda index: unusable(index))


def why_not(tensor: torch.Tensor, *args: object, dtypes: Iterable[torch.dtype] = DTYPES) -> str | None:
    """The reasons common to all CUDA backends: another device, a dtype outside `dtypes`, what `unusable` says."""
    if tensor.device.type != "cuda":
        return f"the CUDA kernels run on an NVIDIA GPU, this tensor is on {tensor.device.type}"
    if tensor.dtype not in dtypes:
        return f"the CUDA kernels take float32, bfloat16 and float16, not {str(tensor.dtype).removeprefix('torch.')}"
    reason: str | None = unusable_constant(tensor.device.index)
    return reason


class Struct:
    """The fields of a C++ struct, 8 bytes each: tensors as addresses, None as null, nested tuples in order."""

    def __init__(self, *fields: Any) -> None:
        values = list(_leaves(fields))
        self.tensors = [v for v in values if isinstance(v, torch.Tensor)]  # alive while the kernels are queued
        self.array = (ctypes.c_int64 * len(values))(
            *(v.data_ptr() if isinstance(v, torch.Tensor) else v or 0 for v in values)
        )


def view(t: torch.Tensor | None) -> tuple[Any, ...]:
    """A [B,D,L] tensor of any strides as fields of csrc/common/view.h: address, three strides, dtype."""
    return (None, 0, 0, 0, 0) if t is None else (t, *t.stride(), DTYPES[t.dtype])


def launch(name: str, *args: torch.Tensor | Struct | int | float | None) -> None:
    """Queues function `name` of the library on the GPU of the first tensor and on torch's current stream.

    Contiguous tensors go as addresses, None as null, a Struct as its address, int as int64_t, float as float; the
    stream is added last. Raises ValueError when the tensors are not on one device, RuntimeError with CUDA's words if
    the launch fails.
    """
    tensors = [t for a in args for t in (a.tensors if isinstance(a, Struct) else [a]) if isinstance(t, torch.Tensor)]
    index = tensors[0].get_device()
    for t in tensors:
        if t.get_device() != index:
            devices = f"{tensors[0].device}, another on {t.device}"
            raise ValueError(f"{name}: the first tensor is on {devices}; all must be on one GPU")
    values = [a.data_ptr() if isinstance(a, torch.Tensor) else a.array if isinstance(a, Struct) else a for a in args]
    function = _function(name, tuple(map(type, args)))
    with torch.cuda.device(index):
        code = function(*values, torch._C._cuda_getCurrentRawStream(index))
    if code:
        raise RuntimeError(f"{name}: CUDA error {code}: {_text(load().ultra_cuda_error, code)}")


def count(name: str, *sizes: int) -> int:
    """What function `name` of the library, of int64_t sizes, says: how many floats of scratch memory to bring."""
    function = getattr(load(), name)
    function.restype, function.argtypes = ctypes.c_int64, [ctypes.c_int64] * len(sizes)
    return int(function(*sizes))


def archs() -> list[str]:
    """What the library holds: machine code ("sm_80") and PTX, which the driver compiles ("compute_90")."""
    return _text(load().ultra_cuda_archs).split()


def serves(arch: str, capability: tuple[int, int]) -> bool:
    """Whether code for `arch` runs on a GPU of this compute capability.

    Machine code runs on its own major version from its minor version up, PTX on everything newer as well; with the
    suffix "a" either runs on its own capability alone, with "f" like machine code.
    """
    kind, number = arch.split("_")
    suffix = number[-1] if number[-1] in "af" else ""
    number = number.removesuffix(suffix)
    own = int(number[:-1]), int(number[-1])
    if suffix == "a":
        return capability == own
    return capability >= own and (capability[0] == own[0] or (kind == "compute" and not suffix))


def version_text(version: int) -> str:
    """13000 -> "13.0"."""
    return f"{version // 1000}.{version % 1000 // 10}"


def _prove(index: int) -> tuple[str, str] | None:
    if torch.version.hip:
        return "the CUDA kernels are for NVIDIA GPUs, this torch is built for ROCm", "use another backend"
    again = "pip install --no-deps . in the clone"
    if (reason := missing()) is not None:
        return reason, _native.build_info("cuda").get("fix") or f"{again}, with CUDA's nvcc on the PATH"
    library = load()
    driver, runtime = library.ultra_cuda_driver(), library.ultra_cuda_runtime()
    if driver // 1000 < runtime // 1000:
        return (
            f"the NVIDIA driver is for CUDA {version_text(driver)}, the library was built with CUDA "
            f"{version_text(runtime)}",
            f"update the driver, or CUDA_HOME=<a CUDA {driver // 1000} toolkit> {again}",
        )
    capability = torch.cuda.get_device_capability(index)
    if not any(serves(arch, capability) for arch in archs()):
        name = "sm_{}{}".format(*capability)
        return f"this GPU is {name}, the library holds {', '.join(archs())}", f"ULTRA_CUDA_ARCHS={name} {again}"
    with torch.cuda.device(index):
        code = library.ultra_cuda_probe()
    if code:
        return f"a test kernel failed with CUDA error {code}: {_text(library.ultra_cuda_error, code)}", again
    return None


_C_TYPES: dict[type, Any] = {int: ctypes.c_int64, float: ctypes.c_float}


@functools.cache
def _function(name: str, types: tuple[type, ...]) -> Callable[..., int]:
    function = load()[name]  # a new object each time, so that two signatures of one name do not mix
    function.argtypes = [*(_C_TYPES.get(t, ctypes.c_void_p) for t in types), ctypes.c_void_p]
    return function


def _leaves(fields: Iterable[Any]) -> Iterator[Any]:
    for field in fields:
        if isinstance(field, tuple):
            yield from _leaves(field)
        else:
            yield field


def _text(function: Any, *args: int) -> str:
    function.restype = ctypes.c_char_p
    return str(function(*args).decode())
