"""Training, loading, and the two ways from text to ids."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing

from ultra.data import open_data
from ultra.data.tokenizer import SPECIALS, Vocabulary, load_tokenizer, train_tokenizer
from ultra.errors import UserError


@pytest.fixture
def vocab(texts: list[str]) -> Vocabulary:
    return train_tokenizer(texts, 350)


def word_tokenizer(*tokens: str) -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel({t: i for i, t in enumerate(tokens)}, unk_token=tokens[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


def test_round_trip_of_any_text(vocab: Vocabulary) -> None:
    samples = ["", " two  spaces\n\ttab", "Zürich 東京 🙂", "\x00\x7f control", "a" * 1000, "[CLS]</s><mask>"]
    for text, ids in zip(samples, vocab.encode_documents(samples), strict=True):
        assert vocab.tokenizer.decode(ids.tolist(), skip_special_tokens=False) == text


def test_specials_come_first_and_training_is_deterministic(texts: list[str], vocab: Vocabulary) -> None:
    assert [vocab.tokenizer.token_to_id(t) for t in SPECIALS] == [0, 1, 2, 3, 4]
    assert (vocab.pad_id, vocab.cls_id, vocab.sep_id, vocab.mask_id) == (0, 2, 3, 4)
    assert vocab.size == 350 and vocab.special.sum() == 5
    assert train_tokenizer(texts, 350).to_json() == vocab.to_json()


def test_documents_never_give_special_ids(vocab: Vocabulary) -> None:
    text = "a [MASK] b [SEP][CLS] [PAD][UNK]"
    [ids] = vocab.encode_documents([text])
    assert not vocab.special[ids].any()
    assert vocab.tokenizer.decode(ids.tolist()) == text
    prompt = vocab.encode_prompt(text)
    assert [i for i in prompt if vocab.special[i]] == [4, 3, 2, 0, 1]


def test_special_pieces_of_a_given_vocabulary_stay_out_of_documents() -> None:
    from ultra.data.tokenizer import vocabulary

    # "[MASK]" is an ordinary word of this model, not an added token
    vocab = vocabulary(word_tokenizer("[UNK]", "[PAD]", "[CLS]", "[SEP]", "[MASK]", "a", "b"), where="test")
    [ids] = vocab.encode_documents(["a [MASK] b [SEP] zebra"])
    assert ids.tolist() == [5, 6, 0]  # the unknown word stays unknown


def test_given_tokenizer_from_file_and_folder(tmp_path: Path, texts: list[str], vocab: Vocabulary) -> None:
    given = Tokenizer.from_str(vocab.to_json())
    given.enable_truncation(3)
    given.enable_padding()
    given.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    given.save(str(tmp_path / "tokenizer.json"))
    wanted = vocab.encode_documents(texts[:20])
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        got = load_tokenizer(path).encode_documents(texts[:20])
        assert all(np.array_equal(a, b) for a, b in zip(wanted, got, strict=True))


def test_special_tokens_named_beside_the_file(tmp_path: Path) -> None:
    tokenizer = word_tokenizer("<unk>", "<start>", "<end>", "<hole>", "a")
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match=r"no mask token; looked for \[MASK\], <mask>"):
        load_tokenizer(tmp_path)
    names = {
        "mask_token": {"content": "<hole>"},
        "cls_token": "<start>",
        "sep_token": "<end>",
        "pad_token": None,
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(names))
    vocab = load_tokenizer(tmp_path)
    assert (vocab.cls_id, vocab.sep_id, vocab.mask_id, vocab.pad_id) == (1, 2, 3, 2)
    assert np.flatnonzero(~vocab.special).tolist() == [4]


def test_what_is_no_tokenizer_is_the_users_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no tokenizer\.json there"):
        load_tokenizer(tmp_path / "bert-base-uncased")
    (tmp_path / "vocab.txt").write_text("a")
    with pytest.raises(UserError, match=r"the folder holds: vocab\.txt"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"is not a tokenizer\.json"):
        load_tokenizer(tmp_path)


def test_vocabulary_sizes_are_checked(tmp_path: Path, make_cfg, texts: list[str]) -> None:
    with pytest.raises(UserError, match="needs 261"):
        open_data(make_cfg(vocab_size=260))
    train_tokenizer(texts, 350).tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match=r"has 350 ids, but model\.vocab_size is 349"):
        open_data(make_cfg(vocab_size=349, tokenizer=str(tmp_path)))
    open_data(make_cfg(vocab_size=350, tokenizer=str(tmp_path))).close()


def test_a_corpus_too_small_for_the_vocabulary_is_said_and_goes_on(make_cfg, caplog) -> None:
    with caplog.at_level("INFO"):
        data = open_data(make_cfg(vocab_size=50000))
    assert 261 < data.vocab_size < 50000
    assert sum("the model keeps its table of 50000" in m for m in caplog.messages) == 1
    data.close()
