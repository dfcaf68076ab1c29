"""Token shards on disk, keyed by content and filled in units that become visible one at a time.

    cache_dir/index.json              source identity -> fingerprint, so that known content is not read again
    cache_dir/tokenizers/<key>.json   trained tokenizers
    cache_dir/tokens/<key>/           one corpus under one tokenizer
        unit-00000.bin                "[CLS] document [SEP]" end to end; uint16 if the vocabulary allows
        unit-00000.idx.npy            uint64 [documents, 2]: end offset in tokens, hash of the text
        manifest.json                 the units that count; rewritten atomically after each
        fill.lock                     held by the process that fills

A file that the manifest does not name does not exist: a process killed at any moment loses the unit it
worked on, and the next one goes on at that unit's raw cursor. Every process reads through the manifest
only, so one fills for all.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from ultra.data.sources import Cursor, Skipped, Source
from ultra.data.tokenizer import Vocabulary
from ultra.errors import UserError

log = logging.getLogger(__name__)

FORMAT = 1  # raise when units, documents or their order come out differently
POLL_S = 0.05
CHUNK_DOCUMENTS = 256  # documents handed to one tokenising thread at a time ...
CHUNK_CHARS = 1 << 20  # ... or fewer, when they are long


class Interrupted(Exception):
    """should_stop() became true while data was being prepared or waited for."""


@dataclass(frozen=True)
class Unit:
    """`documents` texts in one pair of files; `cursor` is the source's position after the last."""

    name: str
    documents: int
    tokens: int
    cursor: Cursor


def text_hash(text: str) -> int:
    """64 bits of BLAKE2b of the text: its place in the train/validation split, whatever stands around it."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def write_atomic(path: Path, content: bytes) -> None:
    """All of `content` or the old file, also after a power cut."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    with open(temporary, "wb") as f:
        f.write(content)
        f.flush()
        os.fsync(f.fileno())
    os.replace(temporary, path)


