"""Every field of `training` acts as it is defined: one entry a field, on real runs, batches and checkpoints.

An entry runs the trainer, or the part of it that the field is about, with two values of the field and asserts the
difference that its definition promises.
"""

from __future__ import annotations

import contextlib
import json
import math
import multiprocessing
import re
import sys
import threading
import types
from collections.abc import Callable, Iterator
from functools import cache, partial
from itertools import islice
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import yaml
from torch import Tensor, nn

from ultra.config import TrainingConfig, UltraConfig
from ultra.config.training import GROUPS
from ultra.data import Batch, CorpusData, encode, open_data
from ultra.data import cache as cache_module
from ultra.data.sources import FileSource, Source
from ultra.data.tokenizer import train_tokenizer
from ultra.errors import UserError
from ultra.mixers import MIXERS
from ultra.model import Encoder, build_model
from ultra.train import precision, trainer
from ultra.train.optim import GroupedOptimizer, collect_groups
from ultra.train.precision import LossScale, amp_dtype, pick_device

from .conftest import SAMPLE
from .runs import FOLDER, MODEL, Run, config, documents, moved, new_folder, run, write_text

CPU = torch.device("cpu")
CHECKS: dict[str, Callable[[], None]] = {}


def acts(check: Callable[[], None]) -> Callable[[], None]:
    """Enters a function into the table under the name of its field."""
    CHECKS[check.__name__] = check
    return check


# What the entries are made of


@contextlib.contextmanager
def data(**fields: Any) -> Iterator[CorpusData]:
    opened = open_data(config(**fields))
    try:
        yield opened
    finally:
        opened.close()


def batches(steps: int, **fields: Any) -> list[list[Batch]]:
    """The micro-batches of the first steps, the whole cache being there."""
    with data(**{"stream_local_parquet": False, **fields}) as opened:
        return list(islice(opened.train_batches(0), steps))


def text(steps: int = 20, **fields: Any) -> str:
    """What the batches of the first steps say."""
    with data(stream_local_parquet=False, **fields) as opened:
        rows = [unmasked(step[0])[0].tolist() for step in islice(opened.train_batches(0), steps)]
        return str(opened.tokenizer.decode([token for row in rows for token in row]))


def unmasked(batch: Batch) -> Tensor:
    return torch.where(batch.labels == -100, batch.input_ids, batch.labels)


def units(folder: Path) -> list[int]:
    """Documents of each unit of the one corpus in a cache folder."""
    (manifest,) = folder.glob("tokens/*/manifest.json")
    return [unit["documents"] for unit in json.loads(manifest.read_text())["units"]]


@contextlib.contextmanager
def faulty(steps: dict[int, float]) -> Iterator[None]:
    """The gradients of these batches (by number, from 0) come out times a factor."""
    original = trainer.Trainer.backward

    def backward(self: trainer.Trainer, micro_batches: list[Batch]) -> Any:
        out = original(self, micro_batches)
        for param in self.model.parameters():
            param.grad.mul_(steps.get(self.state.data_step, 1.0))
        return out

    with mock.patch.object(trainer.Trainer, "backward", backward):
        yield


@contextlib.contextmanager
def held_out_losses(*losses: float) -> Iterator[None]:
    """Evaluations that find these losses, one after the other."""
    values = iter(losses)
    row = {"eval_mask_loss": 0.0, "eval_accuracy": 0.0}
    with mock.patch.object(trainer, "evaluate", lambda *_, **__: {"eval_loss": next(values), **row}):
        yield


@cache
def baseline(steps: int = 2) -> Run:
    return run(scheduler_total_steps=steps)


# Data


@acts
def batch_size() -> None:
    assert [batches(1, batch_size=n)[0][0].input_ids.numel() for n in (2, 4)] == [2 * 16, 4 * 16]


@acts
def gradient_accumulation_steps() -> None:
    assert [len(batches(1, gradient_accumulation_steps=n)[0]) for n in (1, 3)] == [1, 3]
    assert run(gradient_accumulation_steps=3).column("tokens") == [3 * 2 * 16, 6 * 2 * 16]


@acts
def max_length() -> None:
    for length in (8, 24):
        (batch,) = batches(1, max_length=length)[0]
        assert batch.input_ids.numel() == 2 * length and batch.max_seqlen <= length


