"""Texts to the bytes of the cache, by processes that work ahead.

A process is `ultra.data.worker`, started as a program of its own: nothing is forked, and the user's `__main__` is not
imported again. It knows numpy and `tokenizers` alone (0.2 s to start), answers one request after the other over pipes,
and ends when its standard input does, so also when this process is killed. What it computes is a function of the texts,
so the result is the same for any number of processes, and the texts of one that died are given to a new one.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from typing import IO

import numpy as np

from ultra.data.tokenizer import Vocabulary
from ultra.errors import UserError

log = logging.getLogger(__name__)

IN_PROCESS_CHARS = 4_000_000  # tokenised by threads here: a small corpus is done before a process would have started
CHARS_PER_PROCESS = (
    2_000_000  # text that has to follow for each further process: a second's work against 0.2 s of start
)
START = "import sys; sys.path[:] = sys.argv[1:]; from ultra.data.worker import main; main()"


@dataclass(frozen=True)
class Encoded:
    """Documents as the cache stores them.

    tokens: "[CLS] document [SEP]" end to end, in the cache's dtype; sizes int64 [documents], tokens of each with the
    two, 0 where a text encodes to nothing; hashes uint64 [documents].
    """

    tokens: bytes
    sizes: np.ndarray
    hashes: np.ndarray


def text_hash(text: str) -> int:
    """64 bits of BLAKE2b of the text: its place in the train/validation split, whatever stands around it."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def encode(vocab: Vocabulary, texts: Sequence[str], dtype: np.dtype) -> Encoded:
    cls, sep = np.array([vocab.cls_id]), np.array([vocab.sep_id])
    parts = [part for ids in vocab.encode_documents(texts) for part in ((cls, ids, sep) if len(ids) else (ids,))]
    sizes = np.array([len(ids) for ids in parts if ids is not cls and ids is not sep], dtype=np.int64)
    sizes[sizes > 0] += 2
    tokens = np.concatenate(parts).astype(dtype).tobytes() if parts else b""
    return Encoded(tokens, sizes, np.array([text_hash(text) for text in texts], dtype=np.uint64))


# ---------------------------------------------------------------- messages: a count, the lengths, the parts


def write_message(file: IO[bytes], *parts: bytes) -> None:
    file.write(struct.pack(f"<{1 + len(parts)}Q", len(parts), *map(len, parts)))
    for part in parts:
        file.write(part)
    file.flush()


def read_message(file: IO[bytes]) -> list[bytes]:
    """Raises EOFError when the other side has gone."""
    (count,) = struct.unpack("<Q", _exactly(file, 8))
    return [_exactly(file, length) for length in struct.unpack(f"<{count}Q", _exactly(file, 8 * count))]


def _exactly(file: IO[bytes], count: int) -> bytes:
    data = file.read(count)
    if len(data) < count:
        raise EOFError
    return data


class Died(Exception):
    """A tokenising process has gone; the text says how."""


_starting = threading.Lock()


@cache
def _no_fork_while_starting() -> None:
    # a child forked between the making of a pipe and the start of the process would keep both ends open, and nobody
    # would see that the process has died
    if hasattr(os, "register_at_fork"):
        release = _starting.release
        os.register_at_fork(before=_starting.acquire, after_in_parent=release, after_in_child=release)


