"""The token cache: what is on disk, kills, resumes, damage, several processes, reuse."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import threading
from pathlib import Path

import numpy as np
import pytest

from ultra.data import CorpusData, Interrupted, open_data
from ultra.data import cache as cache_module
from ultra.data.cache import Filler, Unit
from ultra.data.encode import text_hash
from ultra.data.sources import FileSource
from ultra.errors import UserError


def contents(data: CorpusData) -> list[bytes]:
    """The bytes of every unit, in order."""
    cache = data.corpora[0].cache
    return [
        b"".join(cache.folder.joinpath(unit.name + end).read_bytes() for end in (".bin", ".idx.npy"))
        for unit in cache.units
    ]


def manifest(cfg) -> Path:
    [path] = Path(cfg.training.cache_dir).glob("tokens/*/manifest.json")
    return path


@pytest.fixture
def whole(make_cfg, tmp_path: Path) -> list[bytes]:
    """The cache of an undisturbed fill."""
    data = open_data(make_cfg(cache_dir=str(tmp_path / "undisturbed"), stream_local_parquet=False))
    return contents(data)


class Killed(BaseException):
    """Like SIGKILL for the filler: nothing catches it on the way."""


def fail_in_unit(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """The fill dies when unit `number` is written, before its manifest entry."""
    write = Filler._write_unit

    def failing(self: Filler, n: int, *args: object) -> Unit:
        unit = write(self, n, *args)
        if n == number:
            raise Killed
        return unit

    monkeypatch.setattr(Filler, "_write_unit", failing)


def test_units_hold_the_documents_in_order(make_cfg, texts: list[str]) -> None:
    data = open_data(make_cfg(stream_local_parquet=False))
    assert [u.documents for u in data.corpora[0].cache.units] == [100, 100, 60]
    got = []
    for unit in data.corpora[0].cache.units:
        tokens, (offsets, _) = data.corpora[0].cache.tokens(unit), data.corpora[0].cache.index(unit)
        assert tokens.dtype == np.uint16 and offsets[-1] == len(tokens)
        for a, b in itertools.pairwise(offsets):
            assert tokens[a] == data.cls_id and tokens[b - 1] == data.sep_id
            got.append(data.tokenizer.decode(tokens[a + 1 : b - 1].tolist()))
    assert got == texts


@pytest.mark.parametrize("unit", [0, 1, 2])
def test_killed_fill_resumes_at_the_raw_cursor(make_cfg, monkeypatch, whole: list[bytes], unit: int) -> None:
    cfg = make_cfg(stream_local_parquet=False)
    with monkeypatch.context() as patch:
        fail_in_unit(patch, unit)
        with pytest.raises(Killed):
            open_data(cfg)
    assert len(json.loads(manifest(cfg).read_text())["units"]) == unit
    starts = []
    documents = FileSource.documents

    def watched(self, cursor, skipped):
        starts.append(cursor)
        return documents(self, cursor, skipped)

    monkeypatch.setattr(FileSource, "documents", watched)
    assert contents(open_data(cfg)) == whole
    assert starts == [{0: None, 1: (0, 0, 100), 2: (1, 0, 70)}[unit]]


def test_the_number_of_workers_changes_nothing(make_cfg, whole: list[bytes], monkeypatch) -> None:
    monkeypatch.setattr(cache_module, "CHUNK_DOCUMENTS", 7)
    for workers in (0, 3):
        cfg = make_cfg(cache_dir=f"{make_cfg().training.cache_dir}{workers}", num_workers=workers)
        data = open_data(cfg)
        data.train_token_counts()  # waits for the whole cache
        assert contents(data) == whole


def test_a_damaged_unit_is_filled_again(make_cfg, whole: list[bytes], caplog) -> None:
    cfg = make_cfg(stream_local_parquet=False)
    open_data(cfg)
    damaged = manifest(cfg).parent / "unit-00001.bin"
    damaged.write_bytes(damaged.read_bytes()[:-2])
    assert contents(open_data(cfg)) == whole
    assert any("unit-00001" in m and "damaged" in m for m in caplog.messages)


def test_a_complete_cache_is_used_without_opening_the_source(make_cfg, monkeypatch, whole: list[bytes]) -> None:
    cfg = make_cfg(stream_local_parquet=False)
    first = contents(open_data(cfg))

    def opened(*args: object) -> None:
        raise AssertionError("the source was read")

    for name in ("fingerprint", "_rows", "_resolve_columns"):
        monkeypatch.setattr(FileSource, name, opened)
    assert contents(open_data(cfg)) == first == whole
    with pytest.raises(AssertionError, match="the source was read"):
        open_data(make_cfg(prefer_local_cache=False))


def test_refill_replaces_content_that_only_looks_right(make_cfg, whole: list[bytes]) -> None:
    cfg = make_cfg(stream_local_parquet=False)
    open_data(cfg)
    damaged = manifest(cfg).parent / "unit-00000.bin"
    damaged.write_bytes(bytes(len(damaged.read_bytes())))
    assert contents(open_data(cfg)) != whole
    assert contents(open_data(make_cfg(stream_local_parquet=False, prefer_local_cache=False))) == whole


def test_changed_content_gets_another_cache(make_cfg, corpus: Path) -> None:
    cfg = make_cfg(stream_local_parquet=False)
    first = open_data(cfg).corpora[0].cache.folder
    path = corpus / "part-1.jsonl"
    path.write_text(path.read_text(encoding="utf-8") + '{"body": "one more"}\n', encoding="utf-8")
    data = open_data(cfg)
    assert data.corpora[0].cache.folder != first
    assert sum(u.documents for u in data.corpora[0].cache.units) == 261
    assert (
        open_data(make_cfg(max_length=50, mlm_probability=0.4, seed=3)).corpora[0].cache.folder
        == data.corpora[0].cache.folder
    )


def test_max_samples_is_a_prefix_and_can_grow(make_cfg, texts: list[str], tmp_path: Path, whole) -> None:
    open_data(make_cfg(cache_dir=str(tmp_path / "t"), stream_local_parquet=False))
    [tokenizer] = (tmp_path / "t" / "tokenizers").glob("*.json")  # one for all: training it follows max_samples
    for limit, units in (
        (30, [30]),
        (150, [100, 50]),
        (100, [100]),
        (120, [100, 20]),
        (10**6, [100, 100, 60]),
    ):
        data = open_data(make_cfg(tokenizer=str(tokenizer), max_samples=limit, stream_local_parquet=False))
        assert [u.documents for u in data.corpora[0].cache.units] == units
        assert data.corpora[0].cache.complete
        hashes = np.concatenate([data.corpora[0].cache.index(u)[1] for u in data.corpora[0].cache.units])
        assert hashes.tolist() == [text_hash(t) for t in texts[:limit]]
    assert contents(data) == whole


def test_stop_while_filling(make_cfg, whole: list[bytes], monkeypatch) -> None:
    monkeypatch.setattr(cache_module, "CHUNK_DOCUMENTS", 5)
    cfg = make_cfg(stream_local_parquet=False)
    with pytest.raises(Interrupted):  # before anything
        open_data(cfg, should_stop=lambda: True)
    calls = iter(range(10**6))
    with pytest.raises(Interrupted):  # while the tokenizer reads its text
        open_data(cfg, should_stop=lambda: next(calls) > 100)
    started = threading.Event()
    write = Filler._write_unit

    def slow(self: Filler, *args: object) -> Unit:
        started.set()
        self._stop_asked.wait(30)
        return write(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Filler, "_write_unit", slow)
        with pytest.raises(Interrupted):  # while the cache fills
            open_data(cfg, should_stop=started.is_set)
    assert not any(t.name == "ultra-cache-fill" for t in threading.enumerate())
    assert contents(open_data(cfg)) == whole


def test_a_fault_of_the_fill_reaches_the_trainer(make_cfg, monkeypatch) -> None:
    fail_in_unit(monkeypatch, 1)
    data = open_data(make_cfg())
    with pytest.raises(Killed):
        for _ in data.train_batches(0):
            pass
    data.close()


def test_a_full_disk_is_no_silent_end(make_cfg, monkeypatch) -> None:
    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        open_data(make_cfg(tokenizer=None))


def _fill(cfg, queue) -> None:
    data = open_data(cfg)
    data.train_token_counts()
    queue.put(contents(data))
    data.close()


def test_two_processes_fill_one_cache(make_cfg, whole: list[bytes]) -> None:
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    processes = [context.Process(target=_fill, args=(make_cfg(), queue)) for _ in range(2)]
    for p in processes:
        p.start()
    assert [queue.get(timeout=60) for _ in processes] == [whole, whole]
    for p in processes:
        p.join(60)
        assert p.exitcode == 0


def test_a_second_filler_takes_over_from_a_dead_one(make_cfg, whole: list[bytes], monkeypatch) -> None:
    data = open_data(make_cfg(stream_local_parquet=False))
    folder = data.corpora[0].cache.folder
    (folder / "manifest.json").unlink()
    lock = data.corpora[0].cache.lock()
    lock.acquire()
    waiting = open_data_in_thread(make_cfg())
    waiting.join(0.5)
    assert waiting.is_alive()  # the lock's holder is thought to be at work
    lock.release()
    waiting.join(30)
    assert not waiting.is_alive()
    assert contents(open_data(make_cfg(stream_local_parquet=False))) == whole


def open_data_in_thread(cfg) -> threading.Thread:
    thread = threading.Thread(target=lambda: open_data(cfg).close(), daemon=True)
    thread.start()
    return thread


def test_a_damaged_manifest_is_named(make_cfg) -> None:
    cfg = make_cfg(stream_local_parquet=False)
    open_data(cfg)
    manifest(cfg).write_text("{")
    with pytest.raises(UserError, match=r"manifest\.json is damaged"):
        open_data(cfg)


def test_skipped_rows_are_counted_once_over_a_resume(make_cfg, corpus: Path, monkeypatch, caplog) -> None:
    path = corpus / "part-0.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines()
    for at in (5, 110, 120):
        lines.insert(at, '{"body": null}')
    path.write_text("\n".join(lines), encoding="utf-8")
    cfg = make_cfg(stream_local_parquet=False)
    with monkeypatch.context() as patch:
        fail_in_unit(patch, 1)
        with pytest.raises(Killed):
            open_data(cfg)
    data = open_data(cfg)
    assert data.corpora[0].cache.skipped == {"part-0.jsonl: null": 3}
    assert any("skipped" in m and "part-0.jsonl: null" in m for m in caplog.messages)


def test_a_complete_cache_of_a_remote_dataset_needs_no_network(make_cfg, corpus: Path, monkeypatch, whole) -> None:
    pytest.importorskip("datasets")
    from ultra.data import sources

    monkeypatch.setenv("HF_DATASETS_CACHE", str(corpus.parent / "hf"))
    hub = {"local_parquet_dir": None, "dataset_name": str(corpus), "text_column": "body"}
    with monkeypatch.context() as patch:
        fail_in_unit(patch, 2)
        with pytest.raises(Killed):
            open_data(make_cfg(stream_local_parquet=False, **hub))
    assert contents(open_data(make_cfg(stream_local_parquet=False, **hub))) == whole

    def offline() -> None:
        raise UserError("offline")

    monkeypatch.setattr(sources, "_import_datasets", offline)
    assert contents(open_data(make_cfg(**hub))) == whole
    with pytest.raises(UserError, match="offline"):
        open_data(make_cfg(dataset_batch_size=99, **hub))