@acts
def dataloader_workers() -> None:
    """Cost: who makes the batches. The batches stay."""
    made = []
    for workers in (0, 2):
        with data(stream_local_parquet=False, dataloader_workers=workers) as opened:
            before = len(multiprocessing.active_children())
            steps = opened.train_batches(0)
            made.append([next(steps) for _ in range(3)])
            assert len(multiprocessing.active_children()) - before == workers
    for (a,), (b,) in zip(*made, strict=True):
        assert torch.equal(a.input_ids, b.input_ids) and torch.equal(a.labels, b.labels)


@acts
def mlm_probability() -> None:
    for rate in (0.15, 0.5):
        made = [step[0] for step in batches(40, mlm_probability=rate)]
        special = sum(int((unmasked(batch) < 5).sum()) for batch in made)  # never predicted
        tokens = sum(batch.input_ids.numel() for batch in made) - special
        share = sum(batch.num_labelled for batch in made) / tokens
        assert abs(share - rate) < 4 * (rate * (1 - rate) / tokens) ** 0.5 + 0.01  # 4 sigma, and at least one a window


@acts
def max_samples() -> None:
    for limit in (25, 60):
        folder = new_folder()
        batches(1, max_samples=limit, cache_dir=str(folder))
        assert sum(units(folder)) == limit


@acts
def dataset_batch_size() -> None:
    for size, expected in ((25, [25, 25, 10]), (60, [60])):
        folder = new_folder()
        batches(1, dataset_batch_size=size, cache_dir=str(folder))
        assert units(folder) == expected


@acts
def num_workers() -> None:
    """Cost: how many processes tokenise, given cores and enough text. The tokens stay."""
    made = []
    for workers in (0, 1, 2):
        started: list[encode.Process] = []
        original = encode.Process.__init__

        def start(self: encode.Process, *args: Any, started=started, original=original) -> None:
            started.append(self)
            original(self, *args)

        with (
            mock.patch.object(encode.Process, "__init__", start),
            mock.patch.object(encode, "cores", lambda: 8),
            mock.patch.object(encode, "IN_PROCESS_CHARS", 0),
            mock.patch.object(encode, "CHARS_PER_PROCESS", 1),
            mock.patch.object(cache_module, "CHUNK_DOCUMENTS", 2),
        ):
            made.append(batches(2, num_workers=workers, cache_dir=str(new_folder())))
        assert len(started) == workers
    for other in made[1:]:
        assert all(torch.equal(a.input_ids, b.input_ids) for (a,), (b,) in zip(made[0], other, strict=True))


@acts
def cache_dir() -> None:
    folder = new_folder() / "here"
    batches(1, cache_dir=str(folder))
    assert list(folder.glob("tokens/*/unit-*.bin"))


@acts
def local_parquet_dir() -> None:
    other = write_text(new_folder(), ["words of another folder " * 3 + str(i) for i in range(20)])
    assert "house" in text() and "another" not in text()
    assert "another" in text(local_parquet_dir=str(other)) and "house" not in text(local_parquet_dir=str(other))


def documents_read(**fields: Any) -> int:
    """How many documents opening the data takes out of the source."""
    count = [0]
    original = Source.documents

    def counted(self: Source, *args: Any) -> Iterator[Any]:
        for document in original(self, *args):
            count[0] += 1
            yield document

    with mock.patch.object(Source, "documents", counted):
        batches(1, **fields)
    return count[0]


@acts
def prefer_local_cache() -> None:
    folder = str(new_folder())
    first = documents_read(cache_dir=folder)
    assert first >= 60
    assert documents_read(cache_dir=folder, prefer_local_cache=True) == 0
    assert documents_read(cache_dir=folder, prefer_local_cache=False) == first


@acts
def stream_local_parquet() -> None:
    """The source gives two units and then waits: a streaming run has its first batch by then, the other has not."""
    tokenizer = new_folder() / "tokenizer.json"
    tokenizer.write_text(train_tokenizer(documents(), 300).to_json())
    for stream in (True, False):
        go, reached = threading.Event(), threading.Event()
        original = FileSource._rows

        def slow(self: FileSource, *args: Any, go=go, reached=reached, original=original) -> Iterator[Any]:
            for number, row in enumerate(original(self, *args)):
                if number == 25:
                    reached.set()
                    go.wait(60)
                yield row

        opened: list[CorpusData] = []
        fields = {"dataset_batch_size": 10, "cache_dir": str(new_folder()), "tokenizer": str(tokenizer)}
        cfg = config(stream_local_parquet=stream, **fields)
        with mock.patch.object(FileSource, "_rows", slow):
            thread = threading.Thread(target=lambda cfg=cfg, opened=opened: opened.append(open_data(cfg)))
            thread.start()
            assert reached.wait(60)
            thread.join(60 if stream else 0.3)
            assert bool(opened) == stream
            if stream:
                assert next(opened[0].train_batches(0))[0].num_labelled > 0
            go.set()
            thread.join(60)
        opened[0].close()


