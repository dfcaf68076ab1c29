"""Rows of [B,T,H,D] tensors in Triton kernels: which sequence a block of rows is of, and loads of 16 bytes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl


@triton.jit
def _sequence(cu_seqlens, slot, num_seqs, T, SIZE):
    """slot -> sequence, batch entry, its rows [begin, end), and which block of SIZE rows of it.

    Packed sequence s owns the slots from cu_seqlens[s] // SIZE + s on, of which the last may be empty.
    """
    if num_seqs > 0:
        started = 0
        for first in range(0, num_seqs, 128):
            s = first + tl.arange(0, 128)
            border = tl.load(cu_seqlens + s, mask=s < num_seqs, other=0)
            started += tl.sum(((border // SIZE + s <= slot) & (s < num_seqs)).to(tl.int32), axis=0)
        sequence = started - 1
        begin = tl.load(cu_seqlens + sequence)
        end = tl.load(cu_seqlens + sequence + 1)
        batch = 0
        block = slot - begin // SIZE - sequence
    else:
        per_sequence = (T + SIZE - 1) // SIZE
        sequence = slot // per_sequence
        begin = 0
        end = T
        batch = sequence
        block = slot % per_sequence
    return sequence, batch, begin, end, block


@triton.jit
def _rows(x, batch, h, row, stride_batch, stride_row, stride_head):
    """Addresses of rows of x [B,T,H,.]."""
    return x + (batch * stride_batch.to(tl.int64) + h * stride_head.to(tl.int64) + row * stride_row.to(tl.int64)) * 8


@triton.jit
def _load(rows, row_ok, column, width):
    """The tile rows × columns, zero outside."""
    return tl.load(rows[:, None] + column[None, :], mask=row_ok[:, None] & (column < width)[None, :], other=0.0)


@triton.jit
def _scores(q_tile, q_rows, q_ok, k_rows, k_ok, K, BLOCK_K: tl.constexpr, WHOLE_K: tl.constexpr):
    """q kᵀ; q_tile holds the queries where BLOCK_K covers the head dimension."""
    d = tl.arange(0, BLOCK_K)
    if WHOLE_K:
        return tl.dot(q_tile, tl.trans(_load(k_rows, k_ok, d, K)), input_precision="ieee")
    else:
        s = tl.zeros((q_rows.shape[0], k_rows.shape[0]), tl.float32)
        for d0 in range(0, K, BLOCK_K):
            k_part = _load(k_rows, k_ok, d0 + d, K)
            s = tl.dot(_load(q_rows, q_ok, d0 + d, K), tl.trans(k_part), s, input_precision="ieee")
        return s


def _readable(x: torch.Tensor) -> torch.Tensor:
    """x [B,T,H,D] such that loads of 16 bytes are in order: as it is, or a copy with D padded to a multiple of 16."""
    if x.shape[3] % 16:
        return F.pad(x, (0, -x.shape[3] % 16)).contiguous()
    fits = x.stride(3) == 1 and not any(s % 8 for s in _steps(x)) and x.data_ptr() % 16 == 0
    return x if fits else x.clone(memory_format=torch.contiguous_format)


def _steps(x: torch.Tensor) -> list[int]:
    """Strides of the first three axes; those of axes of length 1 mean nothing."""
    return [x.stride(i) if x.shape[i] > 1 else 0 for i in range(3)]


def _strides(x: torch.Tensor) -> list[int]:
    return [s // 8 for s in _steps(x)]
