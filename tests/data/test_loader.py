"""Windows, order, split and batches."""

from __future__ import annotations

import contextlib
import itertools
import os
import pickle
import random
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from ultra.data import Batch, CorpusData, open_data
from ultra.data.cache import Filler
from ultra.data.encode import text_hash
from ultra.data.windows import SampleOrder, Split, make_split
from ultra.errors import UserError


def steps(data: CorpusData, first: int, count: int, **place: int) -> list[list[Batch]]:
    return list(itertools.islice(data.train_batches(first, **place), count))


def same(a: Batch, b: Batch) -> bool:
    tensors = all(torch.equal(getattr(a, n), getattr(b, n)) for n in ("input_ids", "labels", "cu_seqlens"))
    return tensors and all(getattr(a, n) == getattr(b, n) for n in ("max_seqlen", "num_labelled", "first_sample"))


def all_same(a: list[list[Batch]], b: list[list[Batch]]) -> bool:
    return all(same(x, y) for p, q in zip(a, b, strict=True) for x, y in zip(p, q, strict=True))


def original(batch: Batch) -> np.ndarray:
    """The ids before masking."""
    return torch.where(batch.labels >= 0, batch.labels, batch.input_ids)[0].numpy()


def documents(data: CorpusData, validation: bool) -> list[list[np.ndarray]]:
    """Per unit the "[CLS] document [SEP]" of one split, straight from the shards."""
    result = []
    for unit in data.corpora[0].cache.units:
        tokens, (offsets, hashes) = data.corpora[0].cache.tokens(unit), data.corpora[0].cache.index(unit)
        chosen = data.corpora[0].split.is_validation(hashes) == validation
        pairs = zip(offsets[:-1], offsets[1:], chosen, strict=True)
        result.append([tokens[a:b].astype(np.int64) for a, b, c in pairs if c])
    return result


@pytest.fixture
def data(make_cfg):
    data = open_data(make_cfg(stream_local_parquet=False))
    yield data
    data.close()


def epoch_windows(data: CorpusData) -> int:
    return int(data.corpora[0].train_counts().sum())


def one_epoch(data: CorpusData, start: int = 0) -> list[np.ndarray]:
    """The windows of samples start, start + 1, ... of one epoch; needs batch_size 1."""
    size = epoch_windows(data)
    batches = itertools.chain.from_iterable(steps(data, start, size))
    return [original(b) for b in itertools.islice(batches, size)]


