"""Up to 8 rows times packed ternary weights in CUDA C++ (csrc/ternary); the contracts are in op.py."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F

from .._cuda import DTYPES, Struct, count, launch


def ternary_matmul(x: torch.Tensor, codes: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    y = x.new_empty(x.shape[0], shape[0], dtype=torch.int32)
    x = F.pad(x, (0, -x.shape[1] % 16)).contiguous()
    _multiply(x if x.data_ptr() % 16 == 0 else x.clone(), codes, y)
    return y


def ternary_linear(
    x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, shape: tuple[int, int], bias: torch.Tensor | None
) -> torch.Tensor:
    (N, K), x, M = shape, x.contiguous(), x.shape[:-1].numel()
    width, y = K + -K % 16, x.new_empty(*x.shape[:-1], N)
    if y.numel():
        levels, step = x.new_empty(M, width, dtype=torch.int8), x.new_empty(M, dtype=torch.float32)
        launch("ternary_quantize", x, levels, step, M, K, width, DTYPES[x.dtype])
        _multiply(levels, codes, y.view(M, N), step, scale, bias)
    return y


@functools.cache
def _splits(panels: int, blocks: int) -> int:
    return count("ternary_splits", panels, blocks)


def _multiply(
    x: torch.Tensor,
    codes: torch.Tensor,
    y: torch.Tensor,
    step: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> None:
    (M, N), (panels, blocks, _) = y.shape, codes.shape
    if not y.numel():
        return
    splits = _splits(panels, blocks)
    parts = x.new_empty(splits, M, N, dtype=torch.int32) if splits > 1 else None
    added = (None, 0) if bias is None else (bias.contiguous(), DTYPES[bias.dtype])
    # The C++ Product; it does not look at the dtype of int32
    product = Struct(x, codes.contiguous(), step, scale, added, y, DTYPES.get(y.dtype, 0), parts, splits, M, N, blocks)
    launch("ternary_product", product)
