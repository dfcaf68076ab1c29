"""Masks: shares, what is never touched, and what they depend on."""

from __future__ import annotations

import numpy as np
import pytest

from ultra.data.masking import FIXED_MASKS, FRESH_MASKS, IGNORE, Masker, RandomBits
from ultra.data.tokenizer import Vocabulary, train_tokenizer


@pytest.fixture(scope="module")
def vocab() -> Vocabulary:
    return train_tokenizer(["some words to start from, some words to end with"] * 3, 300)


def masker(vocab: Vocabulary, probability: float = 0.15, strategy=(0.8, 0.1, 0.1), seed: int = 5, purpose=FRESH_MASKS):
    return Masker(vocab, seed=seed, purpose=purpose, probability=probability, strategy=strategy)


def sample(vocab: Vocabulary, windows: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    ids = np.random.default_rng(0).integers(0, vocab.size, windows * length)
    return ids, np.arange(windows + 1) * length


def within(count: int, n: int, p: float) -> bool:
    """Binomial: 5 standard deviations, so a correct masker fails once in 1.7 million tests."""
    return abs(count - n * p) <= 5 * (n * p * (1 - p)) ** 0.5


@pytest.mark.parametrize("probability", [0.15, 0.4])
@pytest.mark.parametrize("strategy", [(0.8, 0.1, 0.1), (0.5, 0.3, 0.2), (1.0, 0.0, 0.0), (0.0, 1.0, 0.0)])
def test_rate_and_shares(vocab: Vocabulary, probability: float, strategy) -> None:
    ids, borders = sample(vocab, 400, 512)
    inputs, labels = masker(vocab, probability, strategy)(ids, borders, list(range(400)))
    chosen = labels != IGNORE
    n = int(chosen.sum())
    assert within(n, int((~vocab.special[ids]).sum()), probability)
    assert np.array_equal(labels[chosen], ids[chosen])
    assert np.array_equal(inputs[~chosen], ids[~chosen])
    ordinary = int((~vocab.special).sum())
    random_kept = strategy[1] / ordinary  # a random replacement may be the token itself
    assert within(int((inputs[chosen] == vocab.mask_id).sum()), n, strategy[0])
    assert within(int((inputs[chosen] == ids[chosen]).sum()), n, strategy[2] + random_kept)
    replaced = inputs[chosen & (inputs != ids) & (inputs != vocab.mask_id)]
    assert not vocab.special[replaced].any() and (len(replaced) == 0 or replaced.max() < vocab.size)
    if len(replaced) > 2000:  # uniform over all ordinary ids
        counts = np.bincount(replaced, minlength=vocab.size)[~vocab.special]
        expected = len(replaced) / ordinary
        chi2 = float(((counts - expected) ** 2 / expected).sum())
        assert chi2 < ordinary + 5 * (2 * ordinary) ** 0.5  # mean + 5 standard deviations


def test_specials_are_never_chosen_and_one_token_always_is(vocab: Vocabulary) -> None:
    ids, borders = sample(vocab, 3000, 3)
    ids[:3] = vocab.cls_id  # a window without any ordinary token
    inputs, labels = masker(vocab, probability=0.01)(ids, borders, list(range(3000)))
    assert (labels[vocab.special[ids]] == IGNORE).all()
    assert np.array_equal(inputs[vocab.special[ids]], ids[vocab.special[ids]])
    per_window = (labels != IGNORE).reshape(-1, 3).sum(1)
    ordinary = (~vocab.special[ids]).reshape(-1, 3).any(1)
    assert np.array_equal(per_window >= 1, ordinary) and not ordinary[0]
    # the forced ones follow the same 80/10/10
    chosen = labels != IGNORE
    assert within(int((inputs[chosen] == vocab.mask_id).sum()), int(chosen.sum()), 0.8)


def test_masks_depend_on_key_seed_and_purpose_only(vocab: Vocabulary) -> None:
    ids, borders = sample(vocab, 8, 64)
    make = masker(vocab)
    whole = make(ids, borders, list(range(8)))
    alone = [make(ids[64 * i : 64 * i + 64], np.array([0, 64]), [i]) for i in reversed(range(8))]
    for part in range(2):
        assert np.array_equal(whole[part], np.concatenate([a[part] for a in reversed(alone)]))
    for other in (masker(vocab, seed=6), masker(vocab, purpose=FIXED_MASKS)):
        assert not np.array_equal(other(ids, borders, list(range(8)))[1], whole[1])
    assert not np.array_equal(make(ids, borders, list(range(8, 16)))[1], whole[1])


def test_streams_are_numpys_philox() -> None:
    bits = RandomBits(FRESH_MASKS, 2**63 + 5)
    for index in (0, 7, 2**40, 7):
        counter = np.array([0, 0, 0, FRESH_MASKS], dtype=np.uint64)
        key = np.array([2**63 + 5, index], dtype=np.uint64)
        wanted = np.random.Philox(counter=counter, key=key).random_raw(11)
        assert np.array_equal(bits.draw(index, 11), wanted)
    assert sorted(bits.permutation(3, 1000)) == list(range(1000))
