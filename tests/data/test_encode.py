"""Tokenising processes: same bytes as here, started as needed, and neither their death nor ours leaves anything."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from ultra.data import encode as encode_module
from ultra.data import open_data
from ultra.data.encode import Encoded, Process, Tokenisers, encode, text_hash
from ultra.data.tokenizer import Vocabulary, train_tokenizer, vocabulary
from ultra.errors import UserError

TRICKY = ["", "plain", "Zürich 東京 🙂\n\x00", "a [MASK] that is text", "e\u0301 decomposed", "x" * 5000]


@pytest.fixture
def vocab(texts: list[str]) -> Vocabulary:
    return train_tokenizer(texts, 350)


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes from the first text on, whatever the machine."""
    monkeypatch.setattr(encode_module, "IN_PROCESS_CHARS", 0)
    monkeypatch.setattr(encode_module, "CHARS_PER_PROCESS", 1)
    monkeypatch.setattr(encode_module, "cores", lambda: 64)


def same(a: Encoded, b: Encoded) -> bool:
    return a.tokens == b.tokens and np.array_equal(a.sizes, b.sizes) and np.array_equal(a.hashes, b.hashes)


def running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{pid}/stat")  # one that has ended and whose parent has not asked for it does not run
    return not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] != "Z"


def gone(pid: int, seconds: float = 10) -> bool:
    end = time.monotonic() + seconds
    while running(pid) and time.monotonic() < end:
        time.sleep(0.02)
    return not running(pid)


def test_encoded_documents_are_cls_ids_sep(vocab: Vocabulary) -> None:
    found = encode(vocab, TRICKY, np.dtype(np.uint16))
    tokens, ids = np.frombuffer(found.tokens, np.uint16).astype(int), vocab.encode_documents(TRICKY)
    assert found.sizes.tolist() == [len(x) + 2 if len(x) else 0 for x in ids] and found.sizes[0] == 0
    assert tokens.tolist() == [t for x in ids if len(x) for t in [vocab.cls_id, *x.tolist(), vocab.sep_id]]
    assert found.hashes.tolist() == [text_hash(t) for t in TRICKY]


def test_a_process_gives_the_same_bytes(vocab: Vocabulary, texts: list[str]) -> None:
    # special tokens that no file names: what the process must be told
    odd = Tokenizer(
        models.WordLevel({"?": 0, "<start>": 1, "<end>": 2, "<hole>": 3, "a": 4, "plain": 5}, unk_token="?")
    )
    odd.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    roles = {"unk": "?", "cls": "<start>", "sep": "<end>", "mask": "<hole>"}
    for known in (vocab, vocabulary(odd, where="test", names=roles)):
        for dtype in (np.dtype(np.uint16), np.dtype(np.uint32)):
            process = Process(known, dtype)
            try:
                for batch in (TRICKY, texts, []):
                    assert same(process(batch), encode(known, batch, dtype))
            finally:
                process.close()
            assert not running(process.pid)


def test_a_process_imports_neither_torch_nor_the_main_program(vocab: Vocabulary) -> None:
    code = "import ultra.data.worker, sys; assert not {'torch', 'pydantic', 'datasets', 'pyarrow'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_signal_to_the_group_cannot_end_a_process_that_is_just_starting(vocab: Vocabulary) -> None:
    process = Process(vocab, np.dtype(np.uint16))
    try:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            os.kill(process.pid, number)
        assert same(process(TRICKY), encode(vocab, TRICKY, np.dtype(np.uint16)))
    finally:
        process.close()


def test_a_small_corpus_starts_no_process(make_cfg, monkeypatch) -> None:
    monkeypatch.setattr(encode_module, "Process", None)  # would fail when called
    data = open_data(make_cfg(num_workers=8, stream_local_parquet=False))
    assert data.corpora[0].cache.complete
    data.close()


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("workers", [0, 1, 3])
def test_num_workers_is_the_number_of_processes(make_cfg, monkeypatch, workers: int, tmp_path: Path) -> None:
    from ultra.data import cache

    monkeypatch.setattr(cache, "CHUNK_DOCUMENTS", 7)
    started = []
    make = Process.__init__

    def watched(self: Process, *args: object) -> None:
        make(self, *args)
        started.append(self.pid)

    caches: list[int] = []

    def contents(workers: int) -> list[bytes]:
        caches.append(workers)
        cfg = make_cfg(num_workers=workers, cache_dir=str(tmp_path / f"cache{len(caches)}"), stream_local_parquet=False)
        data = open_data(cfg)
        found = data.corpora[0].cache
        data.close()
        return [found.folder.joinpath(name).read_bytes() for unit in found.units for name in unit.files]

    wanted = contents(0)
    monkeypatch.setattr(Process, "__init__", watched)
    assert contents(workers) == wanted
    assert (0 < len(started) <= workers) if workers else not started
    assert all(gone(pid) for pid in started)


