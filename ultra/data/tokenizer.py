"""The tokenizer: a given `tokenizer.json`, or byte-level BPE trained on the source.

Two ways from text to ids, never mixed: `encode_documents` treats the text as text, so the characters
"[MASK]" in a document stay characters; `encode_prompt` reads them as the token, as fill-mask needs.
"""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from ultra.errors import UserError

log = logging.getLogger(__name__)

SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")  # ids 0..4 of a tokenizer that we train
MIN_BPE_VOCAB = len(SPECIALS) + 256  # every byte is a token, so no text is unknown
ALPHABET = 1000  # characters that a word-piece tokenizer knows, the most frequent; BERT's number

Kind = Literal["bpe", "wordpiece", "unigram"]

# Names looked for in a given tokenizer: BERT's, RoBERTa's and T5's, GPT-NeoX's. First match wins.
_NAMES = {
    "pad": ("[PAD]", "<pad>", "<|padding|>", "<|pad|>"),
    "unk": ("[UNK]", "<unk>"),
    "cls": ("[CLS]", "<s>", "<cls>", "<bos>"),
    "sep": ("[SEP]", "</s>", "<sep>", "<eos>", "<|endoftext|>"),
    "mask": ("[MASK]", "<mask>", "<|mask|>"),
}


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer and what masking must know of it.

    special [size] bool: ids that are never masked, never predicted and never a random replacement (padding,
    unknown and every added special token). `size` is the largest id + 1.
    """

    tokenizer: Tokenizer
    pad_id: int
    cls_id: int
    sep_id: int
    mask_id: int
    unk_id: int | None
    size: int
    special: np.ndarray = field(repr=False)
    _literal: Tokenizer = field(repr=False)
    _forbidden: np.ndarray = field(repr=False)  # special, but for the unknown token, which any text may give

    def encode_documents(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text, int64, without [CLS] and [SEP] and without any special id but the unknown
        token.
        """
        encodings = self._literal.encode_batch_fast(list(texts), add_special_tokens=False)
        ids = [np.array(e.ids, dtype=np.int64) for e in encodings]
        # A vocabulary of word pieces may hold "[MASK]" as a piece of its own, out of reach of
        # encode_special_tokens.
        return [x[~self._forbidden[x]] for x in ids]

    def encode_prompt(self, text: str) -> list[int]:
        """Ids of the text with special tokens read as such, without an added [CLS] or [SEP]."""
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def to_json(self) -> str:
        """The content of tokenizer.json."""
        return str(self.tokenizer.to_str())

    def names(self) -> dict[str, str]:
        """Role: token, with which `vocabulary` makes an equal object of `to_json()`."""
        ids = {"pad": self.pad_id, "unk": self.unk_id, "cls": self.cls_id, "sep": self.sep_id, "mask": self.mask_id}
        return {role: str(self.tokenizer.id_to_token(index)) for role, index in ids.items() if index is not None}


def _find(tokenizer: Tokenizer, names: Iterable[str]) -> int | None:
    for name in names:
        index = tokenizer.token_to_id(name)
        if index is not None:
            return int(index)
    return None


def vocabulary(tokenizer: Tokenizer, *, where: str, names: dict[str, str] | None = None) -> Vocabulary:
    """Find the special tokens of `tokenizer`; `names` (role: token) come before the usual ones.

    Raises UserError, naming `where`, when it has no mask, start or end token. Without a padding token the end
    token stands for it: training and evaluation never pad.
    """
    tokenizer.no_truncation()
    tokenizer.no_padding()
    ids: dict[str, int | None] = {}
    for role, usual in _NAMES.items():
        given = [names[role]] if names and role in names else []
        ids[role] = _find(tokenizer, [*given, *usual])
    for role, what in (("mask", "mask"), ("cls", "start"), ("sep", "end")):
        if ids[role] is None:
            raise UserError(
                f"{where}: the tokenizer has no {what} token; looked for {', '.join(_NAMES[role])}. Add one, "
                "or leave training.tokenizer out to train a tokenizer on the data"
            )
    size = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
    special = np.zeros(size, dtype=bool)
    special[[i for i in ids.values() if i is not None]] = True
    special[[i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special]] = True
    if special.all():
        raise UserError(f"{where}: the tokenizer has no tokens besides special ones")
    literal = Tokenizer.from_str(tokenizer.to_str())
    literal.encode_special_tokens = True
    forbidden = special.copy()
    if ids["unk"] is not None:
        forbidden[ids["unk"]] = False
    cls_id, sep_id, mask_id = (int(ids[role] or 0) for role in ("cls", "sep", "mask"))
    pad_id = sep_id if ids["pad"] is None else int(ids["pad"])
    return Vocabulary(tokenizer, pad_id, cls_id, sep_id, mask_id, ids["unk"], size, special, literal, forbidden)