def hub_text(**fields: Any) -> str:
    """What a run reads of a dataset folder in the Hugging Face layout: two configurations of two splits."""
    pytest.importorskip("datasets")
    root = FOLDER / "hub"
    if not root.exists():
        for config_name in ("prose", "verse"):
            for split in ("train", "extra"):
                write_text(root / config_name / split, [f"{config_name} {split} {words}" for words in documents(20)])
        listing = [
            {"config_name": c, "data_files": [{"split": s, "path": f"{c}/{s}/text.jsonl"} for s in ("train", "extra")]}
            for c in ("prose", "verse")
        ]
        (root / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': listing})}---\n", encoding="utf-8")
    hub = {"dataset_name": str(root), "dataset_config": "prose", "text_column": "text"}
    return text(**{**hub, **fields})


def said(words: str) -> set[str]:
    return {word for word in ("prose", "verse", "train", "extra") if word in words}


@acts
def dataset_name() -> None:
    assert said(hub_text()) == {"prose", "train"} and said(text()) == set()
    with pytest.raises(UserError, match="cannot read the Hugging Face dataset"):
        hub_text(dataset_name=str(FOLDER / "absent"))


@acts
def dataset_config() -> None:
    assert said(hub_text(dataset_config="verse")) == {"verse", "train"}


@acts
def dataset_split() -> None:
    assert said(hub_text(dataset_split="extra")) == {"prose", "extra"}


@acts
def text_column() -> None:
    assert "house" in text(text_column="text") and "esuoh" not in text(text_column="text")
    assert "esuoh" in text(text_column="reverse") and "house" not in text(text_column="reverse")


@acts
def sources() -> None:
    folders = [write_text(new_folder(), [f"{word} " * 14 + str(i) for i in range(30)]) for word in ("aaaa", "bbbb")]
    shares = []
    for weight in (1.0, 3.0):
        entries = [{"path": str(folders[0]), "weight": weight}, {"path": str(folders[1])}]
        with data(sources=entries, stream_local_parquet=False) as opened:
            vocabulary = opened.tokenizer.get_vocab()
            ids = {vocabulary[token] for token in vocabulary if token.removeprefix("Ġ") == "aaaa"}
            windows = [unmasked(step[0]) for step in islice(opened.train_batches(0), 32)]
        shares.append(sum(any(int(token) in ids for token in row) for w in windows for row in w.view(2, -1)) / 64)
    assert shares[0] == pytest.approx(1 / 2, abs=0.05) and shares[1] == pytest.approx(3 / 4, abs=0.05)


@acts
def tokenizer() -> None:
    path = new_folder() / "tokenizer.json"
    path.write_text(train_tokenizer(["quite another text"] * 9, 290).to_json())
    given, own = (opened_vocabulary(**fields) for fields in ({"tokenizer": str(path)}, {}))
    assert "Ġanother" in given and "Ġanother" not in own


def opened_vocabulary(**fields: Any) -> dict[str, int]:
    with data(**fields) as opened:
        return dict(opened.tokenizer.get_vocab())


@acts
def val_fraction() -> None:
    for share in (0.2, 0.6):
        with data(val_fraction=share, stream_local_parquet=False, eval_samples=10**6, pack_sequences=False) as opened:
            held_out = opened.eval_windows()
            with data(val_fraction=1e-9, stream_local_parquet=False, pack_sequences=False) as other:
                everything = int(other.train_token_counts().sum())
            rest = int(opened.train_token_counts().sum())
        assert held_out > 0
        assert abs(1 - rest / everything - share) < 4 * (share * (1 - share) / 60) ** 0.5  # 4 sigma of 60 documents


def shown(**fields: Any) -> tuple[float, float, float]:
    """Shares of the predicted tokens that the input shows as [MASK], as another token, unchanged."""
    made = [step[0] for step in batches(40, mlm_probability=0.5, **fields)]
    pairs = [(batch.input_ids[batch.labels != -100], batch.labels[batch.labels != -100]) for batch in made]
    seen, target = (torch.cat(part) for part in zip(*pairs, strict=True))
    mask, same = seen == 4, seen == target
    return tuple(float(part.float().mean()) for part in (mask, ~mask & ~same, same))  # type: ignore[return-value]


@acts
def mask_strategy() -> None:
    assert shown(mask_strategy=(1.0, 0.0, 0.0)) == (1, 0, 0)
    # 4 sigma of about 500 draws, and 1 in 300 of the random tokens is the right one
    assert shown(mask_strategy=(0.2, 0.5, 0.3)) == pytest.approx((0.2, 0.5, 0.3), abs=0.1)


@acts
def dynamic_masking() -> None:
    """One window of text, seen again in every epoch."""
    folder = write_text(new_folder(), ["one two three four", "five six"])
    for fresh in (False, True):
        made = batches(
            6, local_parquet_dir=str(folder), dynamic_masking=fresh, batch_size=1, max_length=64, val_fraction=0.5
        )
        assert len({unmasked(step[0]).numpy().tobytes() for step in made}) == 1
        assert (len({step[0].labels.numpy().tobytes() for step in made}) > 1) == fresh


@acts
def pack_sequences() -> None:
    assert max(len(step[0].cu_seqlens) - 1 for step in batches(9, max_length=64)) > 2  # documents of about 25 tokens
    assert {len(step[0].cu_seqlens) - 1 for step in batches(9, max_length=64, pack_sequences=False)} == {2}


# Precision and device


def types_of_products(**fields: Any) -> set[torch.dtype]:
    seen: set[torch.dtype] = set()
    original = nn.functional.linear

    def linear(*args: Any) -> Tensor:
        out = original(*args)
        seen.add(out.dtype)
        return out

    with mock.patch.object(nn.functional, "linear", linear):
        assert all(t.dtype == torch.float32 for t in run(**fields).tensors().values())  # master weights
    return seen


@acts
def use_amp() -> None:
    assert types_of_products() == {torch.float32}
    assert torch.bfloat16 in types_of_products(use_amp=True, amp_dtype="bf16")


@acts
def amp_dtype_() -> None:
    gpu = torch.device("cuda")
    for has_bf16, auto in ((True, torch.bfloat16), (False, torch.float16)):
        with mock.patch.object(torch.cuda, "is_bf16_supported", lambda *_, has_bf16=has_bf16, **__: has_bf16):
            chosen = {
                name: amp_dtype(TrainingConfig(use_amp=True, amp_dtype=name), gpu) for name in ("auto", "bf16", "fp16")
            }
        assert chosen == {"auto": auto, "bf16": torch.bfloat16, "fp16": torch.float16}
    for has_bf16, auto in ((True, torch.bfloat16), (False, None)):
        with mock.patch.object(precision, "cpu_has_bf16", lambda has_bf16=has_bf16: has_bf16):
            chosen = {name: amp_dtype(TrainingConfig(use_amp=True, amp_dtype=name), CPU) for name in ("auto", "bf16")}
        assert chosen == {"auto": auto, "bf16": torch.bfloat16}
    assert LossScale(torch.float16, CPU).active and not LossScale(torch.bfloat16, CPU).active
    with pytest.raises(UserError, match="fp16 needs a GPU"):
        run(use_amp=True, amp_dtype="fp16")


CHECKS["amp_dtype"] = CHECKS.pop("amp_dtype_")


@acts
def device() -> None:
    for there, auto in (((), "cpu"), (("mps",), "mps"), (("cuda", "mps"), "cuda")):
        with (
            mock.patch.object(torch.cuda, "is_available", lambda there=there: "cuda" in there),
            mock.patch.object(torch.backends.mps, "is_available", lambda there=there: "mps" in there),
        ):
            assert pick_device("auto").type == auto and pick_device("cpu").type == "cpu"
            for absent in {"cuda", "mps"} - set(there):
                with pytest.raises(UserError) as error:
                    pick_device(absent)
                usable = ", ".join([*sorted(there), "cpu"])
                assert f"training.device: {absent} is not available here; use auto or one of: {usable}" in str(
                    error.value
                )
    seen: list[torch.device] = []
    with (
        mock.patch.object(trainer, "pick_device", lambda name: seen.append(name) or CPU),
    ):
        run(max_steps=1)
    assert seen == ["cpu"]


@acts
def compile() -> None:
    for on in (False, True):
        with mock.patch.object(nn.Module, "compile") as compiled, mock.patch.object(torch, "compile", lambda f, **_: f):
            run(compile=on, max_steps=1)
        assert bool(compiled.call_count) == on


@acts
def seed() -> None:
    starts = [batches(1, seed=seed)[0][0] for seed in (0, 0, 1)]
    same, other = (torch.equal(starts[0].labels, batch.labels) for batch in starts[1:])
    assert same and not other
    frozen = {f"lr_{group}": 0.0 for group in GROUPS}
    runs = [run(seed=seed, max_steps=1, **frozen) for seed in (0, 0, 1)]
    assert not moved(runs[0], runs[1])
    assert "embedding.table.weight" in moved(runs[0], runs[2])


@acts
def init_from() -> None:
    base, frozen = baseline(), {f"lr_{group}": 0.0 for group in GROUPS}
    assert not moved(base, run(init_from=str(base.folder), **frozen))
    assert moved(base, run(**frozen))


@acts
def log_to() -> None:
    """Trackers get every line; a module with trackio's interface stands in for the package."""
    got: list[Any] = []
    fake = types.ModuleType("trackio")
    fake.__spec__ = mock.Mock()
    fake.init = lambda **about: types.SimpleNamespace(  # type: ignore[attr-defined]
        log=lambda row, step: got.append((step, "loss" in row or "eval_loss" in row)), finish=lambda: got.append("end")
    )
    with mock.patch.dict(sys.modules, trackio=fake):
        run(log_to=["trackio"])
    assert got == [(0, True), (1, True), (2, True), (2, True), "end"]


# Optimizer groups: each setting moves the parameters of its group and no others

EVERY_MIXER = {**MODEL, "layer_pattern": tuple(MIXERS), "num_layers": len(MIXERS)}


@cache
def two_gradients() -> list[dict[str, Tensor]]:
    """Of two batches, at the initial weights of an encoder with every mixer."""
    model, found = every_mixer(), []
    for ids in torch.randint(5, 300, (2, 2, 12), generator=torch.Generator().manual_seed(0)):
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        found.append({name: param.grad.clone() for name, param in model.named_parameters()})
    return found


def every_mixer() -> Encoder:
    torch.manual_seed(0)
    return build_model(UltraConfig(**EVERY_MIXER))


@cache
def updates(**training: Any) -> dict[str, tuple[str, Tensor]]:
    """Parameter -> (its group, its value after the real optimizer's two steps on these gradients)."""
    model, cfg = every_mixer(), TrainingConfig(**{**{f"lr_{group}": 1e-2 for group in GROUPS}, **training})
    groups = collect_groups(model, cfg)
    optimizer = GroupedOptimizer(groups, cfg)
    for gradients in two_gradients():
        for name, param in model.named_parameters():
            param.grad = gradients[name].clone()
        optimizer.step(torch.tensor(0.0))
    return {name: (group.name, param.detach()) for group in groups for name, param, _ in group.params}


def starting_values() -> dict[str, Tensor]:
    return {name: value for name, (_, value) in updates(**{f"lr_{group}": 0.0 for group in GROUPS}).items()}


def check_group(setting: str, group: str, value: Any) -> None:
    before, after, start = updates(), updates(**{f"{setting}_{group}": value}), starting_values()
    changed = {name for name in before if not torch.equal(before[name][1], after[name][1])}
    members = {name for name, (its, _) in before.items() if its == group}
    if setting == "wd":  # decay spares biases and the like; lr · wd of every weight in two steps
        spared = members - changed
        assert changed and changed <= members
        assert all(re.search(r"bias|A_log|\.D$|alpha|shift|scale|damping", name) for name in spared), spared
        name = max(changed, key=lambda name: float(start[name].abs().mean()))
        lost = before[name][1] - after[name][1]
        difference = value - getattr(TrainingConfig(), f"wd_{group}")
        torch.testing.assert_close(lost, 2 * 1e-2 * difference * start[name], rtol=0.2, atol=1e-2 * difference * 0.05)
        return
    assert changed == members
    if setting == "lr":  # Adam's first steps go by the rate, whatever the gradient
        ratio = [(after[n][1] - start[n]).norm() / (before[n][1] - start[n]).norm() for n in members]
        assert all(float(r) == pytest.approx(0.5, rel=0.02) for r in ratio)
    if setting == "eps":  # far above the root of the second moment: next to no update is left
        left, full = (sum(float((x[n][1] - start[n]).norm()) for n in members) for x in (after, before))
        assert left < 0.1 * full


VALUES = {"lr": 5e-3, "wd": 2.0, "betas": (0.1, 0.5), "eps": 10.0}
CHECKS |= {
    f"{setting}_{group}": partial(check_group, setting, group, value)
    for setting, value in VALUES.items()
    for group in GROUPS
}


# Schedule


def lr_factors(**fields: Any) -> list[float]:
    return run(**{"scheduler_total_steps": 10, "scheduler_type": "cosine", "eval_samples": 1, **fields}).column(
        "lr_factor"
    )


def cosine(step: int, warmup: int, total: int) -> float:
    return (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) / 2


@acts
def scheduler_type() -> None:
    expected = {
        "cosine": [1.0, *(cosine(step, 1, 10) for step in range(1, 10))],
        "constant": [1.0] * 10,
        "linear_warmup_then_constant": [1.0] * 10,
        "linear": [1.0, *(1 - (step - 1) / 9 for step in range(1, 10))],
        "wsd": [1.0] * 9 + [0.5],
    }
    for kind, factors in expected.items():
        assert lr_factors(scheduler_type=kind) == pytest.approx(factors)


@acts
def scheduler_warmup_ratio() -> None:
    found = lr_factors(scheduler_type="linear_warmup_then_constant", scheduler_warmup_ratio=0.35)
    assert found == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1, 1])