def test_never_more_processes_than_cores_or_than_work(vocab: Vocabulary, monkeypatch) -> None:
    monkeypatch.setattr(encode_module, "cores", lambda: 3)
    assert Tokenisers(vocab, np.dtype(np.uint16), 8).workers == 3
    monkeypatch.setattr(encode_module, "IN_PROCESS_CHARS", 100)
    monkeypatch.setattr(encode_module, "CHARS_PER_PROCESS", 1000)
    pool = Tokenisers(vocab, np.dtype(np.uint16), 8)
    try:
        pool.submit(["word " * 50] * 2).result()
        assert len(pool._running) == 0  # the first 100 characters belong to the threads here
        for chunks, most in ((2, 1), (2, 2), (40, 3)):  # of 500 characters: the second process comes after 1100
            futures = [pool.submit(["word " * 50] * 2) for _ in range(chunks)]
            assert all(same(f.result(), futures[0].result()) for f in futures)
            assert 1 <= len(pool._running) <= most
    finally:
        pool.close()
    assert not any(process._popen.poll() is None for process in pool._running)


@pytest.mark.usefixtures("at_once")
def test_a_killed_process_is_replaced(vocab: Vocabulary, texts: list[str], caplog) -> None:
    pool = Tokenisers(vocab, np.dtype(np.uint16), 1)
    wanted = encode(vocab, texts, np.dtype(np.uint16))
    try:
        assert same(pool.submit(texts).result(60), wanted)
        [process] = pool._running
        os.kill(process.pid, signal.SIGKILL)
        assert same(pool.submit(texts).result(60), wanted)
        assert any("signal 9" in m for m in caplog.messages)
    finally:
        pool.close()


@pytest.mark.usefixtures("at_once")
def test_documents_that_kill_every_process_are_an_error(make_cfg, monkeypatch) -> None:
    monkeypatch.setattr(encode_module, "START", "import os, sys; sys.stdin.buffer.read(100); os.kill(os.getpid(), 9)")
    with pytest.raises(UserError, match=r"signal 9.*lower training\.num_workers"):
        open_data(make_cfg(num_workers=2))
    assert not any(t.name.startswith("ultra-") for t in threading.enumerate())


@pytest.mark.usefixtures("at_once")
def test_an_error_over_there_is_told_here(vocab: Vocabulary, monkeypatch) -> None:
    pool = Tokenisers(vocab, np.dtype(np.uint16), 1)
    try:
        with pytest.raises(RuntimeError, match=r"a tokenising process failed:\n(?s:.*)UnicodeDecodeError"):
            monkeypatch.setattr(encode_module, "write_message", broken_message)
            pool.submit(["text"]).result(60)
        monkeypatch.undo()
    finally:
        pool.close()


def broken_message(file, *parts: bytes) -> None:
    import struct

    parts = (parts[0], b"\xff\xfe") if len(parts) == 2 else parts
    file.write(struct.pack(f"<{1 + len(parts)}Q", len(parts), *map(len, parts)))
    file.write(b"".join(parts))
    file.flush()


PARENT = """
import pickle, sys
from ultra.data import encode
encode.IN_PROCESS_CHARS, encode.cores = 0, lambda: 2
import numpy as np
from ultra.data.tokenizer import train_tokenizer
pool = encode.Tokenisers(train_tokenizer(["some text"] * 9, 300), np.dtype(np.uint16), 1)
pool.submit(["text"]).result()
print(*[p.pid for p in pool._running], flush=True)
sys.stdin.read()
"""  # without a main guard: a spawned child that imported it would start over


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_processes_end_with_their_parent_and_ignore_its_signals(number: signal.Signals, tmp_path: Path) -> None:
    script = tmp_path / "no_guard.py"
    script.write_text(PARENT)
    parent = subprocess.Popen(
        [sys.executable, str(script)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    os.kill(pid, signal.SIGTERM)
    os.kill(pid, signal.SIGINT)
    time.sleep(0.2)
    assert running(pid)
    parent.send_signal(number)
    parent.wait(120)
    assert gone(pid)
