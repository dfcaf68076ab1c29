"""Token shards on disk, keyed by content and filled in units that become visible one at a time.

    cache_dir/index.json              source identity -> fingerprint, so that known content is not read again
    cache_dir/tokenizers/<key>.json   trained tokenizers, each with its checksum in <key>.json.sha256
    cache_dir/tokens/<key>/           one corpus under one tokenizer
        unit-00000.bin                "[CLS] document [SEP]" end to end; uint16 if the vocabulary allows
        unit-00000.idx.npy            uint64 [documents, 2]: end offset in tokens, hash of the text
        manifest.json                 the units that count, with checksums; rewritten atomically after each
        fill.lock                     held by the process that fills

A file that the manifest does not name does not exist: a process killed at any moment loses the unit it
worked on, and the next one goes on at that unit's raw cursor. Every process reads through the manifest
only, so one fills for all.

manifest.json and index.json carry a checksum of themselves, and `ultra cache verify` compares all of them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from ultra.data.encode import Encoded, Tokenisers
from ultra.data.sources import Cursor, Skipped, Source
from ultra.errors import UserError

log = logging.getLogger(__name__)

FORMAT = 1  # raise when units, documents or their order come out differently
POLL_S = 0.05
CHUNK_DOCUMENTS = 256  # documents handed to one tokenising process at a time ...
CHUNK_CHARS = 1 << 20  # ... or fewer, when they are long


class Interrupted(Exception):
    """should_stop() became true while data was being prepared or waited for."""


@dataclass(frozen=True)
class Unit:
    """`documents` texts in one pair of files; `cursor` is the source's position after the last.

    characters of the texts, and the sha256 of (.bin, .idx.npy): 0 and empty in caches of earlier versions.
    """

    name: str
    documents: int
    tokens: int
    cursor: Cursor
    characters: int = 0
    sha256: tuple[str, ...] = ()

    @staticmethod
    def read(entry: dict[str, Any]) -> Unit:
        """From the manifest."""
        return Unit(**{**entry, "cursor": tuple(entry["cursor"]), "sha256": tuple(entry.get("sha256", ()))})

    @property
    def files(self) -> tuple[str, str]:
        return f"{self.name}.bin", f"{self.name}.idx.npy"


def token_dtype(vocab_size: int) -> np.dtype:
    return np.dtype(np.uint16 if vocab_size < 65536 else np.uint32)


def write_atomic(path: Path, content: bytes) -> None:
    """All of `content` or the old file, also after a power cut."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    with open(temporary, "wb") as f:
        f.write(content)
        f.flush()
        os.fsync(f.fileno())
    os.replace(temporary, path)


def seal(content: dict[str, Any]) -> bytes:
    """`content` as JSON that carries its own checksum."""
    checksum = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    return json.dumps({**content, "sha256": checksum}, indent=1).encode()


def unseal(data: bytes) -> dict[str, Any]:
    """The content. Raises ValueError when it is no JSON object or its checksum, if it has one, does not fit."""
    content = json.loads(data)
    if not isinstance(content, dict):
        raise ValueError("not a JSON object")
    checksum = content.pop("sha256", None)
    if checksum is not None and checksum != hashlib.sha256(json.dumps(content).encode()).hexdigest():
        raise ValueError("its checksum does not fit its content")
    return content