@acts
def scheduler_total_steps() -> None:
    assert lr_factors(scheduler_total_steps=5) == pytest.approx([1.0, *(cosine(step, 1, 5) for step in range(1, 5))])


@acts
def min_lr_ratio() -> None:
    floor = lr_factors(min_lr_ratio=0.2)
    assert floor == pytest.approx([1.0, *(0.2 + 0.8 * cosine(step, 1, 10) for step in range(1, 10))])


@acts
def max_steps() -> None:
    assert lr_factors(max_steps=3) == pytest.approx([1.0, cosine(1, 1, 10), cosine(2, 1, 10)])


# Bad steps


@acts
def grad_clip_max_norm() -> None:
    """With eps far above the gradients the update is proportional to them, so clipping shows in it."""
    linear = {f"eps_{group}": 1e4 for group in GROUPS} | {f"wd_{group}": 0.0 for group in GROUPS}
    rates = {f"lr_{group}": 1e3 for group in GROUPS}
    runs = [run(max_steps=1, grad_clip_max_norm=norm, **linear, **rates) for norm in (1e9, 1e-2)]
    norms = [one.column("grad_norm")[0] for one in runs]
    assert norms[0] == norms[1] > 0.1  # the logged norm is the one before clipping
    start = run(max_steps=1, **{f"lr_{group}": 0.0 for group in GROUPS}).tensors()
    name = "head.dense.weight"
    free, clipped = (one.tensors()[name] - start[name] for one in runs)
    torch.testing.assert_close(clipped.norm() / free.norm(), torch.tensor(1e-2 / norms[0]), rtol=0.05, atol=0)


