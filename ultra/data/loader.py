"""From a config to batches: opens the corpus, then serves training and evaluation batches by number."""

from __future__ import annotations

import atexit
import dataclasses
import itertools
import logging
import signal
import weakref
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from ultra.data.cache import Filler, TokenCache, Unit
from ultra.data.corpus import Corpus
from ultra.data.masking import FIXED_MASKS, FRESH_MASKS, IGNORE, Masker
from ultra.data.mixture import Mixture
from ultra.data.prepare import OpenedSource, open_caches, start_fillers, stop_fillers, wait_for_first_unit
from ultra.data.tokenizer import Vocabulary
from ultra.data.windows import SampleOrder, Split, UnitWindows

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from ultra.config import RunConfig

log = logging.getLogger(__name__)

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


@dataclass(frozen=True)
class Place:
    """Where sample number `index` of the run lies: `window` of unit number `number` of source number `source`."""

    index: int
    source: int
    number: int
    unit: Unit
    window: int

    @property
    def fixed_key(self) -> int:
        """For masks that never change: below 2^12 sources, 2^20 units each (MAX_UNITS), 2^32 windows each."""
        return (self.source << 52) + (self.number << 32) + self.window


class BatchMaker:
    """Places -> Batch: a pure function, run here or in a DataLoader worker."""

    def __init__(
        self,
        parts: list[tuple[TokenCache, Split]],
        masker: Masker,
        *,
        validation: bool,
        length: int,
        packed: bool,
        fixed: bool,
    ) -> None:
        self._parts, self._masker = parts, masker
        self._validation, self._length, self._packed, self._fixed = validation, length, packed, fixed
        self._opened: dict[tuple[int, Unit], tuple[UnitWindows, np.ndarray]] = {}

    def __call__(self, places: list[Place]) -> Batch:
        rows: list[np.ndarray] = []
        borders, cu, keys, at = [0], [np.zeros(1, dtype=np.int64)], [], 0
        for place in places:
            windows, tokens = self._open(place.source, place.unit)
            ids, inner = windows.read(tokens, place.window)
            rows.append(ids)
            cu += [inner + at, np.array([at + len(ids)])]
            at += len(ids)
            borders.append(at)
            keys.append(place.fixed_key if self._fixed else place.index)
        ids = np.concatenate(rows).astype(np.int64)
        inputs, labels = self._masker(ids, np.array(borders), keys)
        cu_seqlens = np.concatenate(cu)
        return Batch(
            input_ids=torch.from_numpy(inputs)[None],
            labels=torch.from_numpy(labels)[None],
            cu_seqlens=torch.from_numpy(cu_seqlens.astype(np.int32)),
            max_seqlen=int(np.diff(cu_seqlens).max()),
            num_labelled=int((labels != IGNORE).sum()),
            first_sample=places[0].index,
        )

    def _open(self, source: int, unit: Unit) -> tuple[UnitWindows, np.ndarray]:
        if (source, unit) not in self._opened:
            if len(self._opened) >= 4 * len(self._parts):  # an epoch's end and the next one's start, with room
                del self._opened[next(iter(self._opened))]
            cache, split = self._parts[source]
            windows = UnitWindows(cache, unit, split, self._validation, self._length, self._packed)
            self._opened[source, unit] = (windows, cache.tokens(unit))
        return self._opened[source, unit]


