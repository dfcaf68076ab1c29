"""One source as windows: its cache, its split, and which of its windows is its n-th training sample."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache

import numpy as np

from ultra.data.cache import Filler, TokenCache, Unit, wait_for
from ultra.data.windows import Sample, SampleOrder, UnitWindows, make_split
from ultra.errors import UserError


class Corpus:
    """`cache` has at least one unit; `filler`, if any, adds more. Windows of `length` tokens."""

    def __init__(
        self,
        name: str,
        cache: TokenCache,
        filler: Filler | None,
        should_stop: Callable[[], bool],
        *,
        val_fraction: float,
        length: int,
        packed: bool,
    ) -> None:
        self.name, self.cache, self.filler = name, cache, filler
        self.waited_s = 0.0
        self.split = make_split(val_fraction, cache.index(cache.units[0])[1])
        self._should_stop, self._val_fraction, self._length, self._packed = should_stop, val_fraction, length, packed
        self._count = lru_cache(maxsize=None)(self._count_windows)
        self._train_counts = np.empty(0, dtype=np.int64)

    def windows(self, unit: Unit, *, validation: bool) -> UnitWindows:
        return UnitWindows(self.cache, unit, self.split, validation, self._length, self._packed)

    def _count_windows(self, unit: Unit) -> tuple[int, int]:
        return tuple(self.windows(unit, validation=v).count for v in (False, True))  # type: ignore[return-value]

    def train_counts(self) -> np.ndarray:
        """Training windows of each unit that exists so far."""
        units = self.cache.units
        if len(self._train_counts) != len(units):
            self._train_counts = np.array([self._count(unit)[0] for unit in units], dtype=np.int64)
        return self._train_counts

    def validation_windows(self, at_least: int) -> int:
        """Validation windows that exist, once there are `at_least` or all."""

        def there() -> int:
            return sum(self._count(unit)[1] for unit in self.cache.units)

        self.wait(lambda: self.cache.complete or there() >= at_least)
        return there()

    def validation(self) -> Iterator[tuple[int, Unit, int]]:
        """(unit number, unit, window) in the order of the documents."""
        for number, unit in enumerate(self.cache.units):
            for window in range(self._count(unit)[1]):
                yield number, unit, window

    def locate(self, order: SampleOrder, n: int) -> Sample:
        """This source's n-th training sample; waits for its unit."""
        sample = order.locate(n, self.train_counts(), self.cache.complete)
        if sample is None:
            self.wait(lambda: self.cache.complete or int(self.train_counts().sum()) > n)
            if not self.train_counts().any():
                raise UserError(
                    f"no training documents: training.val_fraction={self._val_fraction} leaves all "
                    f"{sum(u.documents for u in self.cache.units)} documents of {self.name} to validation"
                )
            sample = order.locate(n, self.train_counts(), self.cache.complete)
            assert sample is not None
        return sample

    def token_counts(self, vocab_size: int, *, validation: bool = False) -> np.ndarray:
        """How often each id occurs in the training documents that the cache holds, int64 [vocab_size]; validation: in
        those held out as well."""
        counts = np.zeros(vocab_size, dtype=np.int64)
        for unit in self.cache.units:
            offsets, hashes = self.cache.index(unit)
            wanted = np.repeat(~self.split.is_validation(hashes) | validation, np.diff(offsets))
            tokens = self.cache.tokens(unit)[: len(wanted)]
            counts += np.bincount(tokens[wanted], minlength=vocab_size)
        return counts

    def wait(self, ready: Callable[[], bool]) -> None:
        self.waited_s += wait_for(self.cache, self.filler, ready, self._should_stop)
