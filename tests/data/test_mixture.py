"""Several sources by weight: whose window comes when, and what each source's part of everything is."""

from __future__ import annotations

import itertools
import json
import logging
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ultra.config import ConfigError, load_config
from ultra.data import CorpusData, open_data
from ultra.data.loader import Place
from ultra.data.mixture import MAX_PERIOD, Mixture, slots
from ultra.data.prepare import mixed_texts
from ultra.data.sources import FileSource
from ultra.data.tokenizer import train_tokenizer
from ultra.data.windows import SampleOrder
from ultra.errors import UserError


def test_weights_become_the_smallest_integers() -> None:
    assert slots([3, 1, 1]) == slots([0.3, 0.1, 0.1]) == slots([6e-7, 2e-7, 2e-7]) == [3, 1, 1]
    assert slots([2.5]) == [1]
    assert slots([1e-300, 1]) == [1, MAX_PERIOD - 1]
    rounded = slots([1 / 3, 0.1234567891, 7.7])
    assert sum(rounded) == MAX_PERIOD
    exact = np.array([1 / 3, 0.1234567891, 7.7])
    assert np.abs(np.array(rounded) / MAX_PERIOD - exact / exact.sum()).max() < 1 / MAX_PERIOD


@pytest.mark.parametrize("seed", range(8))
def test_every_prefix_is_within_one_of_each_share(seed: int) -> None:
    rng = random.Random(seed)
    weights = [rng.choice([1, 2, 3, 7, rng.randint(1, 50)]) for _ in range(rng.randint(1, 8))]
    mixture = Mixture(weights)
    counts = [0] * len(weights)
    for n in range(2 * mixture.period + 3):
        assert mixture.counts(n) == counts
        source, inside = mixture.locate(n)
        assert inside == counts[source]  # each source's samples in order, none left out
        counts[source] += 1
        for count, weight in zip(counts, weights, strict=True):
            assert abs(count * sum(weights) - (n + 1) * weight) < sum(weights)
    far = 10**15
    assert sum(mixture.counts(far)) == far  # and no counting up to it


@pytest.fixture
def folders(tmp_path: Path, texts: list[str]) -> list[Path]:
    """200, 40 and 20 documents, told apart by their first word."""
    made = []
    for name, part in (("large", texts[:200]), ("small", texts[200:240]), ("tiny", texts[240:])):
        folder = tmp_path / name
        folder.mkdir()
        lines = (json.dumps({"body": f"{name} {text}"}) for text in part)
        (folder / "a.jsonl").write_text("\n".join(lines), encoding="utf-8")
        made.append(folder)
    return made


@pytest.fixture
def tokenizer(tmp_path: Path, texts: list[str]) -> str:
    path = tmp_path / "tokenizer.json"
    path.write_text(train_tokenizer(texts, 400).to_json(), encoding="utf-8")
    return str(path)


@pytest.fixture
def mixed(make_cfg, folders: list[Path], tokenizer: str) -> Callable[..., Any]:
    def make(weights: tuple[float, ...] = (3, 2, 1), **changes: Any) -> Any:
        from ultra.config.training import SourceFields

        sources = tuple(SourceFields(path=str(f), weight=float(w)) for f, w in zip(folders, weights, strict=False))
        settings = {"local_parquet_dir": None, "sources": sources, "tokenizer": tokenizer, "dataset_batch_size": 30}
        return make_cfg(**(settings | changes))

    return make


def windows(data: CorpusData, count: int, **place: int) -> list[Place]:
    """The places of the first samples of the run, without making batches."""
    micro = data._micro_batches(0, place.get("rank", 0), place.get("world", 1))
    return list(itertools.islice(itertools.chain.from_iterable(micro), count))


def same(a, b) -> bool:
    return all(torch.equal(getattr(a, n), getattr(b, n)) for n in ("input_ids", "labels", "cu_seqlens"))


def test_windows_by_weight_whatever_the_sizes(mixed, folders: list[Path]) -> None:
    data = open_data(mixed())
    places = windows(data, 600)
    assert [p.index for p in places] == list(range(600))
    assert Counter(p.source for p in places) == {0: 300, 1: 200, 2: 100}
    for source in range(3):  # each in its own order, over its own epochs
        order, corpus = SampleOrder(seed=11), data.corpora[source]
        own = [(p.number, p.window) for p in places if p.source == source]
        wanted = [corpus.locate(order, i) for i in range(len(own))]
        assert own == [(s.unit, s.window) for s in wanted]
    sizes = [int(corpus.train_counts().sum()) for corpus in data.corpora]
    assert sizes[2] < 100 < sizes[0]  # so the tiny one came round several times
    data.close()