def load_tokenizer(path: str | Path) -> Vocabulary:
    """A `tokenizer.json`, or a folder that holds one (a checkpoint, an export, a Hugging Face model folder).

    Raises UserError when it is not there, cannot be read, or lacks a mask, start or end token.
    """
    path = Path(path).expanduser()
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        beside = ", ".join(sorted(p.name for p in path.iterdir())[:10]) if path.is_dir() else ""
        hint = f" (the folder holds: {beside or 'nothing'})" if path.is_dir() else ""
        raise UserError(
            f"training.tokenizer={path}: no tokenizer.json there{hint}. Give a local path; names of models "
            "on a hub are not looked up, and vocab.txt or SentencePiece models must be converted first"
        )
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the Rust side raises plain Exception for every fault of the file
        raise UserError(f"training.tokenizer={file} is not a tokenizer.json: {error}") from error
    return vocabulary(tokenizer, where=str(file), names=_named_roles(file.parent))


def _named_roles(folder: Path) -> dict[str, str]:
    """Special tokens that a Hugging Face folder names beside its tokenizer.json."""
    roles: dict[str, str] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        file = folder / name
        if not file.is_file():
            continue
        try:
            entries: Any = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{file} is not JSON: {error}") from error
        for role in _NAMES if isinstance(entries, dict) else ():
            token = entries.get(f"{role}_token")
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str):
                roles[role] = token
    return roles


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, kind: Kind = "bpe", *, field: str = "model.vocab_size"
) -> Vocabulary:
    """A tokenizer with SPECIALS as the first ids; a corpus too small for `vocab_size` gives fewer ids.

    bpe: byte-level BPE (Radford et al. 2019); decode(encode(x)) == x for any text, and deterministic in (texts,
    vocab_size). wordpiece: BERT's, cased (Devlin et al. 2019); white space and unknown characters are lost. unigram:
    SentencePiece's (Kudo 2018, arXiv:1804.10959) on NFKC-normalised text. The last two may break ties in another way
    each time. `field` is what messages call the size. Raises UserError when it is too small for the characters, and
    when there is no text.
    """
    if kind == "bpe" and vocab_size < MIN_BPE_VOCAB:
        raise UserError(
            f"{field}={vocab_size} is too small for a byte-level tokenizer, which needs "
            f"{MIN_BPE_VOCAB} (256 bytes and {len(SPECIALS)} specials); raise it, or give training.tokenizer"
        )
    stream = iter(texts)
    first = next(stream, None)
    if first is None:
        raise UserError("there is no text to train a tokenizer on")
    # lstrip: [MASK] stands for a word with the space before it, which is how words are tokens of bpe and unigram
    specials = [
        AddedToken(s, special=True, lstrip=s == "[MASK]" and kind != "wordpiece", normalized=False) for s in SPECIALS
    ]
    tokenizer, trainer = _KINDS[kind](vocab_size, specials)
    too_small = f"{field}={vocab_size} is too small for {kind} on this text: its characters and the specials alone are"
    try:
        tokenizer.train_from_iterator(itertools.chain([first], stream), trainer)
    except Exception as error:  # the Rust side raises plain Exception
        if "not large enough to contain all chars" in str(error):
            raise UserError(f"{too_small} more; raise it, or take bpe, which needs {MIN_BPE_VOCAB}") from None
        raise
    vocab = vocabulary(tokenizer, where="the trained tokenizer")
    if vocab.size > vocab_size:
        raise UserError(f"{too_small} {vocab.size}; raise it, or take bpe, which needs {MIN_BPE_VOCAB}")
    return vocab


def _bpe(size: int, specials: list[AddedToken]) -> tuple[Tokenizer, trainers.BpeTrainer]:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, trainers.BpeTrainer(
        vocab_size=size,
        min_frequency=2,  # a merge seen once only memorises its document
        special_tokens=specials,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),  # the set's order changes between runs
        show_progress=False,
    )


def _wordpiece(size: int, specials: list[AddedToken]) -> tuple[Tokenizer, trainers.WordPieceTrainer]:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer, trainers.WordPieceTrainer(
        vocab_size=size,
        min_frequency=2,
        special_tokens=specials,
        limit_alphabet=ALPHABET,
        show_progress=False,
    )


def _unigram(size: int, specials: list[AddedToken]) -> tuple[Tokenizer, trainers.UnigramTrainer]:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer, trainers.UnigramTrainer(
        vocab_size=size, special_tokens=specials, unk_token="[UNK]", show_progress=False
    )


_KINDS: dict[str, Callable[[int, list[AddedToken]], tuple[Tokenizer, Any]]] = {
    "bpe": _bpe,
    "wordpiece": _wordpiece,
    "unigram": _unigram,
}
