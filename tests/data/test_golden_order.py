"""The order of one source's samples and their masks, as numbers: a run that resumes under a newer version goes on
as it began. A digest here changes only together with FORMAT and a line in CHANGELOG.md."""

from __future__ import annotations

import hashlib
import itertools
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from ultra.data import open_data

WORDS = "the a river house walks slowly over stone green light model of and to in which every small number".split()


@pytest.fixture
def words(tmp_path: Path) -> str:
    """A vocabulary that no version of a trainer can change."""
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *dict.fromkeys(WORDS)]
    tokenizer = Tokenizer(models.WordLevel({t: i for i, t in enumerate(tokens)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    path = tmp_path / "words.json"
    tokenizer.save(str(path))
    return str(path)


@pytest.mark.parametrize(
    ("changes", "training", "evaluation"),
    [
        ({}, "9eb9b6f458775936", "7444f7b66fce17ec"),
        ({"pack_sequences": False, "dynamic_masking": False, "seed": 5}, "21b939d68a2ff744", "1fa6330bd9e7d252"),
    ],
)
def test_order_and_masks_of_one_source(make_cfg, words: str, changes, training: str, evaluation: str) -> None:
    data = open_data(make_cfg(tokenizer=words, stream_local_parquet=False, **changes))

    def digest(batches) -> str:
        state = hashlib.sha256()
        for b in batches:
            for tensor in (b.input_ids, b.labels, b.cu_seqlens):
                state.update(tensor.numpy().astype("<i8").tobytes())
        return state.hexdigest()[:16]

    steps = itertools.islice(data.train_batches(0), 200)  # several epochs of the 260 documents
    assert digest(itertools.chain.from_iterable(steps)) == training
    assert digest(data.eval_batches()) == evaluation
    data.close()
