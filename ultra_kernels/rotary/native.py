"""Rotary position encoding in C++ (csrc/rotary); the contract is in op.py."""

from __future__ import annotations

import torch

from .._native import contiguous_rows, head_rows, load
from .._rotations import Tables, frequencies, rotations, rotations_at

LONGEST = 8192  # rows of a table that is kept, if 4 times the tokens are not more


def forward(x: torch.Tensor, positions: torch.Tensor, theta: float, inv_freq: torch.Tensor | None) -> torch.Tensor:
    return _turned(x, positions, theta, inv_freq, False)


def backward(grad: torch.Tensor, positions: torch.Tensor, theta: float, inv_freq: torch.Tensor | None) -> torch.Tensor:
    """The gradient turned back."""
    return _turned(grad, positions, theta, inv_freq, True)


def _turned(
    x: torch.Tensor, positions: torch.Tensor, theta: float, inv_freq: torch.Tensor | None, back: bool
) -> torch.Tensor:
    y = x.new_empty(x.shape)
    if x.numel():
        x = contiguous_rows(x)
        frequency = frequencies(x.shape[3], theta) if inv_freq is None else tuple(inv_freq.tolist())
        place, first, (cosine, sine) = _tables(positions, frequency)
        strides = (0, *place.stride()) if place.dim() == 1 else place.stride()
        load().rotary(
            x.shape, head_rows(x), head_rows(y), (place.data_ptr(), *strides, place.dtype == torch.int64),
            (cosine.data_ptr(), sine.data_ptr(), first, cosine.stride(0)), back, torch.get_num_threads(),
        )  # fmt: skip
    return y


def _tables(positions: torch.Tensor, frequency: tuple[float, ...]) -> tuple[torch.Tensor, int, Tables]:
    """Positions as int32 or int64, the one that the tables start at, and the tables.

    They are found by the numbers in `positions`, whose tensor a compiled graph may use again for others. Borders are
    multiples of a power of two, so that batches of many lengths share a table.
    """
    if positions.dtype not in (torch.int32, torch.int64):
        positions = positions.long()
    least, largest = (int(p) for p in positions.aminmax())
    size = 1 << (largest - least).bit_length()
    first = least // size * size
    rows = size if largest < first + size else 2 * size
    if rows <= max(LONGEST, 4 * positions.numel()):
        return positions, first, rotations(first, rows, frequency)
    places, index = positions.unique(return_inverse=True)
    return index, 0, rotations_at(places, frequency)
