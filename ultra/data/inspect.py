"""`ultra data inspect`: what a config's data looks like before hours are spent on it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from ultra.data.loader import Batch, CorpusData, make_corpus
from ultra.data.masking import IGNORE
from ultra.data.prepare import open_caches, start_fillers, stop_fillers, wait_for_first_unit

if TYPE_CHECKING:
    from ultra.config import RunConfig
    from ultra.config.training import TrainingConfig
    from ultra.data.corpus import Corpus
    from ultra.data.tokenizer import Vocabulary

PERCENTILES = (1, 5, 25, 50, 75, 95, 99)
REASONS = 10  # of skipped rows that are listed


def inspect(cfg: RunConfig, samples: int) -> str:
    """Counts over what the caches hold; a source without a cache has its first unit filled, and no more.

    samples: so many training samples are shown as the trainer would get them. Raises UserError.
    """
    t = cfg.training
    opened = open_caches(cfg)  # what is cached is looked at, also where training would make it anew
    fillers = start_fillers(opened, t.num_workers, first_unit_only=True)
    try:
        for part, filler in zip(opened.sources, fillers, strict=True):
            wait_for_first_unit(part, filler, lambda: False)
    finally:
        stop_fillers(fillers)
    corpora = [make_corpus(cfg, part, None, lambda: False) for part in opened.sources]
    data = CorpusData(cfg, opened.vocab, opened.mixture, corpora)
    lines: list[str] = []
    for corpus, share in zip(corpora, opened.mixture.shares, strict=True):
        lines += [*describe(corpus, opened.vocab, t, share if len(corpora) > 1 else None), ""]
    for n in range(samples):
        source, inside = opened.mixture.locate(n)
        corpus = corpora[source]
        if inside >= corpus.train_counts().sum() and not corpus.cache.complete:
            lines.append(f"no sample {n}: it lies in a unit of {corpus.name} that is not cached; `ultra data build`")
            break
        where = f" from {corpus.name}" if len(corpora) > 1 else ""
        lines += [*show(n, where, data.sample(n), opened.vocab), ""]
    return "\n".join(lines).rstrip()


def describe(corpus: Corpus, vocab: Vocabulary, t: TrainingConfig, share: float | None) -> Iterator[str]:
    """The lines about one source; `share` of the training windows, when there are several."""
    units = corpus.cache.units
    tables = [corpus.cache.index(unit) for unit in units]
    hashes = np.concatenate([table for _, table in tables])
    sizes = np.concatenate([np.diff(offsets) for offsets, _ in tables])
    lengths = sizes[sizes > 0] - 2  # without [CLS] and [SEP]
    held_out = int(corpus.split.is_validation(hashes).sum())
    extent = "all" if corpus.cache.complete else f"the first {len(units)} unit{'s' if len(units) > 1 else ''}"
    yield corpus.name + ("" if share is None else f" ({share:.1%} of the training windows)")
    yield f"  looked at      {extent}; cache {corpus.cache.folder}"
    yield f"  documents      {len(hashes):,}: {len(hashes) - held_out:,} training, {held_out:,} validation"
    yield f"  duplicates     {1 - len(np.unique(hashes)) / len(hashes):.2%} of the documents repeat another one exactly"
    if len(lengths) < len(sizes):
        yield f"  empty          {len(sizes) - len(lengths):,} documents encode to no token"
    skipped = sorted(corpus.cache.skipped.items(), key=lambda item: -item[1])
    yield f"  skipped        {sum(count for _, count in skipped):,} rows"
    for reason, count in skipped[:REASONS]:
        yield f"                   {count:,} {reason}"
    if len(skipped) > REASONS:
        yield f"                   and {len(skipped) - REASONS} more places"
    if not len(lengths):
        return
    yield f"  tokens         {lengths.sum():,} in documents; [CLS] and [SEP] add {2 * len(lengths) / sizes.sum():.2%}"
    yield f"  a document     mean {lengths.mean():,.0f} tokens, longest {lengths.max():,}; percentiles " + ", ".join(
        f"{p} %: {value:,.0f}" for p, value in zip(PERCENTILES, np.percentile(lengths, PERCENTILES), strict=True)
    )
    yield f"  tokens/char    {tokens_per_character(corpus)}"
    counts = corpus.token_counts(vocab.size, validation=True)
    ordinary = ~vocab.special
    yield (
        f"  vocabulary     {int((counts[ordinary] > 0).sum()):,} of {int(ordinary.sum()):,} ordinary ids occur; "
        f"{int(vocab.special.sum())} special"
    )
    if vocab.unk_id is not None:
        yield f"  unknown        {counts[vocab.unk_id] / lengths.sum():.3%} of the tokens"
    windows = [corpus.windows(unit, validation=False) for unit in units]
    count = sum(w.count for w in windows)
    validation = sum(corpus.windows(unit, validation=True).count for unit in units)
    yield f"  windows        {count:,} training, {validation:,} validation, of {t.max_length} tokens"
    if count:
        yield f"  packing        {packing(count, sum(w.tokens for w in windows), lengths, t)}"
    if count and corpus.cache.complete:
        drawn = t.steps * t.batch_size * t.gradient_accumulation_steps * (share or 1)
        yield f"  epochs         {drawn / count:,.2f} in {t.steps:,} steps of one process"


def tokens_per_character(corpus: Corpus) -> str:
    tokens = characters = 0
    for unit in corpus.cache.units:
        offsets, _ = corpus.cache.index(unit)
        if unit.characters and offsets[-1] == unit.tokens:  # known, and not cut by max_samples
            characters += unit.characters
            tokens += unit.tokens - 2 * int((np.diff(offsets) > 0).sum())
    return f"{tokens / characters:.3f}" if characters else "not recorded in this cache"


def packing(count: int, tokens: int, lengths: np.ndarray, t: TrainingConfig) -> str:
    """What of the windows is waste. tokens of the training documents, [CLS] and [SEP] included."""
    pieces = -(-lengths // (t.max_length - 2))
    padding = 1 - (lengths.sum() + 2 * pieces.sum()) / (pieces.sum() * t.max_length)
    if not t.pack_sequences:
        return f"off: a window is a piece of one document, not padded; to {t.max_length} it would waste {padding:.1%}"
    repeated = max(0.0, 1 - tokens / (count * t.max_length))
    return (
        f"no padding; {repeated:.2%} of the tokens come twice, where a unit's last window starts early "
        f"(one document a sequence, padded to {t.max_length}, would waste {padding:.1%})"
    )


def show(n: int, where: str, batch: Batch, vocab: Vocabulary) -> Iterator[str]:
    """One sample: what the model reads, and what it is to say at the chosen places."""
    ids, labels = batch.input_ids[0].numpy(), batch.labels[0].numpy()
    at = np.flatnonzero(labels != IGNORE)
    masked, kept = int((ids[at] == vocab.mask_id).sum()), int((ids[at] == labels[at]).sum())
    yield (
        f"sample {n}{where}: {len(ids)} tokens, {len(batch.cu_seqlens) - 1} documents or parts; {len(at)} predicted: "
        f"{masked} [MASK], {len(at) - masked - kept} random, {kept} unchanged"
    )
    yield vocab.tokenizer.decode(ids.tolist(), skip_special_tokens=False)
    yield "predict: " + " ".join(repr(vocab.tokenizer.decode([int(label)])) for label in labels[at])