def test_an_epoch_holds_every_training_token_once(make_cfg) -> None:
    data = open_data(make_cfg(batch_size=1, gradient_accumulation_steps=1, stream_local_parquet=False))
    got = [w.tobytes() for w in one_epoch(data)]
    wanted, starts = [], [0]
    for unit in documents(data, validation=False):
        stream = np.concatenate(unit)
        assert len(stream) > 24
        starts.append(starts[-1] + -(-len(stream) // 24))
        wanted += [stream[i : i + 24] for i in range(0, len(stream) - 23, 24)]
        if len(stream) % 24:
            wanted.append(stream[-24:])  # the tail, as long as the others
    assert len(got) == len(wanted) and sorted(got) == sorted(w.tobytes() for w in wanted)
    # epoch 0 goes unit by unit, permuted inside
    for a, b in itertools.pairwise(starts):
        inside = [w.tobytes() for w in wanted[a:b]]
        assert sorted(got[a:b]) == sorted(inside) and got[a:b] != inside
    again = [w.tobytes() for w in one_epoch(data, len(got))]
    assert sorted(again) == sorted(got) and again != got


def test_unpacked_samples_are_the_documents_in_pieces(make_cfg) -> None:
    cfg = make_cfg(batch_size=1, gradient_accumulation_steps=1, pack_sequences=False, stream_local_parquet=False)
    data = open_data(cfg)
    wanted = []
    for document in itertools.chain.from_iterable(documents(data, validation=False)):
        body = document[1:-1]
        wanted += [np.concatenate(([2], body[i : i + 22], [3])).tobytes() for i in range(0, len(body), 22)]
    assert sorted(w.tobytes() for w in one_epoch(data)) == sorted(wanted)
    [batch] = steps(data, 0, 1)[0]
    assert batch.cu_seqlens.tolist() == [0, batch.input_ids.shape[1]]


def test_batches_hold_what_they_promise(data: CorpusData) -> None:
    for step, batches in enumerate(steps(data, 0, 30)):
        for micro, b in enumerate(batches):
            assert b.input_ids.shape == b.labels.shape == (1, 3 * 24)
            assert b.input_ids.dtype == b.labels.dtype == torch.int64 and b.cu_seqlens.dtype == torch.int32
            assert b.first_sample == (step * 2 + micro) * 3
            assert b.num_labelled == int((b.labels != -100).sum()) >= 3
            lengths = b.cu_seqlens.diff()
            assert b.cu_seqlens[0] == 0 and b.cu_seqlens[-1] == 72
            assert b.max_seqlen == int(lengths.max()) and int(lengths.min()) >= 1
            # a border before every [CLS] and at every window, and nowhere else
            ids = original(b)
            borders = set(np.flatnonzero(ids == data.cls_id)) | {0, 24, 48, 72}
            assert b.cu_seqlens.tolist() == sorted(borders)
            after_sep = np.flatnonzero(ids == data.sep_id) + 1
            assert set(after_sep) <= borders


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(make_cfg, data: CorpusData, workers: int) -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    parallel = open_data(make_cfg(dataloader_workers=workers))
    assert all_same(steps(parallel, 3, 12), steps(data, 3, 12))
    assert torch.equal(torch.get_rng_state(), state)  # dropout must not depend on them either
    parallel.close()


def children() -> set[int]:
    found: set[int] = set()
    for task in Path(f"/proc/{os.getpid()}/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # a thread that has just ended
            found |= {int(pid) for pid in (task / "children").read_text().split()}
    return found


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts processes in /proc")
@pytest.mark.parametrize("workers", [0, 1, 3])
def test_dataloader_workers_is_the_number_of_processes(make_cfg, workers: int) -> None:
    before = children()
    data = open_data(make_cfg(dataloader_workers=workers, stream_local_parquet=False))
    assert children() == before
    steps(data, 0, 1)
    batches = data.train_batches(0)
    next(batches)
    assert len(children() - before) == workers
    data.close()
    assert children() == before


@pytest.mark.parametrize("streaming", [True, False])
def test_training_starts_after_the_first_unit_or_after_the_whole_cache(make_cfg, monkeypatch, streaming: bool) -> None:
    release, write = threading.Event(), Filler._write_unit

    def gated(self, number: int, *args):
        assert number == 0 or release.wait(30)
        return write(self, number, *args)

    monkeypatch.setattr(Filler, "_write_unit", gated)
    if not streaming:
        threading.Timer(0.5, release.set).start()
    data = open_data(make_cfg(stream_local_parquet=streaming))
    assert release.is_set() is not streaming  # streaming: it did not wait
    assert len(data.corpora[0].cache.units) == (1 if streaming else 3)
    next(data.train_batches(0))
    release.set()
    data.close()


@pytest.mark.parametrize("rows", [1, 37, 1000])
def test_dataset_batch_size_is_the_documents_of_a_unit(make_cfg, rows: int) -> None:
    data = open_data(make_cfg(dataset_batch_size=rows, max_samples=80, stream_local_parquet=False))
    assert [u.documents for u in data.corpora[0].cache.units] == [min(rows, 80 - i) for i in range(0, 80, rows)]


SIGNALLED = """
import os, pickle, signal, sys, time
from ultra.data import open_data
cfg = pickle.loads(sys.stdin.buffer.read())
asked = []
signal.signal(signal.SIGTERM, lambda number, frame: asked.append(number))
batches = open_data(cfg).train_batches(0)
next(batches)
os.killpg(0, signal.SIGTERM)  # what a batch scheduler does: the whole group
time.sleep(0.3)
for _ in range(5):
    next(batches)
print(asked)  # and the end without close() must not wait for workers that ignore signals
"""


def test_workers_outlive_a_signal_to_the_group_but_not_their_parent(make_cfg) -> None:
    run = subprocess.run(
        [sys.executable, "-c", SIGNALLED],
        input=pickle.dumps(make_cfg(dataloader_workers=2)),
        stdout=subprocess.PIPE,
        start_new_session=True,
        timeout=60,
        check=True,
    )
    assert run.stdout.decode().strip() == f"[{signal.SIGTERM.value}]"


def test_resume_from_any_step_is_the_unbroken_stream(data: CorpusData) -> None:
    per_epoch = epoch_windows(data) // 6
    stream = steps(data, 0, 2 * per_epoch + 5)  # over two ends of an epoch
    for first in (0, 1, per_epoch - 1, per_epoch, per_epoch + 1, 2 * per_epoch):
        assert all_same(steps(data, first, 5), stream[first : first + 5])


def test_resume_in_a_fresh_process_state(make_cfg, data: CorpusData) -> None:
    assert all_same(steps(open_data(make_cfg()), 40, 3), steps(data, 40, 3))


@pytest.mark.parametrize("world", [2, 4])
def test_any_number_of_processes_sees_the_same_global_batch(make_cfg, world: int) -> None:
    """Global batch 8 = world · accumulation · batch_size, split differently."""
    alone = open_data(make_cfg(batch_size=2, gradient_accumulation_steps=4, stream_local_parquet=False))
    shared = open_data(make_cfg(batch_size=2, gradient_accumulation_steps=4 // world))
    ranks = [steps(shared, 5, 6, rank=r, world_size=world) for r in range(world)]
    for step, wanted in enumerate(steps(alone, 5, 6)):
        got = [ranks[r][step][m] for m in range(4 // world) for r in range(world)]
        assert all_same([got], [wanted])


def test_order_does_not_depend_on_the_filling(make_cfg, data: CorpusData, monkeypatch, tmp_path: Path) -> None:
    wanted = steps(data, 0, 40)
    gate = threading.Semaphore(1)
    write = Filler._write_unit

    def gated(self, *args):
        gate.acquire()
        return write(self, *args)

    monkeypatch.setattr(Filler, "_write_unit", gated)
    slow = open_data(make_cfg(cache_dir=str(tmp_path / "slow")))
    assert len(slow.corpora[0].cache.units) == 1 and not slow.corpora[0].cache.complete
    got = []
    stream = slow.train_batches(0)
    for step in range(40):
        if step == 5:
            threading.Timer(0.2, gate.release, (2,)).start()  # the rest comes while training waits for it
        got.append(next(stream))
        gate.release() if step == 38 else None
    assert all_same(got, wanted)
    assert slow.waited_s > 0
    gate.release(5)
    assert all(same(a, b) for a, b in zip(slow.eval_batches(), data.eval_batches(), strict=True))
    slow.close()


def test_masks_are_fresh_each_epoch_or_fixed(make_cfg) -> None:
    for dynamic in (True, False):
        cfg = make_cfg(batch_size=1, gradient_accumulation_steps=1, dynamic_masking=dynamic)
        data = open_data(cfg)
        data.train_token_counts()
        size = epoch_windows(data)
        masks = []
        for start in (0, size):
            batches = [b for [b] in steps(data, start, size)]
            masks.append({original(b).tobytes(): (b.input_ids, b.labels) for b in batches})
        equal = [torch.equal(masks[0][w][1], masks[1][w][1]) for w in masks[0]]
        assert all(equal) if not dynamic else sum(equal) < size / 4
        data.close()


def test_seed_changes_order_and_masks_but_not_evaluation(make_cfg, data: CorpusData) -> None:
    other = open_data(make_cfg(seed=12, mlm_probability=0.5, mask_strategy=(1.0, 0.0, 0.0), dynamic_masking=False))
    assert not all_same(steps(other, 0, 2), steps(data, 0, 2))
    assert all(same(a, b) for a, b in zip(other.eval_batches(), data.eval_batches(), strict=True))


def test_evaluation_windows(make_cfg, data: CorpusData) -> None:
    batches = list(data.eval_batches())
    wanted = [np.concatenate(unit) for unit in documents(data, validation=True)]
    got = np.concatenate([original(b) for b in batches])
    first = wanted[0][: len(wanted[0]) // 24 * 24]
    assert np.array_equal(got[: len(first)], first)
    assert sum(-(-len(w) // 24) for w in wanted) == sum(b.input_ids.shape[1] for b in batches) // 24
    few = list(open_data(make_cfg(eval_samples=4)).eval_batches())
    assert [b.input_ids.shape[1] for b in few] == [72, 24] and same(few[0], batches[0])
    assert all(same(a, b) for a, b in zip(batches, data.eval_batches(), strict=True))


def test_split_is_by_text_and_survives_added_documents(make_cfg, data: CorpusData, corpus: Path, texts) -> None:
    def validation(d: CorpusData) -> set[int]:
        hashes = np.concatenate([d.corpora[0].cache.index(u)[1] for u in d.corpora[0].cache.units])
        return set(hashes[d.corpora[0].split.is_validation(hashes)].tolist())

    before = validation(data)
    assert 0.02 * 260 < len(before) < 0.2 * 260
    (corpus / "a-new-first-part.jsonl").write_text("\n".join(f'{{"body": "new {i}"}}' for i in range(300)))
    added = open_data(make_cfg(stream_local_parquet=False, dataset_batch_size=37))
    assert before == validation(added) & {text_hash(t) for t in texts}
    train = {d.tobytes() for unit in documents(data, False) for d in unit}
    assert not train & {d.tobytes() for unit in documents(data, True) for d in unit}


def test_one_document_is_held_out_where_the_share_gives_none() -> None:
    hashes = np.array([2**60, 2**63, 2**59, 2**59], dtype=np.uint64)
    assert make_split(1e-6, hashes).is_validation(hashes).tolist() == [False, False, True, True]
    assert not make_split(1e-6, hashes[2:]).is_validation(hashes[2:]).any()  # one text only: nothing to hold out
    assert make_split(0.26, hashes) == Split(int(0.26 * 2**64))


def test_nothing_to_train_on_is_the_users_error(make_cfg, corpus: Path) -> None:
    for path in corpus.iterdir():
        path.unlink()
    texts = [t for t in (f"text {i}" for i in range(200)) if text_hash(t) < 0.9 * 2**64][:5]
    (corpus / "a.txt").write_text("\n\n".join(texts))
    data = open_data(make_cfg(vocab_size=300, val_fraction=0.9))
    with pytest.raises(UserError, match=r"val_fraction=0\.9 leaves all 5 documents"):
        next(data.train_batches(0))


def test_token_counts_are_of_the_training_documents(data: CorpusData) -> None:
    tokens = np.concatenate([d for unit in documents(data, False) for d in unit])
    wanted = np.bincount(tokens, minlength=data.vocab_size)
    wanted[:5] = 0
    assert np.array_equal(data.train_token_counts(), wanted)


def test_batch_pickles_to_itself_and_small(data: CorpusData) -> None:
    [[batch, _]] = steps(data, 0, 1)
    packed = pickle.dumps(batch)
    assert same(pickle.loads(packed), batch)
    assert len(packed) < 72 * 8 * 2  # less than the two int64 rows alone
    moved = batch.to("cpu")
    assert same(moved, batch)


def test_order_visits_each_window_once_an_epoch_whatever_is_empty() -> None:
    counts = np.array([3, 0, 5, 1, 0])
    order = SampleOrder(seed=3)
    for epoch in range(4):
        seen = [order.locate(epoch * 9 + i, counts, complete=True) for i in range(9)]
        assert {(s.unit, s.window) for s in seen} == {(u, w) for u in range(5) for w in range(counts[u])}
        if epoch == 0:
            assert [s.unit for s in seen] == [0] * 3 + [2] * 5 + [3]
    orders = {tuple(order.locate(e * 9 + i, counts, True).unit for i in range(9)) for e in range(1, 12)}
    assert len(orders) > 2  # units are permuted from epoch 1 on
    one, order = np.array([50]), SampleOrder(3)
    epochs = [[order.locate(e * 50 + i, one, True).window for i in range(50)] for e in range(2)]
    pair, two = np.array([50, 50]), SampleOrder(3)
    units = [[two.locate(50 * u + i, pair, True).window for i in range(50)] for u in range(2)]
    assert epochs[0] != epochs[1] and units[0] != units[1]  # and the windows by epoch and by unit
    order = SampleOrder(seed=3)
    assert SampleOrder(3).locate(8, counts[:3], complete=False) is None
    assert SampleOrder(3).locate(0, counts[1:2], complete=True) is None
    jumps = random.Random(0).sample(range(36), 36)
    fresh = SampleOrder(seed=3)
    assert all(fresh.locate(n, counts, True) == order.locate(n, counts, True) for n in jumps)


def test_large_vocabularies_take_four_bytes() -> None:
    from ultra.data.cache import token_dtype

    assert token_dtype(65535) == np.uint16 and token_dtype(65536) == np.uint32


def test_builtin_corpus_end_to_end(make_cfg) -> None:
    """The default path: no source named, no network (conftest refuses sockets)."""
    data = open_data(make_cfg(local_parquet_dir=None, max_samples=60, vocab_size=1000, max_length=64))
    [[batch, _]] = steps(data, 0, 1)
    assert batch.input_ids.shape == (1, 192) and data.vocab_size == 1000
    data.close()