@acts
def inf_post_clip_threshold() -> None:
    for threshold, skipped in ((100.0, 1), (1e9, 0)):
        with faulty({4: 1e4}):
            one = run(scheduler_total_steps=6, inf_post_clip_threshold=threshold)
        assert one.column("grad_norm")[4] > 100
        assert one.column("skipped") == [0, 0, 0, 0, skipped, 0]


@acts
def max_nan_retries() -> None:
    settings = {"scheduler_total_steps": 8, "nan_check_interval": 1, "checkpoint_every_n_steps": 2}
    nan = {4: math.nan, 5: math.nan}  # two bad windows in a row, from step 5 on
    outcomes = {}
    for retries in (0, 1, 2, 3):
        with faulty(nan):
            one = run(max_nan_retries=retries, **settings)
        outcomes[retries] = (one.code, one.state["step"], one.state["lr_scale"], one.state["data_step"])
    # 0 stops; 1 goes back at once, and finds the second bad batch; 2 goes back once; 3 skips both
    assert outcomes == {0: (1, 4, 1.0, 4), 1: (1, 4, 1.0, 4), 2: (0, 8, 0.5, 10), 3: (0, 8, 1.0, 8)}


@acts
def nan_check_interval() -> None:
    for interval, looked in ((2, [2, 4, 6]), (4, [4, 6])):
        looks: list[int] = []
        original = trainer.Trainer.look_at_flags

        def look(self: trainer.Trainer, looks=looks, original=original) -> None:
            looks.append(self.state.step)
            original(self)

        with mock.patch.object(trainer.Trainer, "look_at_flags", look):
            run(scheduler_total_steps=6, nan_check_interval=interval)
        assert looks == looked