class TokenCache:
    """Reads one corpus' folder; cheap to pickle, safe to use from several processes."""

    def __init__(self, folder: Path, *, vocab_size: int, documents_per_unit: int, max_documents: int) -> None:
        self.folder, self.documents_per_unit, self.max_documents = folder, documents_per_unit, max_documents
        self.dtype = np.dtype(np.uint16 if vocab_size < 65536 else np.uint32)
        self.units: tuple[Unit, ...] = ()  # usable ones, the last cut to max_documents
        self.complete = False  # no unit will follow for max_documents
        self.skipped: dict[str, int] = {}

    @property
    def manifest(self) -> Path:
        return self.folder / "manifest.json"

    def read_manifest(self) -> dict[str, Any]:
        try:
            content = json.loads(self.manifest.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {"format": FORMAT, "units": [], "exhausted": False, "skipped": {}}
        except ValueError as error:
            raise UserError(f"{self.manifest} is damaged ({error}); delete {self.folder} to fill it again") from error
        return dict(content)

    def refresh(self) -> None:
        """See the units written since. Units never vanish from view: a refill writes the same content
        again.
        """
        content = self.read_manifest()
        found = [Unit(u["name"], u["documents"], u["tokens"], tuple(u["cursor"])) for u in content["units"]]
        usable: list[Unit] = []
        left = self.max_documents
        for unit in found:
            # a unit cut short by some run's max_samples is filled up later, so it counts only where it is
            # the last for this run too
            whole = unit.documents == self.documents_per_unit or content["exhausted"] or unit.documents >= left
            if left <= 0 or not whole:
                break
            usable.append(Unit(unit.name, min(unit.documents, left), unit.tokens, unit.cursor))
            left -= unit.documents
        complete = left <= 0 or (content["exhausted"] and len(usable) == len(found))
        if len(usable) > len(self.units) or complete:
            self.units, self.complete, self.skipped = tuple(usable), complete, content["skipped"]

    def index(self, unit: Unit) -> tuple[np.ndarray, np.ndarray]:
        """(offsets int64 [documents + 1] in tokens, hashes uint64 [documents])."""
        table = np.load(self.folder / f"{unit.name}.idx.npy", allow_pickle=False)[: unit.documents]
        offsets = np.zeros(len(table) + 1, dtype=np.int64)
        offsets[1:] = table[:, 0]
        return offsets, np.ascontiguousarray(table[:, 1])

    def tokens(self, unit: Unit) -> np.ndarray:
        """The unit's tokens, mapped, not read."""
        path = self.folder / f"{unit.name}.bin"
        if path.stat().st_size == 0:  # an empty file cannot be mapped
            return np.zeros(0, dtype=self.dtype)
        return np.asarray(np.memmap(path, dtype=self.dtype, mode="r"))

    def write_manifest(self, content: dict[str, Any]) -> None:
        """Call with fill.lock held."""
        write_atomic(self.manifest, json.dumps(content, indent=1).encode())

    def lock(self) -> FileLock:
        self.folder.mkdir(parents=True, exist_ok=True)
        return FileLock(self.folder / "fill.lock")

    def repair(self, *, start_over: bool) -> None:
        """Before first use: forget units whose files lack the promised sizes and all that follow, or every
        unit.

        A process that holds the lock has just done so itself, so then there is nothing to do.
        """
        lock = self.lock()
        try:
            lock.acquire(timeout=0)
        except Timeout:
            return
        try:
            content = self.read_manifest()
            units = content["units"]
            keep = 0
            while not start_over and keep < len(units) and self._sound(units[keep]):
                keep += 1
            if keep < len(units) or start_over:
                if not start_over:
                    log.warning("%s in %s is damaged; filling again from there", units[keep]["name"], self.folder)
                self.write_manifest({**content, "units": units[:keep], "exhausted": False, "skipped": {}})
        finally:
            lock.release()

    def _sound(self, unit: dict[str, Any]) -> bool:
        try:
            binary = (self.folder / f"{unit['name']}.bin").stat().st_size
            table = np.load(self.folder / f"{unit['name']}.idx.npy", mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError):
            return False
        return bool(binary == unit["tokens"] * self.dtype.itemsize and table.shape == (unit["documents"], 2))


class Filler(threading.Thread):
    """Fills a cache in the background until it covers `max_documents` or the source ends.

    Any number of processes may run one on the same cache: the lock's holder works, the others watch, and
    one of them takes over when the holder dies. `workers` threads tokenise (the Rust tokenizer releases the
    GIL), so no process is forked and the result is the same for any number.
    """

    def __init__(self, cache: TokenCache, source: Source, vocab: Vocabulary, *, workers: int) -> None:
        super().__init__(name="ultra-cache-fill", daemon=True)
        self.error: BaseException | None = None
        self._cache = TokenCache(
            cache.folder,
            vocab_size=vocab.size,
            documents_per_unit=cache.documents_per_unit,
            max_documents=cache.max_documents,
        )
        self._source, self._vocab, self._workers = source, vocab, max(1, workers)
        self._stop_asked = threading.Event()

    def stop(self) -> None:
        """Ask for the end; the unit in work is given up. Waits for it, but not for a hanging network."""
        self._stop_asked.set()
        if self.is_alive():
            self.join(timeout=10.0)

    def run(self) -> None:
        try:
            lock = self._cache.lock()
            while not self._stop_asked.is_set():
                self._cache.refresh()
                if self._cache.complete:
                    return
                try:
                    lock.acquire(timeout=0)
                except Timeout:
                    self._stop_asked.wait(10 * POLL_S)
                    continue
                try:
                    self._fill()
                finally:
                    lock.release()
                return
        except Interrupted:
            return
        except BaseException as error:  # handed to the thread that waits for units
            self.error = error

    def _fill(self) -> None:
        # without this, one call would spread over all cores whatever `workers` says, and every later fork
        # would warn
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        cache = self._cache
        content = cache.read_manifest()
        documents = sum(u["documents"] for u in content["units"])
        if content["exhausted"] or documents >= cache.max_documents:
            return
        if content["units"] and content["units"][-1]["documents"] < cache.documents_per_unit:
            documents -= content["units"].pop()["documents"]  # cut by a smaller max_samples: read it again, whole
        cursor = tuple(content["units"][-1]["cursor"]) if content["units"] else None
        if cursor is not None:
            log.info("cache %s: going on after %d documents", cache.folder.name[:12], documents)
        skipped = Skipped()
        before = dict(content["skipped"])
        rows = self._source.documents(cursor, skipped)
        start, tokens = time.monotonic(), 0
        while documents < cache.max_documents and not content["exhausted"]:
            wanted = min(cache.documents_per_unit, cache.max_documents - documents)
            unit = self._write_unit(len(content["units"]), rows, wanted, cursor or ())
            content["exhausted"] = unit.documents < wanted
            if unit.documents:
                content["units"].append(asdict(unit))
            documents, tokens, cursor = documents + unit.documents, tokens + unit.tokens, unit.cursor
            content["skipped"] = dict(before)
            for (where, reason), count in skipped.counts.items():
                key = f"{where}: {reason}"
                content["skipped"][key] = content["skipped"].get(key, 0) + count
            cache.write_manifest(content)
        log.info(
            "cache %s: %d documents, %d new tokens in %.1f s",
            cache.folder.name[:12],
            documents,
            tokens,
            time.monotonic() - start,
        )
        if skipped.counts:
            log.warning("skipped %d rows or parts of %s: %s", skipped.counts.total(), self._source.name, skipped)

    def _write_unit(self, number: int, rows: Iterator[tuple[str, Cursor]], wanted: int, cursor: Cursor) -> Unit:
        """Tokenise up to `wanted` documents into the files of one unit; fewer only where the source ends."""
        whole = wanted == self._cache.documents_per_unit
        # the number of documents in the name of a cut unit: its longer successor must not overwrite what
        # others read
        name = f"unit-{number:05d}" + ("" if whole else f"-{wanted}")
        cls, sep = self._vocab.cls_id, self._vocab.sep_id
        end, ends, hashes = 0, [], []
        binary = self._cache.folder / f"{name}.bin"
        temporary = binary.with_name(f".{binary.name}.tmp")
        with open(temporary, "wb") as file:
            for texts, after in self._tokenised(rows, wanted):
                cursor = after
                for ids, digest in texts:
                    if len(ids):  # a text that encodes to nothing keeps its place and takes no tokens
                        file.write(np.concatenate(([cls], ids, [sep])).astype(self._cache.dtype).tobytes())
                        end += len(ids) + 2
                    ends.append(end)
                    hashes.append(digest)
            file.flush()
            os.fsync(file.fileno())
        if not ends:
            temporary.unlink()
            return Unit(name, 0, 0, cursor)
        table = np.column_stack([np.array(ends, dtype=np.uint64), np.array(hashes, dtype=np.uint64)])
        table_file = binary.with_name(f".{name}.idx.tmp.npy")
        with open(table_file, "wb") as file:
            np.save(file, table, allow_pickle=False)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, binary)
        os.replace(table_file, self._cache.folder / f"{name}.idx.npy")
        return Unit(name, len(ends), end, cursor)

    def _tokenised(
        self, rows: Iterator[tuple[str, Cursor]], wanted: int
    ) -> Iterator[tuple[list[tuple[np.ndarray, int]], Cursor]]:
        """Chunks of (ids, hash) in the source's order, while `workers` threads work ahead."""

        def encode(texts: list[str]) -> list[tuple[np.ndarray, int]]:
            return list(zip(self._vocab.encode_documents(texts), map(text_hash, texts), strict=True))

        with ThreadPoolExecutor(self._workers, thread_name_prefix="ultra-tokenise") as pool:
            pending: deque[tuple[Future[list[tuple[np.ndarray, int]]], Cursor]] = deque()
            for texts, cursor in _chunks(rows, wanted):
                if self._stop_asked.is_set():
                    pool.shutdown(wait=True, cancel_futures=True)
                    raise Interrupted
                pending.append((pool.submit(encode, texts), cursor))
                if len(pending) > 2 * self._workers:
                    future, at = pending.popleft()
                    yield future.result(), at
            for future, at in pending:
                yield future.result(), at