def test_one_entry_is_the_same_run_as_the_folder_alone(mixed, make_cfg, folders: list[Path], tokenizer: str) -> None:
    listed = open_data(mixed((5,)))
    alone = open_data(make_cfg(local_parquet_dir=str(folders[0]), tokenizer=tokenizer, dataset_batch_size=30))
    assert listed.corpora[0].cache.folder == alone.corpora[0].cache.folder
    for a, b in zip(itertools.islice(listed.train_batches(0), 30), alone.train_batches(0), strict=False):
        assert all(same(x, y) for x, y in zip(a, b, strict=True))
    assert all(same(a, b) for a, b in zip(listed.eval_batches(), alone.eval_batches(), strict=True))


def test_caches_are_shared_with_single_runs(mixed, make_cfg, folders: list[Path], tokenizer: str, monkeypatch) -> None:
    data = open_data(mixed(stream_local_parquet=False))
    monkeypatch.setattr(FileSource, "_rows", None)  # reading would fail
    for folder, corpus in zip(folders, data.corpora, strict=True):
        alone = open_data(make_cfg(local_parquet_dir=str(folder), tokenizer=tokenizer, dataset_batch_size=30))
        assert alone.corpora[0].cache.folder == corpus.cache.folder


@pytest.mark.parametrize("world", [2, 4])
def test_any_number_of_processes_and_workers_sees_the_same_batches(mixed, world: int) -> None:
    alone = open_data(mixed(batch_size=2, gradient_accumulation_steps=4))
    shared = open_data(mixed(batch_size=2, gradient_accumulation_steps=4 // world, dataloader_workers=world // 2))
    ranks = [list(itertools.islice(shared.train_batches(5, rank=r, world_size=world), 4)) for r in range(world)]
    for step, wanted in enumerate(itertools.islice(alone.train_batches(5), 4)):
        got = [ranks[r][step][m] for m in range(4 // world) for r in range(world)]
        assert all(same(a, b) for a, b in zip(got, wanted, strict=True))
    shared.close()


def test_resume_is_one_integer(mixed) -> None:
    stream = list(itertools.islice(open_data(mixed()).train_batches(0), 60))
    for first in (1, 17, 59):
        [batches] = itertools.islice(open_data(mixed()).train_batches(first), 1)
        assert all(same(a, b) for a, b in zip(batches, stream[first], strict=True))


def test_masks_of_different_sources_differ(mixed, folders: list[Path]) -> None:
    for source in range(2):  # the same text twice, so the same windows
        (folders[source] / "a.jsonl").write_text((folders[2] / "a.jsonl").read_text(encoding="utf-8"))
    for dynamic in (True, False):
        data = open_data(mixed((1, 1), batch_size=1, gradient_accumulation_steps=1, dynamic_masking=dynamic))
        batches = [b for [b] in itertools.islice(data.train_batches(0), 10)]
        for a, b in itertools.pairwise(batches[::2]):
            assert not torch.equal(a.labels, b.labels)
        for a, b in zip(batches[::2], batches[1::2], strict=True):
            original = [torch.where(x.labels >= 0, x.labels, x.input_ids) for x in (a, b)]
            assert torch.equal(*original) and not torch.equal(a.labels, b.labels)
        data.close()


def test_fixed_keys_do_not_collide() -> None:
    unit: Any = None
    edges = itertools.product((0, 1, 1023), (0, 1, 2**20 - 1), (0, 1, 2**32 - 1))
    keys = {Place(0, source, number, unit, window).fixed_key for source, number, window in edges}
    assert len(keys) == 27 and max(keys) < 2**64
    assert Place(9, 0, 3, unit, 5).fixed_key == 3 * 2**32 + 5  # as with one source


def test_max_samples_counts_documents_of_all_sources_by_weight(mixed) -> None:
    data = open_data(mixed(max_samples=60, stream_local_parquet=False))
    assert [sum(u.documents for u in c.cache.units) for c in data.corpora] == [30, 20, 10]
    more = open_data(mixed(max_samples=300, stream_local_parquet=False))
    assert [sum(u.documents for u in c.cache.units) for c in more.corpora] == [150, 40, 20]
    with pytest.raises(UserError, match=r"max_samples=2 .* leave none to training\.sources\[2\] .*tiny"):
        open_data(mixed(max_samples=2))


def test_evaluation_holds_out_documents_of_every_source_by_weight(mixed, caplog) -> None:
    caplog.set_level(logging.INFO)
    data = open_data(mixed((3, 2), val_fraction=0.3, eval_samples=20))
    batches = list(data.eval_batches())
    assert sum(b.input_ids.shape[1] for b in batches) == 20 * 24 == data.eval_windows() * 24
    [told] = [m for m in caplog.messages if "validation windows" in m]
    assert "12 of 12 from" in told and "8 of 8 from" in told
    more = open_data(mixed((3, 2), val_fraction=0.3, eval_samples=40)).eval_batches()
    assert all(same(a, b) for a, b in zip(batches[:6], more, strict=False))  # the first of any larger number
    # a source that cannot give its part gives all it has, and says so
    caplog.clear()
    short = open_data(mixed((1, 1, 1), val_fraction=0.2, eval_samples=3000))
    counts = [c.validation_windows(0) for c in short.corpora]
    assert 0 < counts[2] < 1000 and short.eval_windows() == sum(counts)
    assert len(list(short.eval_batches())) == -(-sum(counts) // 3)
    [record] = [r for r in caplog.records if "validation windows" in r.message]
    assert record.levelname == "WARNING" and f"{counts[2]} of 1000" in record.message


def test_validation_documents_never_train(mixed) -> None:
    data = open_data(mixed(val_fraction=0.3, pack_sequences=False, max_length=200, batch_size=1))

    def documents(batches) -> set[bytes]:
        return {torch.where(b.labels >= 0, b.labels, b.input_ids).numpy().tobytes() for b in batches}

    held_out = documents(data.eval_batches())
    trained = documents(itertools.chain.from_iterable(itertools.islice(data.train_batches(0), 300)))
    assert len(held_out) > 20 and len(trained) > 100 and not held_out & trained


def test_token_counts_follow_the_weights(mixed) -> None:
    data = open_data(mixed((1, 1)))
    counts = data.train_token_counts()
    own = [c.token_counts(data.vocab_size) for c in data.corpora]
    for each in own:
        each[data.vocabulary.special] = 0
    shares = sum(each / each.sum() for each in own) / 2
    assert np.abs(counts / counts.sum() - shares).max() < 1e-4
    assert (counts[np.maximum(*own) > 0] > 0).all()


def test_one_tokenizer_from_text_by_weight(mixed, folders: list[Path]) -> None:
    data = open_data(mixed((3, 1), tokenizer=None))
    again = open_data(mixed((3, 1), tokenizer=None))
    assert data.tokenizer.to_str() == again.tokenizer.to_str()
    assert data.tokenizer.get_vocab_size() == 400
    assert open_data(mixed((1, 9), tokenizer=None)).corpora[0].cache.folder != data.corpora[0].cache.folder
    sources = [FileSource(folder, None) for folder in folders[:2]]
    got = Counter[str]()
    for text in mixed_texts(sources, [3, 1], [10**6] * 2, 6000, lambda: False):
        got[text.split()[0]] += len(text)
    assert got["large"] / got["small"] == pytest.approx(3, rel=0.2)
    assert 6000 <= got.total() < 6000 + 1000
    # until each has been read once: the short one repeats its 7 documents meanwhile
    everything = list(mixed_texts(sources, [3, 1], [7, 10**6], 10**9, lambda: False))
    assert len({t for t in everything if t.startswith("large")}) == 7
    assert sum(t.startswith("small") for t in everything) == len({t for t in everything if t.startswith("small")}) == 40
    sizes = [sum(len(t) for t in everything if t.startswith(name)) for name in ("large", "small")]
    assert sizes[0] / sizes[1] == pytest.approx(3, rel=0.1)


def test_a_source_that_is_missing_or_empty_is_named(mixed, folders: list[Path]) -> None:
    (folders[1] / "a.jsonl").write_text('{"body": ""}\n{"body": "  "}\n')
    with pytest.raises(UserError, match=r"small holds no readable document"):
        open_data(mixed())
    (folders[1] / "a.jsonl").write_text('{"body": "x", "title": "y"}\n')
    with pytest.raises(UserError, match=r"set training\.sources\[1\]\.text_column to one of 'body', 'title'"):
        open_data(mixed())
    (folders[1] / "a.jsonl").unlink()
    with pytest.raises(UserError, match=r"training\.sources\[1\]\.path=.*small holds no \.txt"):
        open_data(mixed())
    folders[1].rmdir()
    with pytest.raises(UserError, match=r"training\.sources\[1\]\.path=.*small does not exist"):
        open_data(mixed())


def test_a_dataset_and_the_builtin_corpus_as_sources(make_cfg, folders: list[Path], tokenizer, monkeypatch) -> None:
    pytest.importorskip("datasets")
    from ultra.config.training import SourceFields

    monkeypatch.setenv("HF_DATASETS_CACHE", str(folders[0].parent / "hf"))
    sources = (
        SourceFields(dataset_name=str(folders[0]), text_column="body"),
        SourceFields(builtin=True, weight=3.0),
    )
    settings = {"local_parquet_dir": None, "tokenizer": tokenizer, "max_samples": 100}
    data = open_data(make_cfg(sources=sources, stream_local_parquet=False, **settings))
    assert [sum(u.documents for u in c.cache.units) for c in data.corpora] == [25, 75]
    next(data.train_batches(0))
    with pytest.raises(UserError, match=r"dataset_split of training\.sources\[0\]"):
        bad = SourceFields(dataset_name=str(folders[0]), dataset_split="none")
        open_data(make_cfg(sources=(bad,), **settings))
    data.close()


# ---------------------------------------------------------------- the field


def messages(text: str, tmp_path: Path, *overrides: str) -> list[str]:
    path = tmp_path / "c.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return str(caught.value).replace(str(path), "c.yaml").splitlines()


def test_errors_inside_the_list_are_placed(tmp_path: Path) -> None:
    text = """training:
  sources:
    - {path: a, weight: 0}
    - path: b
      wieght: 2
    - {path: c, builtin: true}
    - {weight: 2}
    - 5
    - {path: d, dataset_config: en}
"""
    got = messages(text, tmp_path)
    assert got[0] == "c.yaml:3:17: training.sources[0].weight: got 0 (an integer); allowed: a number > 0"
    assert got[1] == "c.yaml:5:7: training.sources[1].wieght: unknown field; did you mean 'weight'?"
    assert got[2].startswith("c.yaml:6:17: training.sources[2].builtin: set beside path;")
    assert got[3] == "c.yaml:7:7: training.sources[3].path: a source needs one of path, dataset_name, builtin: true"
    assert got[4].startswith("c.yaml:8:7: training.sources[4]: got 5 (an integer); allowed: a map with some of path,")
    assert got[5].startswith("c.yaml:9:17: training.sources[5].dataset_config: belongs to a dataset_name")
    assert len(got) == 6


def test_sources_exclude_the_single_source(tmp_path: Path) -> None:
    text = "training:\n  dataset_name: x\n  text_column: t\n  sources: [{builtin: true}]\n"
    got = messages(text, tmp_path, "training.local_parquet_dir=d")
    assert [m.split(": set beside")[0] for m in got] == [
        "c.yaml:2:3: training.dataset_name",
        "c.yaml:3:3: training.text_column",
        "override 'training.local_parquet_dir=d': training.local_parquet_dir",
    ]


def test_sources_from_the_command_line_and_back(tmp_path: Path) -> None:
    config = load_config("mini", ["training.sources=[{path: a, weight: 2}, {builtin: true}]"])
    assert [(s.path, s.builtin, s.weight) for s in config.training.sources] == [("a", False, 2.0), (None, True, 1.0)]
    (tmp_path / "again.yaml").write_text(config.to_yaml(), encoding="utf-8")
    assert load_config(tmp_path / "again.yaml") == config
    got = messages("training: {}", tmp_path, "training.sources=[{path: a, wieght: 2}]")
    assert got == [
        "override 'training.sources=[{path: a, wieght: 2}]': "
        "training.sources[0].wieght: unknown field; did you mean 'weight'?"
    ]