# Checkpoints and metrics


@acts
def checkpoint_every_n_steps() -> None:
    for interval, steps in ((2, [2, 4, 6]), (4, [4, 6])):
        one = run(scheduler_total_steps=6, checkpoint_every_n_steps=interval, max_rolling_checkpoints=9)
        assert one.steps == steps


@acts
def max_rolling_checkpoints() -> None:
    for number, steps in ((1, [6]), (2, [5, 6])):
        settings = {"checkpoint_every_n_steps": 1, "num_best_checkpoints": 0, "max_rolling_checkpoints": number}
        assert run(scheduler_total_steps=6, **settings).steps == steps


@acts
def num_best_checkpoints() -> None:
    for number, steps in ((0, [6]), (1, [3, 6]), (2, [2, 3, 6])):
        with held_out_losses(9.0, 3.0, 2.0, 1.0, 4.0, 5.0, 6.0):
            settings = {"val_interval": 1, "max_rolling_checkpoints": 1, "num_best_checkpoints": number}
            assert run(scheduler_total_steps=6, **settings).steps == steps


@acts
def val_interval() -> None:
    for interval, steps in ((2, [0, 2, 4]), (3, [0, 3, 4])):
        one = run(scheduler_total_steps=4, val_interval=interval)
        assert [row["step"] for row in one.rows if "eval_loss" in row] == steps


