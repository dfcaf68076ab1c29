"""From a config to opened caches: sources, tokenizer, and for each source the folder of its tokens."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout

from ultra.data.cache import FORMAT, Filler, Index, Interrupted, TokenCache, token_dtype, wait_for, write_atomic
from ultra.data.encode import Tokenisers
from ultra.data.mixture import Mixture
from ultra.data.sources import Skipped, Source, open_sources
from ultra.data.tokenizer import Vocabulary, load_tokenizer, train_tokenizer
from ultra.errors import UserError

if TYPE_CHECKING:
    from ultra.config import RunConfig

log = logging.getLogger(__name__)

TOKENIZER_CHARS = 50_000_000  # text that trains a tokenizer, from the start of the source; more changes few merges


@dataclass(frozen=True)
class OpenedSource:
    """One source and its cache; `cache.max_documents` is its part of max_samples."""

    source: Source
    cache: TokenCache


@dataclass(frozen=True)
class Opened:
    vocab: Vocabulary
    mixture: Mixture
    sources: list[OpenedSource]

    @property
    def complete(self) -> bool:
        return all(opened.cache.complete for opened in self.sources)


def open_caches(cfg: RunConfig, *, should_stop: Callable[[], bool] = lambda: False, trust: bool = True) -> Opened:
    """Reads what tells the sources' content apart, trains the tokenizer if none is given or cached, and opens the
    caches, damaged units cut off. trust=False: caches and tokenizer are made anew.

    Any number of processes may call it on one cache_dir. Raises UserError and Interrupted.
    """
    t = cfg.training
    cache_dir = Path(t.cache_dir).expanduser()
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"training.cache_dir={cache_dir} cannot be created: {error}") from error
    sources = open_sources(cfg)
    mixture = Mixture([entry.weight for entry in t.sources] or [1.0])
    limits = mixture.counts(t.max_samples)
    for i, limit in enumerate(limits):
        if limit == 0:
            raise UserError(
                f"training.max_samples={t.max_samples} documents, shared out by weight, leave none to "
                f"training.sources[{i}] ({sources[i].name}); raise max_samples or its weight"
            )
    try:
        with _prepare_lock(cache_dir, should_stop):
            vocab, caches = _prepare(cfg, sources, mixture, limits, cache_dir, trust, should_stop)
    except PermissionError as error:
        raise UserError(f"training.cache_dir={cache_dir}: {error}") from error
    if vocab.size < cfg.model.vocab_size:
        log.info(
            "the tokenizer has %d ids; the model keeps its table of %d, whose other rows stay unused",
            vocab.size,
            cfg.model.vocab_size,
        )
    return Opened(vocab, mixture, [OpenedSource(*pair) for pair in zip(sources, caches, strict=True)])


def start_fillers(opened: Opened, workers: int, *, first_unit_only: bool = False) -> list[Filler | None]:
    """A running filler for each source whose cache is incomplete; `workers` processes tokenise for all of them.

    first_unit_only: for each source without a unit, to end with it.
    """

    def is_wanted(cache: TokenCache) -> bool:
        return not cache.complete and not (first_unit_only and cache.units)

    incomplete = [part for part in opened.sources if is_wanted(part.cache)]
    if not incomplete:
        return [None for _ in opened.sources]
    tokenisers = Tokenisers(opened.vocab, token_dtype(opened.vocab.size), workers, users=len(incomplete))
    fillers = [
        Filler(part.cache, part.source, tokenisers, limit=part.cache.documents_per_unit if first_unit_only else None)
        if is_wanted(part.cache)
        else None
        for part in opened.sources
    ]
    for filler in fillers:
        if filler is not None:
            filler.start()
    return fillers


def stop_fillers(fillers: list[Filler | None]) -> None:
    """Ask all, then wait for each."""
    for filler in fillers:
        if filler is not None:
            filler.ask_to_stop()
    for filler in fillers:
        if filler is not None:
            filler.stop()


def wait_for_first_unit(
    part: OpenedSource, filler: Filler | None, should_stop: Callable[[], bool], *, whole: bool = False
) -> None:
    """Raises UserError when the source ends without one."""
    cache = part.cache
    wait_for(cache, filler, lambda: cache.complete or bool(cache.units and not whole), should_stop)
    refuse_empty(part)


def refuse_empty(part: OpenedSource) -> None:
    """Raises UserError when the source gave no document."""
    if not part.cache.units:
        skipped = "; ".join(f"{where} ({count})" for where, count in list(part.cache.skipped.items())[:20])
        raise UserError(f"{part.source.name} holds no readable document" + (f"; skipped: {skipped}" if skipped else ""))


class _prepare_lock:
    """cache_dir/prepare.lock, waited for while polling should_stop."""

    def __init__(self, cache_dir: Path, should_stop: Callable[[], bool]) -> None:
        self._lock, self._should_stop = FileLock(cache_dir / "prepare.lock"), should_stop

    def __enter__(self) -> None:
        while True:
            if self._should_stop():
                raise Interrupted
            try:
                self._lock.acquire(timeout=0.2)
                return
            except Timeout:
                continue

    def __exit__(self, *exception: object) -> None:
        self._lock.release()


def _key(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _prepare(
    cfg: RunConfig,
    sources: list[Source],
    mixture: Mixture,
    limits: list[int],
    cache_dir: Path,
    trust: bool,
    should_stop: Callable[[], bool],
) -> tuple[Vocabulary, list[TokenCache]]:
    index, identities = Index(cache_dir), [_key(FORMAT, source.identity()) for source in sources]
    known = [index.get(identity) if trust else None for identity in identities]

    def open_all(fingerprints: list[str]) -> tuple[Vocabulary, list[TokenCache]]:
        vocab = _vocabulary(cfg, sources, fingerprints, mixture, limits, cache_dir, trust, should_stop)
        return vocab, [
            _open_cache(cfg, vocab, cache_dir, fingerprint, limit, trust)
            for fingerprint, limit in zip(fingerprints, limits, strict=True)
        ]

    fingerprints = [k if k is not None else s.fingerprint() for k, s in zip(known, sources, strict=True)]
    vocab, caches = open_all(fingerprints)
    # a cache that is to be filled further must be of what its source holds today
    current = [
        fingerprint if known[i] is None or caches[i].complete or sources[i].exact_identity else sources[i].fingerprint()
        for i, fingerprint in enumerate(fingerprints)
    ]
    if current != fingerprints:
        vocab, caches = open_all(current)
    for identity, before, fingerprint in zip(identities, known, current, strict=True):
        if before != fingerprint:
            index.put(identity, fingerprint)
    return vocab, caches


def _open_cache(
    cfg: RunConfig, vocab: Vocabulary, cache_dir: Path, fingerprint: str, max_documents: int, trust: bool
) -> TokenCache:
    units = cfg.training.dataset_batch_size
    # the text column is in the fingerprint; units are in the key because the order of samples follows them
    key = _key(FORMAT, fingerprint, vocab.to_json(), vocab.cls_id, vocab.sep_id, vocab.mask_id, units)
    cache = TokenCache(
        cache_dir / "tokens" / key,
        dtype=token_dtype(vocab.size),
        documents_per_unit=units,
        max_documents=max_documents,
    )
    cache.repair(start_over=not trust)
    cache.refresh()
    return cache


def _vocabulary(
    cfg: RunConfig,
    sources: list[Source],
    fingerprints: list[str],
    mixture: Mixture,
    limits: list[int],
    cache_dir: Path,
    trust: bool,
    should_stop: Callable[[], bool],
) -> Vocabulary:
    """The given tokenizer, or one trained on the sources' first documents and kept in the cache. Refuses one that the
    model's table cannot hold.
    """
    t, size = cfg.training, cfg.model.vocab_size
    if t.tokenizer is not None:
        vocab = load_tokenizer(t.tokenizer)
    else:
        if len(sources) == 1:
            key = _key(FORMAT, fingerprints[0], size, t.max_samples, TOKENIZER_CHARS)
        else:
            key = _key(FORMAT, fingerprints, size, limits, mixture.slots, TOKENIZER_CHARS)
        cached = cache_dir / "tokenizers" / f"{key}.json"
        known = _read_cached(cached) if trust else None
        if known is not None:
            vocab = known
        else:
            names = ", ".join(source.name for source in sources)
            log.info("training a byte-level BPE tokenizer of %d entries on %s", size, names)
            vocab = train_tokenizer(mixed_texts(sources, mixture.slots, limits, TOKENIZER_CHARS, should_stop), size)
            _write_cached(cached, vocab)
    if vocab.size > size:
        raise UserError(
            f"the tokenizer {t.tokenizer or ''} has {vocab.size} ids, but model.vocab_size is {size}; "
            f"set model.vocab_size to {vocab.size} or more"
        )
    return vocab


def checksum_file(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def _read_cached(path: Path) -> Vocabulary | None:
    """None also when its checksum does not fit: it is trained again then."""
    if not path.is_file():
        return None
    try:
        recorded = checksum_file(path).read_text(encoding="ascii").strip()
    except FileNotFoundError:  # written by an earlier version
        recorded = None
    except (OSError, UnicodeDecodeError):
        recorded = ""
    if recorded is not None and recorded != hashlib.sha256(path.read_bytes()).hexdigest():
        log.warning("%s is damaged; it is trained again", path)
        return None
    return load_tokenizer(path)


def _write_cached(path: Path, vocab: Vocabulary) -> None:
    content = vocab.to_json().encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    checksum_file(path).unlink(missing_ok=True)  # killed in between: no checksum, not a wrong one
    write_atomic(path, content)
    write_atomic(checksum_file(path), hashlib.sha256(content).hexdigest().encode())


def mixed_texts(
    sources: list[Source], weights: list[int], limits: list[int], chars: int, should_stop: Callable[[], bool]
) -> Iterator[str]:
    """Up to `chars` characters of the sources' first documents, `limits` of them at most, in proportion to `weights`:
    each next document comes from the source that is furthest behind. One that ends starts again, as in training, until
    all have ended once. Raises UserError when there is none, and Interrupted.
    """

    skipped = Skipped()

    def read(i: int) -> Iterator[str]:
        return (text for text, _ in itertools.islice(sources[i].documents(None, skipped), limits[i]))

    streams = [read(i) for i in range(len(sources))]
    taken = {i: 0 for i in range(len(sources))}  # characters of each that has any
    going = set(taken)  # read for the first time
    while going and sum(taken.values()) < chars:
        if should_stop():
            raise Interrupted
        i = min(taken, key=lambda i: (taken[i] / weights[i], i))
        text = next(streams[i], None)
        if text is not None:
            yield text
            taken[i] += len(text)
            continue
        going.discard(i)
        streams[i] = read(i)
        if not taken[i]:
            del taken[i]
    if not any(taken.values()):
        names = ", ".join(source.name for source in sources)
        raise UserError(f"{names} holds no readable document" + (f"; skipped: {skipped}" if skipped.counts else ""))
