"""Which tokens are predicted: BERT's masking (Devlin et al. 2019, arXiv:1810.04805), a pure function of
numbers.

Randomness is Philox (Salmon et al. 2011) keyed by (seed, sample): no generator state exists, so a resumed
run, another number of workers and another number of processes draw the same masks. Only `random_raw` is
used, the one stream that numpy keeps stable between versions.
"""

from __future__ import annotations

import numpy as np

from ultra.data.tokenizer import Vocabulary

IGNORE = -100

# The top word of Philox's counter: one value per purpose, so that streams of one key never overlap.
FRESH_MASKS, FIXED_MASKS, WINDOW_ORDER, UNIT_ORDER = range(1, 5)


class RandomBits:
    """Philox streams addressed by (purpose, seed, index). One object is reused: making a generator costs 14
    µs, setting its state 2.5 µs, and 512 raw numbers 5 µs."""

    def __init__(self, purpose: int, seed: int) -> None:
        self._bits = np.random.Philox(key=np.zeros(2, dtype=np.uint64))
        self._state = self._bits.state
        self._purpose, self._seed = purpose, seed % 2**64

    def draw(self, index: int, count: int) -> np.ndarray:
        """`count` uint64 numbers, the start of stream `index`."""
        inner = self._state["state"]
        inner["key"][:] = self._seed, index
        inner["counter"][:] = 0, 0, 0, self._purpose
        self._state["buffer_pos"] = 4  # numpy's buffer of four is empty
        self._bits.state = self._state
        return self._bits.random_raw(count)

    def permutation(self, index: int, count: int) -> np.ndarray:
        """A permutation of 0..count-1; Generator.permutation's stream may change between versions."""
        return np.argsort(self.draw(index, count), kind="stable")


class Masker:
    """Masks for windows that lie end to end.

    Each ordinary token is chosen with `probability`, and at least one in a window that has any; a chosen
    token becomes [MASK], a random ordinary token, or stays, with the three probabilities of `strategy`. One
    64-bit number a token: the high half decides the choice, the low half what becomes of it.
    """

    def __init__(
        self,
        vocab: Vocabulary,
        *,
        seed: int,
        purpose: int,
        probability: float,
        strategy: tuple[float, float, float],
    ) -> None:
        self._bits = RandomBits(purpose, seed)
        self._special = vocab.special
        self._ordinary = np.flatnonzero(~vocab.special)
        self._mask_id = vocab.mask_id
        self._chosen_below = round(probability * 2**32)
        self._mask_below = strategy[0]
        self._random_below = strategy[0] + strategy[1]
        self._random_share = strategy[1]

    def __call__(self, ids: np.ndarray, borders: np.ndarray, keys: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """ids [T] int64; window i is ids[borders[i]:borders[i+1]] and draws from stream keys[i].

        Returns (input ids [T], labels [T]), int64; labels are the original ids at every chosen position,
        also where the token stays, and -100 elsewhere.
        """
        draws = np.empty(len(ids), dtype=np.uint64)
        for i, key in enumerate(keys):
            draws[borders[i] : borders[i + 1]] = self._bits.draw(key, int(borders[i + 1] - borders[i]))
        # 2^32 is above every draw: a special token is neither chosen nor the smallest of its window
        choice = np.where(self._special[ids], np.uint64(2**32), draws >> np.uint64(32))
        chosen = choice < self._chosen_below
        per_window = np.add.reduceat(chosen, borders[:-1], dtype=np.int64)
        for empty in np.flatnonzero(per_window == 0):
            start, end = borders[empty], borders[empty + 1]
            lowest = start + np.argmin(choice[start:end])
            chosen[lowest] = choice[lowest] < 2**32

        at = np.flatnonzero(chosen)
        labels = np.full(len(ids), IGNORE, dtype=np.int64)
        labels[at] = ids[at]
        fate = (draws[at] & np.uint64(0xFFFFFFFF)).astype(np.float64) * 2.0**-32
        inputs = ids.copy()
        inputs[at[fate < self._mask_below]] = self._mask_id
        is_random = (fate >= self._mask_below) & (fate < self._random_below)
        if is_random.any():
            # rescaled to [0, 1) inside its share: uniform again, with 4e8 levels at a share of 0.1
            position = (fate[is_random] - self._mask_below) / self._random_share * len(self._ordinary)
            inputs[at[is_random]] = self._ordinary[np.minimum(position.astype(np.int64), len(self._ordinary) - 1)]
        return inputs, labels