@acts
def eval_samples() -> None:
    for samples in (1, 5):
        with data(eval_samples=samples, batch_size=2) as opened:
            assert sum(batch.input_ids.numel() for batch in opened.eval_batches()) == samples * 16
    tokens = [run(max_steps=1, eval_samples=samples).column("eval_tokens")[0] for samples in (1, 5)]
    assert tokens[0] < tokens[1]


def steps_with_statistics(**fields: Any) -> list[int]:
    return [row["step"] for row in run(scheduler_total_steps=6, **fields).rows if "grad_norm_attention" in row]


@acts
def log_gradient_stats() -> None:
    assert steps_with_statistics(gradient_log_interval=2) == [2, 4, 6]
    assert steps_with_statistics(gradient_log_interval=2, log_gradient_stats=False) == []


@acts
def gradient_log_interval() -> None:
    assert steps_with_statistics(gradient_log_interval=3) == [3, 6]


# GaLore

LOW: dict[str, Any] = {"use_galore": True, "galore_rank": 4, "galore_update_interval": 2}


def galore_run(**fields: Any) -> Run:
    return run(**{"scheduler_total_steps": 4, **LOW, **fields})


def projected(one: Run) -> dict[str, tuple[int, ...]]:
    state = one.tensors("optimizer")
    return {n.removesuffix(".projection"): tuple(t.shape) for n, t in state.items() if n.endswith(".projection")}


@acts
def use_galore() -> None:
    assert not projected(baseline())
    assert set(projected(galore_run())) == {
        "layers.0.mixer.qkv.weight", "layers.0.mixer.out.weight", "layers.0.ffn.up.weight", "layers.0.ffn.down.weight"
    }  # fmt: skip


@acts
def galore_rank() -> None:
    for rank in (2, 4):
        one = galore_run(galore_rank=rank)
        assert set(projected(one).values()) == {(16, rank)}
        assert one.tensors("optimizer")["layers.0.ffn.up.weight.exp_avg"].shape == (rank, 32)
    assert not projected(galore_run(galore_rank=16))  # no matrix has both sides above it


@acts
def galore_max_dim() -> None:
    assert set(projected(galore_run(galore_max_dim=32))) == {
        "layers.0.mixer.out.weight", "layers.0.ffn.up.weight", "layers.0.ffn.down.weight"
    }  # fmt: skip