@contextmanager
def _signals_blocked() -> Iterator[None]:
    """A process started inside inherits the block, so a signal to the group cannot end it before it ignores them."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    former = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, former)


class Process:
    """One tokenising process. Not for two threads at a time."""

    def __init__(self, vocab: Vocabulary, dtype: np.dtype) -> None:
        path = [os.path.abspath(entry) for entry in sys.path]  # "" is the folder of now, not of later
        threads = {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"}
        _no_fork_while_starting()
        with _starting, _signals_blocked():
            self._popen = subprocess.Popen(
                [sys.executable, "-c", START, *path],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env={**os.environ, **threads},
            )
        assert self._popen.stdin is not None and self._popen.stdout is not None
        self._to, self._from = self._popen.stdin, self._popen.stdout
        self._setup = {"tokenizer": vocab.to_json(), "names": vocab.names(), "dtype": dtype.str}
        self.pid = self._popen.pid

    def __call__(self, texts: Sequence[str]) -> Encoded:
        """Raises Died, and RuntimeError with what went wrong over there."""
        lengths = np.array([len(text) for text in texts], dtype=np.int64)
        try:
            if self._setup:
                write_message(self._to, json.dumps(self._setup).encode())
                self._setup = {}
            write_message(self._to, lengths.tobytes(), "".join(texts).encode())
            answer = read_message(self._from)
        except (OSError, ValueError, EOFError):  # ValueError: closed here, by another thread
            self.close()
            code = self._popen.returncode
            raise Died(f"signal {-code}" if code < 0 else f"exit code {code}") from None
        if len(answer) == 1:
            raise RuntimeError(f"a tokenising process failed:\n{answer[0].decode()}")
        tokens, sizes, hashes = answer
        return Encoded(tokens, np.frombuffer(sizes, np.int64), np.frombuffer(hashes, np.uint64))

    def close(self) -> None:
        if self._popen.poll() is None:
            self._popen.kill()  # it ignores the gentle signals, and holds nothing that could be lost
        self._popen.wait()
        for file in (self._to, self._from):
            with suppress(OSError):
                file.close()


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Tokenisers:
    """`submit(texts)` for any number of fillers; `workers` processes at most, and no more than cores.

    The first IN_PROCESS_CHARS are encoded by as many threads here, and processes are started one by one as more text
    comes. workers=0: one thread here, for all. `users` is the number of fillers, each of which calls `release` at its
    end; the last one ends the processes.
    """

    def __init__(self, vocab: Vocabulary, dtype: np.dtype, workers: int, *, users: int = 1) -> None:
        self._vocab, self._dtype, self._users = vocab, dtype, users
        self.workers = min(workers, cores())
        self.ahead = 2 * max(1, self.workers)  # chunks in work or waiting while one is written
        self._threads = ThreadPoolExecutor(max(1, self.workers), thread_name_prefix="ultra-tokenise")
        self._chars, self._closed = 0, False
        self._changed = threading.Condition()
        self._idle: list[Process] = []
        self._running: set[Process] = set()

    def submit(self, texts: Sequence[str]) -> Future[Encoded]:
        with self._changed:
            position = self._chars
            self._chars += sum(map(len, texts))
        if self.workers == 0 or position < IN_PROCESS_CHARS:
            return self._threads.submit(encode, self._vocab, texts, self._dtype)
        return self._threads.submit(self._elsewhere, texts, 1 + (position - IN_PROCESS_CHARS) // CHARS_PER_PROCESS)

    def _elsewhere(self, texts: Sequence[str], allowed: int) -> Encoded:
        died: list[str] = []
        while len(died) < 2:
            process = self._borrow(min(self.workers, allowed))
            try:
                encoded = process(texts)
            except Died as error:
                self._give_back(process, alive=False)
                died.append(str(error))
                if not self._closed:
                    log.warning("a tokenising process ended (%s); its documents go to a new one", error)
                continue
            except BaseException:
                self._give_back(process, alive=True)
                raise
            self._give_back(process, alive=True)
            return encoded
        raise UserError(
            f"two tokenising processes ended on the same documents ({', '.join(died)}; signal 9 mostly means that "
            "memory ran out); lower training.num_workers, or set it to 0 to tokenise in the trainer's own process. "
            "What the cache holds is kept"
        )

    def _borrow(self, allowed: int) -> Process:
        with self._changed:
            while not self._idle and len(self._running) >= allowed and not self._closed:
                self._changed.wait()
            if self._closed:
                raise RuntimeError("the tokenising processes were ended")
            if self._idle:
                return self._idle.pop()
            process = Process(self._vocab, self._dtype)
            self._running.add(process)
            return process

    def _give_back(self, process: Process, *, alive: bool) -> None:
        with self._changed:
            if alive:
                self._idle.append(process)
            else:
                self._running.discard(process)
            self._changed.notify_all()

    def release(self) -> None:
        """One of the users has ended."""
        with self._changed:
            self._users -= 1
        if self._users <= 0:
            self.close()

    def close(self) -> None:
        """End the processes; what is in work fails."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            running = list(self._running)
        for process in running:
            process.close()
        self._threads.shutdown(wait=True, cancel_futures=True)