def _chunks(rows: Iterator[tuple[str, Cursor]], wanted: int) -> Iterator[tuple[list[str], Cursor]]:
    """Up to `wanted` texts in chunks, each with the cursor after it; takes no row beyond them."""
    texts: list[str] = []
    chars = 0
    cursor: Cursor = ()
    for taken in range(1, wanted + 1):
        row = next(rows, None)
        if row is None:
            break
        text, cursor = row
        texts.append(text)
        chars += len(text)
        if len(texts) == CHUNK_DOCUMENTS or chars >= CHUNK_CHARS or taken == wanted:
            yield texts, cursor
            texts, chars = [], 0
    if texts:
        yield texts, cursor


def wait_for(
    cache: TokenCache,
    filler: Filler | None,
    ready: Callable[[], bool],
    should_stop: Callable[[], bool],
) -> float:
    """Refresh `cache` until `ready()`; returns the seconds waited. Raises the filler's error, and
    Interrupted.
    """
    start = time.monotonic()
    while True:
        if should_stop():
            raise Interrupted
        ended = filler is None or not filler.is_alive()  # asked before looking, so its last unit is not missed
        cache.refresh()
        if ready():
            return time.monotonic() - start
        if filler is not None and filler.error is not None:
            raise filler.error
        if ended:
            raise RuntimeError(f"filling {cache.folder} ended with {len(cache.units)} units, and more are needed")
        time.sleep(POLL_S)


class Index:
    """cache_dir/index.json: what content a source identity (paths, sizes, mtimes) had."""

    def __init__(self, cache_dir: Path) -> None:
        self._path = cache_dir / "index.json"

    def get(self, identity: str) -> str | None:
        return self._read().get(identity)

    def put(self, identity: str, fingerprint: str) -> None:
        """Call with the folder's prepare lock held."""
        write_atomic(self._path, json.dumps(self._read() | {identity: fingerprint}, indent=1).encode())

    def _read(self) -> dict[str, str]:
        try:
            return dict(json.loads(self._path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return {}
        except ValueError:
            log.warning("%s is damaged; sources are hashed again", self._path)
            return {}
