"""Tables of cosines and sines by position, for the C++ kernels that turn pairs; the layers of a model share them."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F

from ._native import load

Tables = tuple[torch.Tensor, torch.Tensor]


@functools.lru_cache(64)
def frequencies(K: int, theta: float) -> tuple[float, ...]:
    """theta^(-2i/K) of the pairs i of K channels, in float64."""
    return tuple((theta ** (torch.arange(0, K, 2, dtype=torch.float64, device="cpu") / -K)).tolist())


@functools.lru_cache(8)
def rotations(first: int, rows: int, frequency: tuple[float, ...]) -> Tables:
    """`rotations_at` of positions first .. first + rows."""
    return rotations_at(torch.arange(first, first + rows, dtype=torch.float64, device="cpu"), frequency)


def rotations_at(positions: torch.Tensor, frequency: tuple[float, ...]) -> Tables:
    """Cosine and sine of position · frequency as float32 `[len(positions), K]`, for both channels of each pair.

    The sine of the first channel has a minus: y = x · cosine + (x with the channels of each pair swapped) · sine.
    Angles are float64, as in the definition of `rotary`. Rows are padded with zeros to whole vectors.
    """
    angle = positions.double()[:, None] * torch.tensor(frequency, dtype=torch.float64, device="cpu")
    pad = (0, -2 * len(frequency) % load().hope_columns)
    cosine, sine = angle.cos(), angle.sin()
    both = (torch.stack(pair, -1).flatten(1).float() for pair in ((cosine, cosine), (-sine, sine)))
    of_cosine, of_sine = (F.pad(table, pad).contiguous() for table in both)
    return of_cosine, of_sine
