"""`ultra tokenizer train`: a tokenizer.json from a folder, a file, the built-in corpus, or the sources of a config."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from ultra.data.cache import write_atomic
from ultra.data.mixture import Mixture
from ultra.data.prepare import TOKENIZER_CHARS, mixed_texts
from ultra.data.sources import BuiltinSource, Fields, FileSource, Source, open_sources
from ultra.data.tokenizer import Kind, train_tokenizer
from ultra.errors import UserError

SAMPLE = 1000  # documents on which the result is measured


def run(
    where: str,
    overrides: Sequence[str],
    *,
    kind: Kind,
    vocab_size: int | None,
    output: Path,
    text_column: str | None,
    force: bool,
    should_stop: Callable[[], bool] = lambda: False,
) -> str:
    """Trains, writes `output` at the end and at once, and says what came out. Raises UserError, and Interrupted.

    where: "builtin", a YAML file or preset, else a folder or file of text. vocab_size None: the config's, or 50,000.
    """
    _check_output(output, force)
    sources, weights, limit, size = _sources(where, overrides, text_column)
    mixture = Mixture(weights)
    kept: list[str] = []
    count = characters = 0

    def texts() -> Iterator[str]:
        nonlocal count, characters
        limits = [max(1, share) for share in mixture.counts(limit)]
        for text in mixed_texts(sources, mixture.slots, limits, TOKENIZER_CHARS, should_stop):
            count, characters = count + 1, characters + len(text)
            if len(kept) < SAMPLE:
                kept.append(text)
            yield text

    for source in sources:
        source.fingerprint()  # a wrong column or an unreadable file is told before the work
    vocab = train_tokenizer(texts(), vocab_size or size, kind, field="--vocab-size")
    try:
        write_atomic(output, vocab.to_json().encode())
    except OSError as error:
        raise UserError(f"--output {output}: {error.strerror}") from error
    tokens = sum(len(ids) for ids in vocab.encode_documents(kept))
    shown = sum(map(len, kept))
    lines = [
        f"{kind} tokenizer of {vocab.size:,} ids from {count:,} documents, {characters:,} characters of "
        + ", ".join(source.name for source in sources),
        f"{tokens / shown:.3f} tokens per character on the first {len(kept):,} documents",
        f"written to {output}; use it with training.tokenizer={output} model.vocab_size={vocab.size}",
    ]
    if vocab.size < (vocab_size or size):
        lines.insert(1, f"the text gives no more: {vocab_size or size:,} ids were asked for")
    return "\n".join(lines)


def _check_output(output: Path, force: bool) -> None:
    if output.is_dir():
        raise UserError(f"--output {output} is a folder; name a file, such as {output / 'tokenizer.json'}")
    if output.exists() and not force:
        raise UserError(f"--output {output} exists and is kept; name another file, or add --force")
    if not output.parent.is_dir():
        raise UserError(f"--output {output}: there is no folder {output.parent}")
    if not os.access(output.parent, os.W_OK):
        raise UserError(f"--output {output}: no permission to write in {output.parent}")


def _sources(
    where: str, overrides: Sequence[str], text_column: str | None
) -> tuple[list[Source], list[float], int, int]:
    """(sources, weights, documents at most, vocabulary size)."""
    from ultra.config import RunConfig, load_config, presets

    path = Path(where).expanduser()
    if path.suffix in (".yaml", ".yml") or (where in presets() and not path.exists()):
        if text_column is not None:
            raise UserError("--text-column goes with a folder or file; of a config override training.text_column")
        cfg = load_config(where, overrides)
        t = cfg.training
        weights = [entry.weight for entry in t.sources] or [1.0]
        return open_sources(cfg), weights, t.max_samples, cfg.model.vocab_size
    if overrides:
        raise UserError(f"{overrides[0]}: overrides go with a config, and SOURCE {where} is none")
    defaults = RunConfig()
    if where == "builtin":
        if text_column is not None:
            raise UserError("--text-column: the built-in corpus has no columns")
        source: Source = BuiltinSource()
    else:
        source = FileSource(path, text_column, Fields("SOURCE", "--text-column"))
    return [source], [1.0], defaults.training.max_samples, defaults.model.vocab_size
