"""A tiny model and tiny data with the interfaces of the real ones: a training step takes a millisecond."""

from __future__ import annotations

import os
import signal
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tokenizers import Tokenizer, models
from torch import nn

from ultra.config.run import RunConfig
from ultra.data import Batch
from ultra.train import checkpoint, trainer
from ultra.train.metrics import read_rows

VOCAB, WIDTH, LENGTH, MASK = 32, 16, 24, 4
TIMES = {"tokens_per_s", "data_wait_ms", "eval_seconds"}
Stats = namedtuple("Stats", "counts mean_prob z")


class TinyModel(nn.Module):
    """Embedding, dropout, one block that sees both neighbours, two pretend experts, tied head."""

    def __init__(self, dropout: float = 0.1) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        nn.init.normal_(self.embedding.weight, std=0.1)
        self.left, self.right = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.router = nn.Linear(WIDTH, 2, bias=False)
        self.router.weight.no_galore = True
        self.head = nn.Linear(WIDTH, VOCAB)
        self.head.weight = self.embedding.weight
        self.dropout = nn.Dropout(dropout)
        self.register_buffer("select_bias", torch.zeros(2))
        self.layers = nn.ModuleList()

    def forward(self, input_ids, attention_mask=None, labels=None, *, cu_seqlens=None, max_seqlen=None):
        x = self.embedding(input_ids).view(-1, LENGTH, WIDTH)  # every document is LENGTH long
        h = self.left(x.roll(1, 1)) + self.right(x.roll(-1, 1))
        x = self.norm(x + self.dropout(torch.tanh(h))).view(1, -1, WIDTH)
        scores = self.router(x).softmax(-1)
        x = x + scores[..., :1]
        rows, target = x[labels != -100], labels[labels != -100]
        logits = self.head(rows)
        counts = torch.bincount((scores + self.select_bias).argmax(-1).flatten(), minlength=2)
        loss_sum = F.cross_entropy(logits.float(), target, reduction="sum")
        aux = 0.01 * self.router(x.detach()).softmax(-1).mean((0, 1)).square().sum()
        return SimpleNamespace(
            loss=loss_sum / len(target) + aux,
            loss_sum=loss_sum,
            num_labelled=torch.tensor(len(target)),
            aux_loss=aux,
            logits=logits,
            moe_stats=(Stats(counts, scores.mean((0, 1)).detach(), scores.new_zeros(())),),
        )

    def expert_loads(self, moe_stats):
        return moe_stats[0].counts[None]

    def update_moe_bias(self, loads) -> None:
        self.select_bias += 1e-3 * torch.sign(loads[0].float().mean() - loads[0])

    def param_groups(self):
        groups = {name: [] for name in ("embeddings", "norms", "ode", "retnet", "mamba", "attention", "other")}
        for name, param in self.named_parameters():
            group = name.split(".")[0]
            group = {"embedding": "embeddings", "norm": "norms", "left": "attention"}.get(group, "other")
            groups[group].append((name, param, not name.endswith("bias")))
        return groups


class TinyData:
    """A noisy successor chain; every sample is a function of its index alone."""

    mask_id = MASK

    def __init__(self, cfg: RunConfig) -> None:
        self.training = cfg.training
        vocabulary = {f"t{i}": i for i in range(VOCAB)}
        self.tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="t0"))

    def sample(self, index: int, split: int = 0) -> tuple[np.ndarray, np.ndarray]:
        rng = np.random.default_rng((self.training.seed, split, index))
        ids = 5 + (rng.integers(VOCAB - 5) + np.arange(LENGTH)) % (VOCAB - 5)
        chosen = rng.random(LENGTH) < 0.3
        chosen[rng.integers(LENGTH)] = True
        return np.where(chosen & (rng.random(LENGTH) < 0.8), MASK, ids), np.where(chosen, ids, -100)

    def batch(self, first: int, size: int, split: int = 0) -> Batch:
        rows = [self.sample(first + i, split) for i in range(size)]
        labels = torch.from_numpy(np.concatenate([r[1] for r in rows]))[None]
        return Batch(
            input_ids=torch.from_numpy(np.concatenate([r[0] for r in rows]))[None],
            labels=labels,
            cu_seqlens=torch.arange(size + 1, dtype=torch.int32) * LENGTH,
            max_seqlen=LENGTH,
            num_labelled=int((labels != -100).sum()),
            first_sample=first,
        )

    def train_batches(self, first_step, *, rank=0, world_size=1):
        step, accum, size = first_step, self.training.gradient_accumulation_steps, self.training.batch_size
        while True:
            yield [self.batch(((step * accum + m) * world_size + rank) * size, size) for m in range(accum)]
            step += 1

    def eval_batches(self):
        for first in range(0, self.training.eval_samples, 4):
            yield self.batch(first, 4, split=1)

    def close(self) -> None:
        pass


def config(**training) -> RunConfig:
    rates = {f"lr_{g}": 1e-2 for g in ("embeddings", "norms", "attention", "other")}
    settings = {
        "batch_size": 4,
        "gradient_accumulation_steps": 2,
        "scheduler_total_steps": 12,
        "checkpoint_every_n_steps": 4,
        "val_interval": 4,
        "eval_samples": 8,
        "nan_check_interval": 2,
        "gradient_log_interval": 3,
        "device": "cpu",
        **rates,
        **training,
    }
    return RunConfig.model_validate({"training": settings})


def interrupt_at(monkeypatch, step: int) -> None:
    """Send SIGTERM to this process while step `step` (from 1) is being made."""
    original = trainer.Trainer.backward

    def backward(self, micro_batches):
        if self.state.step + 1 == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, micro_batches)

    monkeypatch.setattr(trainer.Trainer, "backward", backward)


def rows(run: Path) -> list[dict]:
    return [{k: v for k, v in row.items() if k not in TIMES} for row in read_rows(run / "metrics.jsonl")]


def assert_same_run(a: Path, b: Path) -> None:
    """Equal bits: last weights, optimizer state, everything else in the checkpoint, and the metrics."""
    one, two = checkpoint.latest(a), checkpoint.latest(b)
    assert one.name == two.name
    for name in ("model.safetensors", "optimizer.safetensors"):
        first, second = load_file(one / name), load_file(two / name)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first), name
    assert checkpoint.read_state(one) == checkpoint.read_state(two)
    assert rows(a) == rows(b)


@pytest.fixture
def tiny(monkeypatch):
    """TinyModel and TinyData in the place of the real ones; `tiny.run(run_dir, **training)` trains them."""
    monkeypatch.setattr(trainer, "build_model", lambda cfg: TinyModel(cfg.model.dropout))
    monkeypatch.setattr(trainer, "open_data", lambda cfg, **options: TinyData(cfg))
    monkeypatch.delenv("WORLD_SIZE", raising=False)

    def run(run_dir, resume="auto", **training) -> int:
        return trainer.train(config(**training), run_dir=run_dir, resume=resume)

    return SimpleNamespace(
        run=run,
        config=config,
        Model=TinyModel,
        Data=TinyData,
        interrupt_at=lambda step: interrupt_at(monkeypatch, step),
    )
