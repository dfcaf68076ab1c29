"""From a config to batches: opens the corpus, then serves training and evaluation batches by number."""

from __future__ import annotations

import atexit
import dataclasses
import hashlib
import itertools
import json
import logging
import signal
import weakref
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from torch.utils.data import DataLoader, Dataset

from ultra.data.cache import FORMAT, Filler, Index, Interrupted, TokenCache, Unit, wait_for, write_atomic
from ultra.data.masking import FIXED_MASKS, FRESH_MASKS, IGNORE, Masker
from ultra.data.sources import Skipped, Source, open_source
from ultra.data.tokenizer import Vocabulary, load_tokenizer, train_tokenizer
from ultra.data.windows import Sample, SampleOrder, Split, UnitWindows, make_split
from ultra.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from ultra.config import RunConfig

log = logging.getLogger(__name__)

TOKENIZER_CHARS = 50_000_000  # text that trains a tokenizer, from the start of the source; more changes few merges
EVAL_SEED = 0x756C747261  # evaluation masks are the same for every run and seed
EVAL_PROBABILITY = 0.15  # BERT's rate, whatever the run trains with, so that curves compare
EVAL_STRATEGY = (0.8, 0.1, 0.1)


@dataclass(frozen=True)
class Batch:
    """Sequences end to end, without padding.

    input_ids [1,T] int64; labels [1,T] int64, the original id where it is to be predicted and -100
    elsewhere; cu_seqlens [S+1] int32 borders, 0 first and T last; max_seqlen the longest; num_labelled the
    labels that are not -100; first_sample the number of the first window.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    cu_seqlens: torch.Tensor
    max_seqlen: int
    num_labelled: int
    first_sample: int

    def to(self, device: torch.device | str, non_blocking: bool = True) -> Batch:
        return dataclasses.replace(
            self,
            input_ids=self.input_ids.to(device, non_blocking=non_blocking),
            labels=self.labels.to(device, non_blocking=non_blocking),
            cu_seqlens=self.cu_seqlens.to(device, non_blocking=non_blocking),
        )

    def __reduce__(self) -> tuple[Any, ...]:
        """Labels as positions and ids, int32 throughout, by value: a fifth of the bytes, and no shared-memory
        file a tensor, when a worker hands over a batch."""
        ids, labels = self.input_ids[0].numpy(), self.labels[0].numpy()
        at = np.flatnonzero(labels != IGNORE)
        packed = (ids.astype(np.int32), at.astype(np.int32), labels[at].astype(np.int32))
        return _unpack, (*packed, self.cu_seqlens.numpy(), self.max_seqlen, self.first_sample)


def _unpack(
    ids: np.ndarray, at: np.ndarray, targets: np.ndarray, cu_seqlens: np.ndarray, longest: int, first: int
) -> Batch:
    labels = np.full(len(ids), IGNORE, dtype=np.int64)
    labels[at] = targets
    wide = torch.from_numpy(ids.astype(np.int64))[None]
    return Batch(wide, torch.from_numpy(labels)[None], torch.from_numpy(cu_seqlens), longest, len(at), first)


class BatchMaker:
    """(samples, their units) -> Batch: a pure function, run here or in a DataLoader worker."""

    def __init__(
        self,
        cache: TokenCache,
        split: Split,
        masker: Masker,
        *,
        validation: bool,
        length: int,
        packed: bool,
        fixed: bool,
    ) -> None:
        self._cache, self._split, self._masker = cache, split, masker
        self._validation, self._length, self._packed, self._fixed = validation, length, packed, fixed
        self._opened: dict[Unit, tuple[UnitWindows, np.ndarray]] = {}

    def __call__(self, samples: list[tuple[Sample, Unit]]) -> Batch:
        rows: list[np.ndarray] = []
        borders, cu, keys, at = [0], [np.zeros(1, dtype=np.int64)], [], 0
        for sample, unit in samples:
            windows, tokens = self._open(unit)
            ids, inner = windows.read(tokens, sample.window)
            rows.append(ids)
            cu += [inner + at, np.array([at + len(ids)])]
            at += len(ids)
            borders.append(at)
            keys.append(sample.unit * 2**32 + sample.window if self._fixed else sample.index)
        ids = np.concatenate(rows).astype(np.int64)
        inputs, labels = self._masker(ids, np.array(borders), keys)
        cu_seqlens = np.concatenate(cu)
        return Batch(
            input_ids=torch.from_numpy(inputs)[None],
            labels=torch.from_numpy(labels)[None],
            cu_seqlens=torch.from_numpy(cu_seqlens.astype(np.int32)),
            max_seqlen=int(np.diff(cu_seqlens).max()),
            num_labelled=int((labels != IGNORE).sum()),
            first_sample=samples[0][0].index,
        )

    def _open(self, unit: Unit) -> tuple[UnitWindows, np.ndarray]:
        if unit not in self._opened:
            if len(self._opened) >= 4:  # an epoch's end and the next one's start, with room
                del self._opened[next(iter(self._opened))]
            windows = UnitWindows(self._cache, unit, self._split, self._validation, self._length, self._packed)
            self._opened[unit] = (windows, self._cache.tokens(unit))
        return self._opened[unit]


class _Batches(Dataset[Batch]):
    """The map-style face of a BatchMaker: the index is the list of samples itself."""

    def __init__(self, make: BatchMaker) -> None:
        self._make = make

    def __getitem__(self, samples: list[tuple[Sample, Unit]]) -> Batch:
        return self._make(samples)


def _identity(batch: Any) -> Any:
    return batch


def _leave_signals_to_the_parent(worker: int) -> None:
    # Ctrl-C and a scheduler's SIGTERM reach the whole process group; the trainer finishes its step and
    # needs its batches
    for name in ("SIGINT", "SIGTERM", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


def _close(reference: weakref.ref[CorpusData]) -> None:
    data = reference()
    if data is not None:
        data.close()


class CorpusData:
    """An opened corpus. `waited_s` is the time spent waiting for a cache that is still being filled."""

    def __init__(
        self,
        cfg: RunConfig,
        vocab: Vocabulary,
        cache: TokenCache,
        filler: Filler | None,
        should_stop: Callable[[], bool],
    ) -> None:
        t = cfg.training
        self.tokenizer: Tokenizer = vocab.tokenizer
        self.vocabulary = vocab
        self.mask_id, self.pad_id = vocab.mask_id, vocab.pad_id
        self.cls_id, self.sep_id = vocab.cls_id, vocab.sep_id
        self.vocab_size = vocab.size
        self.waited_s = 0.0
        self._cfg, self._cache, self._filler, self._should_stop = t, cache, filler, should_stop
        self._split = make_split(t.val_fraction, cache.index(cache.units[0])[1])
        self._windows = lru_cache(maxsize=None)(self._count)
        self._counts = np.empty(0, dtype=np.int64)
        # workers ignore SIGTERM, by which multiprocessing would end them at exit: close() must come first
        self._open_iterators: weakref.WeakSet[Generator[list[Batch], None, None]] = weakref.WeakSet()
        atexit.register(_close, weakref.ref(self))

    # ---------------------------------------------------------------- training

    def train_batches(self, first_step: int, *, rank: int = 0, world_size: int = 1) -> Iterator[list[Batch]]:
        """The micro-batches of step first_step, first_step + 1, ... without end.

        Micro-batch m of step s on `rank` holds samples [((s·accum + m)·world + rank)·batch_size, +
        batch_size): a function of the config and these numbers, whatever the number of workers and the
        state of the cache. Raises Interrupted when should_stop() comes true while it waits for the cache,
        and what stopped the filling.
        """
        batches = self._generate(first_step, rank, world_size)
        self._open_iterators.add(batches)
        return batches

    def _generate(self, first_step: int, rank: int, world_size: int) -> Generator[list[Batch], None, None]:
        accum = self._cfg.gradient_accumulation_steps
        indices = self._micro_batches(first_step * accum, rank, world_size)
        make = self._maker(validation=False)
        if self._cfg.dataloader_workers == 0:
            batches = map(make, indices)
        else:
            batches = iter(
                DataLoader(
                    _Batches(make),
                    batch_size=None,
                    sampler=indices,  # type: ignore[arg-type]  # an iterable without a length will do
                    num_workers=self._cfg.dataloader_workers,
                    collate_fn=_identity,
                    worker_init_fn=_leave_signals_to_the_parent,
                    generator=torch.Generator(),  # else it draws from the global one, and dropout shifts
                )
            )
        while True:
            yield list(itertools.islice(batches, accum))

    def _micro_batches(self, first: int, rank: int, world: int) -> Iterator[list[tuple[Sample, Unit]]]:
        size, order = self._cfg.batch_size, SampleOrder(self._cfg.seed)
        for micro in itertools.count(first):
            start = (micro * world + rank) * size
            yield [self._locate(order, n) for n in range(start, start + size)]

    def _locate(self, order: SampleOrder, n: int) -> tuple[Sample, Unit]:
        sample = order.locate(n, self._train_counts(), self._cache.complete)
        if sample is None:
            self._wait(lambda: self._cache.complete or int(self._train_counts().sum()) > n)
            if not self._train_counts().any():
                raise UserError(
                    f"no training documents: training.val_fraction={self._cfg.val_fraction} leaves all "
                    f"{sum(u.documents for u in self._cache.units)} documents to validation"
                )
            sample = order.locate(n, self._train_counts(), self._cache.complete)
            assert sample is not None
        return sample, self._cache.units[sample.unit]

    def _train_counts(self) -> np.ndarray:
        """Training windows of each unit that exists so far."""
        units = self._cache.units
        if len(self._counts) != len(units):
            self._counts = np.array([self._windows(unit)[0] for unit in units], dtype=np.int64)
        return self._counts

    def _count(self, unit: Unit) -> tuple[int, int]:
        """(training windows, validation windows) of a unit."""
        return self._unit_windows(unit, False).count, self._unit_windows(unit, True).count

    def _unit_windows(self, unit: Unit, validation: bool) -> UnitWindows:
        t = self._cfg
        return UnitWindows(self._cache, unit, self._split, validation, t.max_length, t.pack_sequences)

    def _maker(self, *, validation: bool) -> BatchMaker:
        t = self._cfg
        fixed = validation or not t.dynamic_masking
        masker = Masker(
            self.vocabulary,
            seed=EVAL_SEED if validation else t.seed,
            purpose=FIXED_MASKS if fixed else FRESH_MASKS,
            probability=EVAL_PROBABILITY if validation else t.mlm_probability,
            strategy=EVAL_STRATEGY if validation else t.mask_strategy,
        )
        return BatchMaker(
            self._cache,
            self._split,
            masker,
            validation=validation,
            length=t.max_length,
            packed=t.pack_sequences,
            fixed=fixed,
        )

    def _wait(self, ready: Callable[[], bool]) -> None:
        self.waited_s += wait_for(self._cache, self._filler, ready, self._should_stop)

    # ---------------------------------------------------------------- evaluation

    def eval_batches(self) -> Iterator[Batch]:
        """The first `eval_samples` validation windows (all, if fewer), in the corpus' order, with masks
        that never change: 15 %, 80/10/10, own seed. batch_size windows a batch, the last one maybe fewer.

        Waits until the cache holds enough of them, so that the set does not depend on how far the filling
        has come.
        """
        wanted = self.eval_windows()
        windows = (
            (number, window, unit)
            for number, unit in enumerate(self._cache.units)
            for window in range(self._windows(unit)[1])
        )
        samples = [
            (Sample(i, number, window), unit)
            for i, (number, window, unit) in enumerate(itertools.islice(windows, wanted))
        ]
        make = self._maker(validation=True)
        for start in range(0, len(samples), self._cfg.batch_size):
            yield make(samples[start : start + self._cfg.batch_size])

    def eval_windows(self) -> int:
        """How many windows eval_batches() gives; waits as it does."""
        wanted = self._cfg.eval_samples

        def there() -> int:
            return sum(self._windows(unit)[1] for unit in self._cache.units)

        self._wait(lambda: self._cache.complete or there() >= wanted)
        return min(wanted, there())

    def train_token_counts(self, *, wait: bool = True) -> np.ndarray:
        """How often each id occurs in the training documents, int64 [vocab_size]; special ids, which are
        never predicted, count 0. Waits for the whole cache, or counts what it holds so far."""
        if wait:
            self._wait(lambda: self._cache.complete)
        counts = np.zeros(self.vocab_size, dtype=np.int64)
        for unit in self._cache.units:
            offsets, hashes = self._cache.index(unit)
            training = np.repeat(~self._split.is_validation(hashes), np.diff(offsets))
            tokens = self._cache.tokens(unit)[: len(training)]
            counts += np.bincount(tokens[training], minlength=self.vocab_size)
        counts[self.vocabulary.special] = 0
        return counts

    def close(self) -> None:
        """Stop the workers and the background filling; what that has finished stays."""
        for batches in list(self._open_iterators):
            batches.close()
        if self._filler is not None:
            self._filler.stop()


# -------------------------------------------------------------------- opening


def open_data(
    cfg: RunConfig, *, should_stop: Callable[[], bool] = lambda: False, rank: int = 0, world_size: int = 1
) -> CorpusData:
    """Source, tokenizer and cache of a run. Returns once the first unit is there, or, with
    stream_local_parquet off, the whole cache. Any number of processes may call it on one cache_dir; one of
    them fills.

    Raises UserError for what the user must mend, and Interrupted when should_stop() comes true on the way.
    """
    t = cfg.training
    cache_dir = Path(t.cache_dir).expanduser()
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"training.cache_dir={cache_dir} cannot be created: {error}") from error
    source = open_source(cfg)
    # every rank but one takes what rank 0 has just made, also when that one was told to make it anew
    trust = t.prefer_local_cache or rank > 0
    with _prepare_lock(cache_dir, should_stop):
        vocab, cache = _prepare(cfg, source, cache_dir, trust, should_stop)
    if vocab.size < cfg.model.vocab_size:
        log.info(
            "the tokenizer has %d ids; the model keeps its table of %d, whose other rows stay unused",
            vocab.size,
            cfg.model.vocab_size,
        )
    filler = None
    if not cache.complete:
        filler = Filler(cache, source, vocab, workers=t.num_workers)
        filler.start()
    try:
        wait_for(cache, filler, lambda: cache.complete or bool(cache.units and t.stream_local_parquet), should_stop)
        if not cache.units:
            skipped = "; ".join(f"{where} ({count})" for where, count in list(cache.skipped.items())[:20])
            raise UserError(f"{source.name} holds no readable document" + (f"; skipped: {skipped}" if skipped else ""))
        data = CorpusData(cfg, vocab, cache, filler, should_stop)
    except BaseException:
        if filler is not None:
            filler.stop()
        raise
    log.info(
        "%s: %d documents%s, vocabulary %d, cache %s",
        source.name,
        sum(u.documents for u in cache.units),
        "" if cache.complete else " so far",
        vocab.size,
        cache.folder,
    )
    return data


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
    cfg: RunConfig, source: Source, cache_dir: Path, trust: bool, should_stop: Callable[[], bool]
) -> tuple[Vocabulary, TokenCache]:
    index, identity = Index(cache_dir), _key(FORMAT, source.identity())
    known = index.get(identity) if trust else None
    if known is not None:
        vocab, cache = _open_cache(cfg, source, cache_dir, known, trust, should_stop)
        if cache.complete or source.exact_identity:
            return vocab, cache
    fingerprint = source.fingerprint()
    vocab, cache = _open_cache(cfg, source, cache_dir, fingerprint, trust, should_stop)
    index.put(identity, fingerprint)
    return vocab, cache


def _open_cache(
    cfg: RunConfig,
    source: Source,
    cache_dir: Path,
    fingerprint: str,
    trust: bool,
    should_stop: Callable[[], bool],
) -> tuple[Vocabulary, TokenCache]:
    t = cfg.training
    vocab = _vocabulary(cfg, source, cache_dir, fingerprint, trust, should_stop)
    if vocab.size > cfg.model.vocab_size:
        raise UserError(
            f"the tokenizer {t.tokenizer or ''} has {vocab.size} ids, but model.vocab_size is "
            f"{cfg.model.vocab_size}; set model.vocab_size to {vocab.size} or more"
        )
    # the text column is in the fingerprint; units are in the key because the order of samples follows them
    key = _key(FORMAT, fingerprint, vocab.to_json(), vocab.cls_id, vocab.sep_id, vocab.mask_id, t.dataset_batch_size)
    cache = TokenCache(
        cache_dir / "tokens" / key,
        vocab_size=vocab.size,
        documents_per_unit=t.dataset_batch_size,
        max_documents=t.max_samples,
    )
    cache.repair(start_over=not trust)
    cache.refresh()
    return vocab, cache


def _vocabulary(
    cfg: RunConfig,
    source: Source,
    cache_dir: Path,
    fingerprint: str,
    trust: bool,
    should_stop: Callable[[], bool],
) -> Vocabulary:
    """The given tokenizer, or one trained on the source's first max_samples documents and kept in the
    cache.
    """
    t = cfg.training
    if t.tokenizer is not None:
        return load_tokenizer(t.tokenizer)
    key = _key(FORMAT, fingerprint, cfg.model.vocab_size, t.max_samples, TOKENIZER_CHARS)
    path = cache_dir / "tokenizers" / f"{key}.json"
    if trust and path.is_file():
        return load_tokenizer(path)
    log.info("training a byte-level BPE tokenizer of %d entries on %s", cfg.model.vocab_size, source.name)

    def texts() -> Iterator[str]:
        chars = 0
        for text, _ in itertools.islice(source.documents(None, Skipped()), t.max_samples):
            if should_stop():
                raise Interrupted
            yield text
            chars += len(text)
            if chars >= TOKENIZER_CHARS:
                return

    vocab = train_tokenizer(texts(), cfg.model.vocab_size)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, vocab.to_json().encode())
    return vocab
