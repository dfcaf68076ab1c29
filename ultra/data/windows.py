"""Windows over the token shards, and which of them is the n-th training sample.

Packed: a unit's documents of one split, each "[CLS] document [SEP]", are one virtual stream; window i is
its tokens [i W, (i+1) W). The last window of a unit starts earlier so that it is as long as the others:
nothing is thrown away, and every batch has the same number of tokens. Unpacked: a sample is "[CLS] piece
[SEP]" of one document, a long document giving several pieces.

The order is a function of (seed, n). Epoch 0 goes unit by unit, so it does not depend on how far a
background fill has come; later epochs also permute the units; within a unit the windows are permuted by
(seed, epoch, unit).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from ultra.data.cache import TokenCache, Unit
from ultra.data.masking import UNIT_ORDER, WINDOW_ORDER, RandomBits

MAX_UNITS = 2**20  # unit and epoch share 64 bits in the key of a permutation; window and unit in a static mask's


@dataclass(frozen=True)
class Split:
    """Validation = the documents whose text hashes below val_fraction · 2^64, so the split survives added
    data.

    `forced` is one more hash that counts as validation: the smallest of the first unit when none is below
    the limit there, so that two different documents suffice for a held-out loss.
    """

    limit: int
    forced: int | None = None

    def is_validation(self, hashes: np.ndarray) -> np.ndarray:
        # limit may be 2^64, which no uint64 holds
        chosen = np.ones(len(hashes), bool) if self.limit >= 2**64 else hashes < np.uint64(self.limit)
        return chosen if self.forced is None else chosen | (hashes == np.uint64(self.forced))


def make_split(val_fraction: float, first_unit_hashes: np.ndarray) -> Split:
    """The split for a corpus whose first unit has these text hashes."""
    split = Split(int(val_fraction * 2**64))
    distinct = np.unique(first_unit_hashes)
    if val_fraction > 0 and len(distinct) >= 2 and not split.is_validation(distinct).any():
        return Split(split.limit, int(distinct[0]))
    return split


class UnitWindows:
    """The windows of one split of one unit. Only the index is in memory; tokens are read from the mapped
    shard.
    """

    def __init__(
        self, cache: TokenCache, unit: Unit, split: Split, validation: bool, length: int, packed: bool
    ) -> None:
        offsets, hashes = cache.index(unit)
        sizes = np.diff(offsets)
        keep = (split.is_validation(hashes) == validation) & (sizes > 0)
        self._first, sizes = offsets[:-1][keep], sizes[keep]  # where each document starts in the shard
        self._length, self._packed = length, packed
        if packed:
            self._start = np.concatenate(([0], np.cumsum(sizes)))  # ... and in the stream
            self.count = int(-(-self._start[-1] // length))
        else:
            room = length - 2
            pieces = -(-(sizes - 2) // room)
            self._start = np.concatenate(([0], np.cumsum(pieces)))  # first piece of each document
            self._size = sizes
            self.count = int(self._start[-1])
        self.tokens = int(sizes.sum())

    def read(self, tokens: np.ndarray, window: int) -> tuple[np.ndarray, np.ndarray]:
        """(ids, border positions inside the window, without its two ends), `tokens` being
        cache.tokens(unit).
        """
        if not self._packed:
            return self._piece(tokens, window), np.empty(0, dtype=np.int64)
        total = int(self._start[-1])
        a = max(0, min(window * self._length, total - self._length))
        b = min(a + self._length, total)
        lo = int(self._start.searchsorted(a, side="right")) - 1  # document that holds token a
        hi = int(self._start.searchsorted(b, side="left"))  # one past the document that holds token b-1
        shift = self._first[lo:hi] - self._start[lo:hi]
        if shift[0] == shift[-1]:  # no document of the other split between them: one slice
            ids = tokens[a + shift[0] : b + shift[0]]
        else:
            ends = np.append(self._start[lo + 1 : hi], b)
            begins = np.maximum(self._start[lo:hi], a)
            ids = np.concatenate([tokens[s + d : e + d] for s, e, d in zip(begins, ends, shift, strict=True)])
        return ids, self._start[lo + 1 : hi] - a

    def _piece(self, tokens: np.ndarray, window: int) -> np.ndarray:
        document = int(self._start.searchsorted(window, side="right")) - 1
        first, size = int(self._first[document]), int(self._size[document])
        room = self._length - 2
        body = first + 1 + (window - int(self._start[document])) * room
        last = first + size - 1  # the document's [SEP]
        return np.concatenate(
            (tokens[first : first + 1], tokens[body : min(body + room, last)], tokens[last : last + 1])
        )


@dataclass(frozen=True)
class Sample:
    """Training sample number `index` of the endless sequence: a window of a unit."""

    index: int
    unit: int
    window: int


class SampleOrder:
    """n -> (unit, window), given the windows of each unit; O(units) once per epoch and new unit."""

    def __init__(self, seed: int) -> None:
        self._units = RandomBits(UNIT_ORDER, seed)
        self._windows = RandomBits(WINDOW_ORDER, seed)
        self._permutation = lru_cache(maxsize=4)(self._permute)
        self._total, self._counts = 0, np.empty(0, dtype=np.int64)
        self._epoch, self._order, self._ends = -1, self._counts, self._counts

    def locate(self, n: int, counts: np.ndarray, complete: bool) -> Sample | None:
        """The n-th sample; None when no unit holds it yet, or none ever will (complete = no more will come).

        counts [units] int64; from call to call it may grow, not change.
        """
        if len(counts) != len(self._counts):
            self._total, self._counts, self._epoch = int(counts.sum()), counts, -1
        if n >= self._total and not (complete and self._total):
            return None
        epoch, position = divmod(n, self._total)
        if epoch != self._epoch:
            count = len(counts)
            order = self._units.permutation(epoch, count) if epoch else np.arange(count, dtype=np.int64)
            self._epoch, self._order, self._ends = epoch, order, np.cumsum(counts[order])
        place = int(self._ends.searchsorted(position, side="right"))
        unit = int(self._order[place])
        size = int(counts[unit])
        inside = position - int(self._ends[place]) + size
        return Sample(n, unit, int(self._permutation(epoch, unit, size)[inside]))

    def _permute(self, epoch: int, unit: int, count: int) -> np.ndarray:
        return self._windows.permutation(epoch * MAX_UNITS + unit, count)