class TokenCache:
    """Reads one corpus' folder; cheap to pickle, safe to use from several processes."""

    def __init__(self, folder: Path, *, dtype: np.dtype, documents_per_unit: int, max_documents: int) -> None:
        self.folder, self.documents_per_unit, self.max_documents = folder, documents_per_unit, max_documents
        self.dtype = dtype
        self.units: tuple[Unit, ...] = ()  # usable ones, the last cut to max_documents
        self.complete = False  # no unit will follow for max_documents
        self.skipped: dict[str, int] = {}

    @property
    def manifest(self) -> Path:
        return self.folder / "manifest.json"

    def read_manifest(self) -> dict[str, Any]:
        try:
            return unseal(self.manifest.read_bytes())
        except FileNotFoundError:
            return {"format": FORMAT, "units": [], "exhausted": False, "skipped": {}}
        except ValueError as error:
            raise UserError(f"{self.manifest} is damaged ({error}); delete {self.folder} to fill it again") from error

    def refresh(self) -> None:
        """See the units written since. Units never vanish from view: a refill writes the same content
        again.
        """
        content = self.read_manifest()
        found = [Unit.read(entry) for entry in content["units"]]
        usable: list[Unit] = []
        left = self.max_documents
        for unit in found:
            # a unit cut short by some run's max_samples is filled up later, so it counts only where it is
            # the last for this run too
            whole = unit.documents == self.documents_per_unit or content["exhausted"] or unit.documents >= left
            if left <= 0 or not whole:
                break
            usable.append(dataclasses.replace(unit, documents=min(unit.documents, left)))
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
        write_atomic(self.manifest, seal(content))

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
    one of them takes over when the holder dies. `tokenisers` is shared by the fillers of a run.

    documents and tokens count what the cache holds, the unit in work included; new_tokens those of this filler.
    """

    def __init__(self, cache: TokenCache, source: Source, tokenisers: Tokenisers, *, limit: int | None = None) -> None:
        """limit: stop after so many documents, if that is less than the cache's max_documents."""
        super().__init__(name="ultra-cache-fill", daemon=True)
        self.error: BaseException | None = None
        self.documents = self.tokens = self.new_tokens = 0
        self.cursor: Cursor | None = None
        self._cache = TokenCache(
            cache.folder,
            dtype=cache.dtype,
            documents_per_unit=cache.documents_per_unit,
            max_documents=min(cache.max_documents, limit or cache.max_documents),
        )
        self._source, self._tokenisers = source, tokenisers
        self._stop_asked = threading.Event()

    def ask_to_stop(self) -> None:
        self._stop_asked.set()

    def stop(self) -> None:
        """Ask for the end; the unit in work is given up. Waits for it, but not for a hanging network."""
        self._stop_asked.set()
        if self.is_alive():
            self.join(timeout=10.0)
        if self.is_alive():  # a tokenising process that does not answer
            self._tokenisers.close()

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
        finally:
            self._tokenisers.release()

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
        self.documents, self.tokens, self.cursor = documents, sum(u["tokens"] for u in content["units"]), cursor
        if cursor is not None:
            log.info("cache %s: going on after %d documents", cache.folder.name[:12], documents)
        content["source"] = self._source.name
        if not cache.manifest.exists():  # so that a folder without one is damaged, not just begun
            cache.write_manifest(content)
        skipped = Skipped()
        before = dict(content["skipped"])
        rows = self._source.documents(cursor, skipped)
        start = time.monotonic()
        while documents < cache.max_documents and not content["exhausted"]:
            wanted = min(cache.documents_per_unit, cache.max_documents - documents)
            unit = self._write_unit(len(content["units"]), rows, wanted, cursor or ())
            content["exhausted"] = unit.documents < wanted
            if unit.documents:
                content["units"].append(asdict(unit))
            documents, cursor = documents + unit.documents, unit.cursor
            content["skipped"] = dict(before)
            for (where, reason), count in skipped.counts.items():
                key = f"{where}: {reason}"
                content["skipped"][key] = content["skipped"].get(key, 0) + count
            cache.write_manifest(content)
        log.info(
            "cache %s: %d documents, %d new tokens in %.1f s",
            cache.folder.name[:12],
            documents,
            self.new_tokens,
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
        end, characters, ends, hashes = 0, 0, [np.empty(0, np.int64)], [np.empty(0, np.uint64)]
        binary = self._cache.folder / f"{name}.bin"
        temporary = binary.with_name(f".{binary.name}.tmp")
        checksum = hashlib.sha256()
        with open(temporary, "wb") as file:
            for encoded, texts, after in self._tokenised(rows, wanted):
                file.write(encoded.tokens)
                checksum.update(encoded.tokens)
                ends.append(end + np.cumsum(encoded.sizes))
                hashes.append(encoded.hashes)
                added = int(encoded.sizes.sum())
                end, characters, cursor = end + added, characters + sum(map(len, texts)), after
                self.documents += len(texts)
                self.tokens, self.new_tokens, self.cursor = self.tokens + added, self.new_tokens + added, cursor
            file.flush()
            os.fsync(file.fileno())
        table = np.column_stack([np.concatenate(ends).astype(np.uint64), np.concatenate(hashes)])
        if not len(table):
            temporary.unlink()
            return Unit(name, 0, 0, cursor)
        content = io.BytesIO()
        np.save(content, table, allow_pickle=False)
        table_file = self._cache.folder / f"{name}.idx.npy"
        os.replace(temporary, binary)
        write_atomic(table_file, content.getvalue())
        checksums = checksum.hexdigest(), hashlib.sha256(content.getvalue()).hexdigest()
        return Unit(name, len(table), end, cursor, characters, checksums)

    def _tokenised(
        self, rows: Iterator[tuple[str, Cursor]], wanted: int
    ) -> Iterator[tuple[Encoded, list[str], Cursor]]:
        """Chunks in the source's order, with their texts and the cursor after them, while the tokenisers work ahead."""
        pending: deque[tuple[Future[Encoded], list[str], Cursor]] = deque()
        for texts, cursor in _chunks(rows, wanted):
            if self._stop_asked.is_set():
                raise Interrupted
            pending.append((self._tokenisers.submit(texts), texts, cursor))
            if len(pending) > self._tokenisers.ahead:
                future, taken, after = pending.popleft()
                yield future.result(), taken, after
        for future, taken, after in pending:
            yield future.result(), taken, after


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
        write_atomic(self._path, seal(self._read() | {identity: fingerprint}))

    def _read(self) -> dict[str, str]:
        try:
            return unseal(self._path.read_bytes())
        except FileNotFoundError:
            return {}
        except ValueError:
            log.warning("%s is damaged; sources are hashed again", self._path)
            return {}
