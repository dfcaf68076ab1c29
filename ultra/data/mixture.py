"""Which source the n-th training sample comes from, when several share a run by weight.

The weights become integers a_i with sum P, and the sources of samples 0..P-1 repeat without end. Within a period the
j-th sample of source i (from 0) may stand no earlier than floor(j P / a_i) and no later than ceil((j+1) P / a_i) - 1;
earliest deadline first fills every place within these limits (Pfair scheduling of one processor: Baruah, Cohen, Plaxton
and Varvel 1996, Proportionate progress, Algorithmica 15). So in every prefix of n samples each source has
n a_i / P, less or more by under 1, and where a sample comes from is read off a table: resume needs no counters.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from fractions import Fraction
from functools import reduce
from math import gcd, lcm

import numpy as np

MAX_PERIOD = 2**16  # weights with a larger common denominator are rounded to it: by less than 1/65536 of the samples


def slots(weights: Sequence[float]) -> list[int]:
    """Samples of each source in one period: the weights, read as decimals, as the smallest integers."""
    exact = [Fraction(str(weight)) for weight in weights]
    scale = lcm(*(weight.denominator for weight in exact))
    integers = [int(weight * scale) for weight in exact]
    divisor = reduce(gcd, integers)
    integers = [i // divisor for i in integers]
    total = sum(integers)
    if total <= MAX_PERIOD:
        return integers
    # largest remainders, and at least one for each
    shares = [Fraction(i * MAX_PERIOD, total) for i in integers]
    rounded = [max(1, int(share)) for share in shares]
    order = sorted(range(len(shares)), key=lambda i: int(shares[i]) - shares[i])
    for i in order[: max(0, MAX_PERIOD - sum(rounded))]:
        rounded[i] += 1
    return rounded


class Mixture:
    """n -> (source, which of that source's samples)."""

    def __init__(self, weights: Sequence[float]) -> None:
        self.slots = slots(weights)
        self.period = sum(self.slots)
        self._source = _schedule(self.slots)
        self._rank = np.empty(self.period, dtype=np.int64)  # earlier places of the same source in the period
        for source, count in enumerate(self.slots):
            self._rank[self._source == source] = np.arange(count)

    def locate(self, n: int) -> tuple[int, int]:
        periods, place = divmod(n, self.period)
        source = int(self._source[place])
        return source, periods * self.slots[source] + int(self._rank[place])

    def counts(self, n: int) -> list[int]:
        """How many of samples 0..n-1 come from each source."""
        periods, places = divmod(n, self.period)
        inside = np.bincount(self._source[:places], minlength=len(self.slots)).tolist()
        return [periods * count + more for count, more in zip(self.slots, inside, strict=True)]

    @property
    def shares(self) -> list[float]:
        return [count / self.period for count in self.slots]


def _schedule(slots: list[int]) -> np.ndarray:
    """The source of each place of a period, int64 [P]."""
    period = sum(slots)
    done = [0] * len(slots)
    later = [(0, source) for source in range(len(slots))]  # (first place of its next sample, source)
    ready: list[tuple[int, int]] = []  # (last place of its next sample, source)
    order = np.empty(period, dtype=np.int64)
    for place in range(period):
        while later and later[0][0] <= place:
            _, source = heapq.heappop(later)
            heapq.heappush(ready, (-(-(done[source] + 1) * period // slots[source]) - 1, source))
        _, source = heapq.heappop(ready)
        order[place] = source
        done[source] += 1
        if done[source] < slots[source]:
            heapq.heappush(later, (done[source] * period // slots[source], source))
    return order