class _Batches(Dataset[Batch]):
    """The map-style face of a BatchMaker: the index is the list of places itself."""

    def __init__(self, make: BatchMaker) -> None:
        self._make = make

    def __getitem__(self, places: list[Place]) -> Batch:
        return self._make(places)


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
    """The opened corpora of a run, one per source."""

    def __init__(self, cfg: RunConfig, vocab: Vocabulary, mixture: Mixture, corpora: list[Corpus]) -> None:
        self.tokenizer: Tokenizer = vocab.tokenizer
        self.vocabulary = vocab
        self.mask_id, self.pad_id = vocab.mask_id, vocab.pad_id
        self.cls_id, self.sep_id = vocab.cls_id, vocab.sep_id
        self.vocab_size = vocab.size
        self.corpora, self.mixture = corpora, mixture
        self._cfg = cfg.training
        self._told = False
        # workers ignore SIGTERM, by which multiprocessing would end them at exit: close() must come first
        self._open_iterators: weakref.WeakSet[Generator[list[Batch], None, None]] = weakref.WeakSet()
        atexit.register(_close, weakref.ref(self))

    @property
    def waited_s(self) -> float:
        """Time spent waiting for caches that are still being filled."""
        return sum(corpus.waited_s for corpus in self.corpora)

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

    def _micro_batches(self, first: int, rank: int, world: int) -> Iterator[list[Place]]:
        size, orders = self._cfg.batch_size, [SampleOrder(self._cfg.seed) for _ in self.corpora]
        for micro in itertools.count(first):
            start = (micro * world + rank) * size
            yield [self._locate(orders, n) for n in range(start, start + size)]

    def _locate(self, orders: list[SampleOrder], n: int) -> Place:
        source, inside = self.mixture.locate(n)
        corpus = self.corpora[source]
        sample = corpus.locate(orders[source], inside)
        return Place(n, source, sample.unit, corpus.cache.units[sample.unit], sample.window)

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
            [(corpus.cache, corpus.split) for corpus in self.corpora],
            masker,
            validation=validation,
            length=t.max_length,
            packed=t.pack_sequences,
            fixed=fixed,
        )

    def sample(self, n: int) -> Batch:
        """Training sample number n alone, as it stands in its batch."""
        orders = [SampleOrder(self._cfg.seed) for _ in self.corpora]
        return self._maker(validation=False)([self._locate(orders, n)])

    # ---------------------------------------------------------------- evaluation

    def eval_batches(self) -> Iterator[Batch]:
        """The first `eval_samples` validation windows (all, if fewer), in the corpus' order, with masks
        that never change: 15 %, 80/10/10, own seed. batch_size windows a batch, the last one maybe fewer.
        Of several sources each gives its weight's part, or all that it has.

        Waits until the cache holds enough of them, so that the set does not depend on how far the filling
        has come.
        """
        counts = self._eval_counts()
        streams = [corpus.validation() for corpus in self.corpora]
        places: list[Place] = []
        for n in itertools.count():
            if len(places) == sum(counts):
                break
            source, inside = self.mixture.locate(n)
            if inside < counts[source]:
                places.append(Place(len(places), source, *next(streams[source])))
        make = self._maker(validation=True)
        for start in range(0, len(places), self._cfg.batch_size):
            yield make(places[start : start + self._cfg.batch_size])

    def eval_windows(self) -> int:
        """How many windows eval_batches() gives; waits as it does."""
        return sum(self._eval_counts())

    def _eval_counts(self) -> list[int]:
        wanted = self.mixture.counts(self._cfg.eval_samples)
        pairs = list(zip(self.corpora, wanted, strict=True))
        counts = [min(share, corpus.validation_windows(share)) for corpus, share in pairs]
        if len(counts) > 1 and not self._told:
            self._told = True
            each = ", ".join(f"{n} of {share} from {c.name}" for (c, share), n in zip(pairs, counts, strict=True))
            short = any(n < share for n, share in zip(counts, wanted, strict=True))
            log.log(
                logging.WARNING if short else logging.INFO,
                "validation windows: %s%s",
                each,
                "; raise val_fraction, or add text, where that is less than its weight's part" if short else "",
            )
        return counts

    def train_token_counts(self, *, wait: bool = True) -> np.ndarray:
        """How often each id occurs in the training documents, int64 [vocab_size]; special ids, which are
        never predicted, count 0. Several sources count by weight: scaled so that their totals have its proportions and
        none becomes smaller. Waits for the whole cache, or counts what it holds so far."""
        if wait:
            for corpus in self.corpora:
                corpus.wait(lambda cache=corpus.cache: cache.complete)  # type: ignore[misc]
        counts = [corpus.token_counts(self.vocab_size) for corpus in self.corpora]
        for each in counts:
            each[self.vocabulary.special] = 0
        if len(counts) == 1:
            return counts[0]
        # training tokens per unit of weight
        rates = [each.sum() / share for each, share in zip(counts, self.mixture.shares, strict=True)]
        scaled = [each * (max(rates) / rate) for each, rate in zip(counts, rates, strict=True) if rate]
        return np.rint(np.sum(scaled, axis=0)).astype(np.int64)

    def close(self) -> None:
        """Stop the workers and the background filling; what that has finished stays."""
        for batches in list(self._open_iterators):
            batches.close()
        stop_fillers([corpus.filler for corpus in self.corpora])


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
    # every rank but one takes what rank 0 has just made, also when that one was told to make it anew
    opened = open_caches(cfg, should_stop=should_stop, trust=t.prefer_local_cache or rank > 0)
    fillers = start_fillers(opened, t.num_workers)
    try:
        corpora = []
        for part, filler in zip(opened.sources, fillers, strict=True):
            wait_for_first_unit(part, filler, should_stop, whole=not t.stream_local_parquet)
            corpora.append(make_corpus(cfg, part, filler, should_stop))
        data = CorpusData(cfg, opened.vocab, opened.mixture, corpora)
    except BaseException:
        stop_fillers(fillers)
        raise
    for part, share in zip(opened.sources, opened.mixture.shares, strict=True):
        log.info(
            "%s%s: %d documents%s, vocabulary %d, cache %s",
            part.source.name,
            f" ({share:.1%} of the training windows)" if len(corpora) > 1 else "",
            sum(u.documents for u in part.cache.units),
            "" if part.cache.complete else " so far",
            opened.vocab.size,
            part.cache.folder,
        )
    return data


def make_corpus(cfg: RunConfig, part: OpenedSource, filler: Filler | None, should_stop: Callable[[], bool]) -> Corpus:
    t = cfg.training
    return Corpus(
        part.source.name,
        part.cache,
        filler,
        should_stop,
        val_fraction=t.val_fraction,
        length=t.max_length,
        packed=t.pack_sequences,
    )