@acts
def galore_update_interval() -> None:
    """Two runs that differ in length alone: did the subspace change in between?"""
    name = "layers.0.ffn.up.weight.projection"
    for interval, same in ((2, False), (4, True)):
        ends = [
            galore_run(galore_update_interval=interval, max_steps=steps).tensors("optimizer")[name] for steps in (2, 3)
        ]
        assert torch.equal(*ends) == same


@acts
def galore_scale() -> None:
    start = run(max_steps=1, **{f"lr_{group}": 0.0 for group in GROUPS}).tensors()
    plain = {f"wd_{group}": 0.0 for group in GROUPS}
    runs = [galore_run(max_steps=1, galore_scale=scale, **plain) for scale in (1.0, 0.25)]
    matrices, (full, quarter) = projected(runs[0]), (one.tensors() for one in runs)
    for name, value in start.items():
        share = 0.25 if name in matrices else 1.0
        torch.testing.assert_close(quarter[name] - value, share * (full[name] - value), rtol=1e-3, atol=1e-7)


def factorisations(**fields: Any) -> tuple[Run, dict[str, int]]:
    counts = {"svd": 0, "qr": 0}
    with contextlib.ExitStack() as stack:
        for name in counts:
            original = getattr(torch.linalg, name)

            def counted(*args: Any, name=name, original=original, **kwargs: Any) -> Any:
                counts[name] += 1
                return original(*args, **kwargs)

            stack.enter_context(mock.patch.object(torch.linalg, name, counted))
        return galore_run(max_steps=1, **fields), counts


@acts
def galore_method() -> None:
    """Cost: an exact SVD, or two QRs of a sketch. The leading subspace stays, where there is one."""
    runs = [factorisations(galore_method=method, galore_rank=2, batch_size=8) for method in ("svd", "randomized")]
    assert [counts for _, counts in runs] == [{"svd": 4, "qr": 0}, {"svd": 0, "qr": 8}]
    a, b = (one.tensors("optimizer")["layers.0.ffn.up.weight.projection"] for one, _ in runs)
    assert float(torch.linalg.svdvals(a.T @ b).min()) > 0.99  # cosine of the largest angle between the two


@acts
def galore_rotate_moments() -> None:
    """With the subspace of step 3 comes Q = P_newᵀ P_old; without rotation the first moment stays as it was."""
    kept, rotated = (galore_run(max_steps=3, galore_rotate_moments=on).tensors("optimizer") for on in (False, True))
    before = galore_run(max_steps=2).tensors("optimizer")
    name = "layers.0.ffn.up.weight"
    turn = rotated[f"{name}.projection"].T @ before[f"{name}.projection"]
    old = before[f"{name}.exp_avg"]
    difference = rotated[f"{name}.exp_avg"] - kept[f"{name}.exp_avg"]
    torch.testing.assert_close(difference, 0.9 * (turn @ old - old), rtol=1e-3, atol=1e-6)


@acts
def galore_per_layer() -> None:
    """Cost: a projected matrix's gradient is freed within the backward pass. The logged norm still counts it."""
    left: list[list[str]] = []
    original = trainer.Trainer.statistics

    def statistics(self: trainer.Trainer, loads: Any) -> Any:
        left.append([name for name, param in self.model.named_parameters() if param.grad is not None])
        return original(self, loads)

    with mock.patch.object(trainer.Trainer, "statistics", statistics):
        runs = [galore_run(max_steps=1, galore_per_layer=on, gradient_log_interval=1) for on in (False, True)]
    assert set(left[0]) - set(left[1]) == set(projected(runs[0])) and set(left[1]) <= set(left[0])
    for column in ("grad_norm", "grad_norm_attention", "grad_norm_other"):
        assert runs[1].column(column)[0] == pytest.approx(runs[0].column(column)[0], rel=1e-5)


# The table itself


def test_the_table_has_every_field_of_training() -> None:
    assert CHECKS.keys() == set(TrainingConfig.model_fields)
    documented = yaml.safe_load(re.sub(r"(\w+)(\|\w+)+", r"\1", SAMPLE))
    assert set(documented["training"]) <= CHECKS.keys()


@pytest.mark.parametrize("name", CHECKS)
def test_field_acts(name: str) -> None:
    CHECKS[name]()
