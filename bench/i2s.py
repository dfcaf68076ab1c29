"""bitnet.cpp's I2_S kernels, compiled from a clone of github.com/microsoft/BitNet that ULTRA_BITNET_CPP names."""

from __future__ import annotations

import ctypes
import functools
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from bench import compiled

HEADERS = {
    **dict.fromkeys(("ggml.h", "ggml-backend.h", "ggml-quants.h", "ggml-cpu-impl.h"), ""),  # i2s.cpp has what is needed
    # In place of include/gemm-config.h with 4, 128, 4; what utils/tune_gemm_config.py varies. On a Zen 5 core 0.037
    # against 0.041 ms for one row and 11.9 against 13.1 ms for 512, both 2048 × 2048.
    "gemm-config.h": "#define ACT_PARALLEL\n#define ROW_BLOCK_SIZE 8\n#define COL_BLOCK_SIZE 128\n"
    "#define PARALLEL_SIZE 8\n",
}


@dataclass(frozen=True)
class Weights:
    codes: torch.Tensor
    scale: float
    shape: tuple[int, int]


@functools.cache
def library() -> ctypes.CDLL:
    checkout = os.environ.get("ULTRA_BITNET_CPP")
    if checkout is None:
        raise ImportError("ULTRA_BITNET_CPP names no clone of github.com/microsoft/BitNet")
    if not (Path(checkout) / "src" / "ggml-bitnet-mad.cpp").is_file():
        raise ImportError(f"ULTRA_BITNET_CPP: {checkout} has no src/ggml-bitnet-mad.cpp")
    headers = compiled.BUILD / "ggml"
    headers.mkdir(parents=True, exist_ok=True)
    for name, text in HEADERS.items():
        (headers / name).write_text(text)
    return compiled.load("i2s.cpp", f"-I{headers}", f"-I{checkout}", f"-I{checkout}/include")


def pack(weights: torch.Tensor, scale: torch.Tensor) -> Weights:
    """weights int8 `[N, K]` in {−1, 0, 1}."""
    N, K = weights.shape
    if weights.is_cuda or K % 128:
        raise NotImplementedError("I2_S: on a CPU, K a multiple of 128")
    wide, codes = weights.float().contiguous(), torch.zeros(N * K // 4 + 32, dtype=torch.uint8)
    library().i2s_pack(_at(wide), _at(codes), N, K)
    return Weights(codes, float(scale), (N, K))


def matmul(x: torch.Tensor, packed: Weights) -> torch.Tensor:
    """The integers x · weightsᵀ as float32, its result's dtype. x int8 `[M, K]`.

    Its sums have 16 bits over 4096 columns and wrap: x = 64, w = 1, K = 4096 give −786432 for 262144. K ≤ 2048 is safe.
    """
    M, (N, K) = len(x), packed.shape
    x = x.contiguous()
    y, sums = torch.empty(M, N), torch.empty(M, dtype=torch.int32)
    library().i2s_matmul(_at(x), _at(packed.codes), _at(sums), _at(y), M, N, K, torch.get_num_threads())
    return y


def linear(x: torch.Tensor, packed: Weights, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x float32 `[M, K]`, quantised per row."""
    if x.dtype != torch.float32 or x.ndim != 2 or bias is not None:
        raise NotImplementedError("I2_S: float32 rows without a bias")
    (M, K), x = x.shape, x.contiguous()
    codes, steps = torch.empty(M, K, dtype=torch.int8), torch.empty(M)
    library().i2s_quantize(_at(x), _at(codes), _at(steps), M, K)
    y = matmul(codes, packed)
    library().i2s_scale(_at(y), _at(steps), ctypes.c_float(packed.scale), M, y.shape[1])
    return y


def _at(t: torch.Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(t.data_ptr())
